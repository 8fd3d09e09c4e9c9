// Whether Python dictionaries and the types of objects are as they were: ghostfused/replay.py asks at every call of a
// network, about thousands of them, which have left the caches since the last.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace ghostfused {

// Everything is borrowed: whoever holds a Guard keeps the dictionaries, what was in them, and the objects alive.
class Guard {
 public:
  Guard(const pybind11::list& dicts, const pybind11::list& objects) {
    for (const auto& dict : dicts) {
      dicts_.push_back(dict.cast<pybind11::dict>().ptr());
      sizes_.push_back(PyDict_GET_SIZE(dicts_.back()));
      Py_ssize_t position = 0;
      Entry entry;
      while (PyDict_Next(dicts_.back(), &position, &entry.key, &entry.value)) entries_.push_back(entry);
    }
    for (const auto& object : objects) {
      objects_.push_back(object.ptr());
      types_.push_back(Py_TYPE(object.ptr()));
    }
  }

  bool holds() const {
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) __builtin_prefetch(objects_[i + kAhead]);
      if (Py_TYPE(objects_[i]) != types_[i]) return false;
    }
    const Entry* entry = entries_.data();
    for (size_t i = 0; i < dicts_.size(); ++i) {
      prefetch(i);
      if (PyDict_GET_SIZE(dicts_[i]) != sizes_[i]) return false;
      Py_ssize_t position = 0;
      Entry now;
      while (PyDict_Next(dicts_[i], &position, &now.key, &now.value)) {
        if (now.key != entry->key || now.value != entry->value) return false;
        ++entry;
      }
    }
    return true;
  }

 private:
  struct Entry {
    PyObject *key, *value;
  };
  static constexpr size_t kAhead = 24;

  // The head of a dictionary to come, and the tables of one that comes earlier, whose head is here by now.
  void prefetch(size_t i) const {
    if (i + 2 * kAhead < dicts_.size()) __builtin_prefetch(dicts_[i + 2 * kAhead]);
    if (i + kAhead >= dicts_.size()) return;
    const auto* dict = reinterpret_cast<const PyDictObject*>(dicts_[i + kAhead]);
    const char* keys = reinterpret_cast<const char*>(dict->ma_keys);
    for (int line = 0; line < 7; ++line) __builtin_prefetch(keys + 64 * line);
    const char* values = reinterpret_cast<const char*>(dict->ma_values);
    for (int line = 0; values && line < 3; ++line) __builtin_prefetch(values + 64 * line);
  }

  std::vector<PyObject*> dicts_, objects_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<Entry> entries_;  // of all dictionaries
  std::vector<PyTypeObject*> types_;
};

inline void bind_guard(pybind11::module_& m) {
  pybind11::class_<Guard>(m, "Guard", pybind11::module_local(), "What dictionaries and the types of objects are now.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&>(), pybind11::arg("dicts"),
           pybind11::arg("objects"), "Borrows all of them, and what the dictionaries hold.")
      .def("holds", &Guard::holds, "Whether all are as they were.");
}

}  // namespace ghostfused
