// Python for the bindings, in its limited API: one build serves Python 3.11 and all later ones. The names are those of
// pybind11, whose own templates need more of Python than that.
#pragma once

#ifdef Py_LIMITED_API  // torch's builder asks for that of the oldest Python that torch has
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <array>
#include <cstdint>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ghostfused::py {

struct error_already_set : std::exception {};  // Python's own error indicator says which

struct value_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Owns a reference, or nothing.
class object {
 public:
  object() = default;
  explicit object(PyObject* owned) : pointer_(owned) {
    if (!owned) throw error_already_set();
  }
  object(const object& other) : pointer_(other.pointer_) { Py_XINCREF(pointer_); }
  object(object&& other) noexcept : pointer_(other.release()) {}
  object& operator=(object other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }
  ~object() { Py_XDECREF(pointer_); }
  PyObject* ptr() const { return pointer_; }
  PyObject* release() { return std::exchange(pointer_, nullptr); }

 private:
  PyObject* pointer_ = nullptr;
};

struct none : object {
  none() : object(Py_NewRef(Py_None)) {}
};
struct str : object {
  explicit str(const std::string& s) : object(PyUnicode_FromStringAndSize(s.data(), s.size())) {}
};

inline object cast(const object& value) { return value; }
inline object cast(bool value) { return object(PyBool_FromLong(value)); }
inline object cast(int value) { return object(PyLong_FromLong(value)); }
inline object cast(int64_t value) { return object(PyLong_FromLongLong(value)); }
inline object cast(double value) { return object(PyFloat_FromDouble(value)); }
inline object cast(const char* value) { return str(value); }
inline object cast(const std::string& value) { return str(value); }

struct list : object {
  list() : object(PyList_New(0)) {}
  template <typename T>
  void append(const T& value) {
    if (PyList_Append(ptr(), cast(value).ptr()) < 0) throw error_already_set();
  }
};

class dict : public object {
  struct Item {
    PyObject* dict;
    const char* key;
    template <typename T>
    void operator=(const T& value) && {
      if (PyDict_SetItemString(dict, key, cast(value).ptr()) < 0) throw error_already_set();
    }
  };

 public:
  dict() : object(PyDict_New()) {}
  Item operator[](const char* key) { return {ptr(), key}; }
};

template <typename T>
T from(PyObject* value) {
  if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw error_already_set();
    return truth;
  } else if constexpr (std::is_integral_v<T>) {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw error_already_set();
    if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max()) {
      PyErr_Format(PyExc_OverflowError, "expected at most %zd bits, got %lld", 8 * sizeof(T), number);
      throw error_already_set();
    }
    return static_cast<T>(number);
  } else {
    static_assert(std::is_same_v<T, std::string>);
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) throw error_already_set();
    return {text, static_cast<size_t>(size)};
  }
}

// What ``body`` returns; nullptr with Python's error set if it throws.
template <typename Body>
auto guarded(const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const error_already_set&) {
  } catch (const value_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

struct kw_only {};  // arguments after it have names

struct arg {
  const char* name;
  object value{};  // its default

  template <typename T>
  arg operator=(const T& default_value) && {
    return {name, cast(default_value)};
  }
};

// A C++ function as Python calls it; never freed, as modules are not.
template <typename R, typename... Args>
struct Function {
  R (*run)(Args...);
  PyMethodDef method;
  std::vector<arg> args{};
  size_t positional = sizeof...(Args);

  void add(arg each) { args.push_back(std::move(each)); }
  void add(kw_only) { positional = args.size(); }
  void add(const char* doc) { method.ml_doc = doc; }

  static PyObject* call(PyObject* self, PyObject* given, PyObject* named) {
    return guarded([&]() -> PyObject* {
      const auto* f = static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
      const auto values = f->values(given, named);
      return [&]<size_t... i>(std::index_sequence<i...>) {
        if constexpr (std::is_void_v<R>) {
          f->run(from<std::decay_t<Args>>(values[i])...);
          return Py_NewRef(Py_None);
        } else {
          return cast(f->run(from<std::decay_t<Args>>(values[i])...)).release();
        }
      }(std::index_sequence_for<Args...>());
    });
  }

 private:
  // Borrowed, one for each argument.
  std::array<PyObject*, sizeof...(Args)> values(PyObject* given, PyObject* named) const {
    std::array<PyObject*, sizeof...(Args)> found{};
    const size_t count = PyTuple_Size(given);
    if (count > positional) refuse("expected at most %zd positional arguments, got %zd", positional, count);
    for (size_t i = 0; i < count; ++i) found[i] = PyTuple_GetItem(given, i);
    PyObject *key, *value;
    for (Py_ssize_t position = 0; named && PyDict_Next(named, &position, &key, &value);) {
      size_t i = 0;
      while (i < args.size() && PyUnicode_CompareWithASCIIString(key, args[i].name) != 0) ++i;
      if (i == args.size()) refuse("got an unexpected argument %R", key);
      if (found[i]) refuse("got %s twice", args[i].name);
      found[i] = value;
    }
    for (size_t i = 0; i < args.size(); ++i) {
      if (!found[i] && !(found[i] = args[i].value.ptr())) refuse("expected an argument %s", args[i].name);
    }
    return found;
  }

  template <typename... Parts>
  [[noreturn]] void refuse(const char* format, Parts... parts) const {
    PyErr_Format(PyExc_TypeError, (method.ml_name + std::string(": ") + format).c_str(), parts...);
    throw error_already_set();
  }
};

class module_ {
 public:
  explicit module_(PyObject* borrowed) : borrowed_(borrowed) {}

  void add(const char* name, const object& value) {
    if (PyModule_AddObjectRef(borrowed_, name, value.ptr()) < 0) throw error_already_set();
  }

  // ``extras``: an arg for each argument, kw_only between two of them, and what help() shows.
  template <typename R, typename... Args, typename... Extras>
  void def(const char* name, R (*run)(Args...), Extras... extras) {
    using F = Function<R, Args...>;
    auto* const function = new F{run, {name, reinterpret_cast<PyCFunction>(&F::call), METH_VARARGS | METH_KEYWORDS}};
    (function->add(std::move(extras)), ...);
    if (function->args.size() != sizeof...(Args)) throw value_error(name + std::string(": each argument has a name"));
    const object self(PyCapsule_New(function, nullptr, nullptr));
    add(name, object(PyCFunction_NewEx(&function->method, self.ptr(), nullptr)));
  }

 private:
  PyObject* borrowed_;
};

// A module named ``name`` whose members ``fill`` adds: what its PyInit function returns.
inline PyObject* make_module(PyModuleDef& definition, void (*fill)(module_& m)) {
  return guarded([&] {
    object module(PyModule_Create(&definition));
    module_ m(module.ptr());
    fill(m);
    return module.release();
  });
}

struct gil_scoped_release {
  PyThreadState* const state = PyEval_SaveThread();
  ~gil_scoped_release() { PyEval_RestoreThread(state); }
};

}  // namespace ghostfused::py
