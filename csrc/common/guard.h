// Whether Python objects and dictionaries are as they were: ghostfused/nn/cache.py asks at every call of a network,
// about thousands of dictionaries, which have left the caches since the last.
//
// Up to Python 3.11 a dictionary has a version (PEP 509), another number after every change. Python 3.12 tells a
// watcher of each change as it happens, and then nothing of the dictionaries need be read. Later Pythons don't tell it
// of attributes that are set on an object, so that there objects' own dictionaries are compared. Neither is in the
// limited API: what this file knows of it holds for the versions of ThisPython, and of others contents are compared.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "common/python.h"

namespace ghostfused {

struct ThisPython {
  static inline const unsigned long minor = Py_Version >> 24 == 3 ? Py_Version >> 16 & 0xff : 0;
  static inline const bool has_versions = minor == 11, knows_layout = minor >= 11 && minor <= 13;
  static inline const bool watches = minor == 12 || minor == 13, watches_objects = minor == 12;
  static inline const bool has_inline_values = minor == 13;
};

// A dictionary's first members. Python 3.12 and later have another number in place of the version.
struct DictHead {
  PyObject_HEAD;
  Py_ssize_t used;
  uint64_t version;
  const char *keys, *values;

  static const DictHead& of(PyObject* dict) { return *reinterpret_cast<const DictHead*>(dict); }
};

// Python 3.13's values of an object's attributes, which lie behind the object, and which its dictionary shares. The
// slots' names are those of the dictionary's ``keys``.
struct InlineValues {
  uint8_t capacity, size, embedded, valid;
  PyObject* slots[1];

  // Those of ``dict``, if it has them.
  static const InlineValues* of(PyObject* dict) {
    const auto values = reinterpret_cast<const InlineValues*>(DictHead::of(dict).values);
    return ThisPython::has_inline_values && values && values->embedded && values->valid ? values : nullptr;
  }
};

// Python's watchers of dictionaries; none where it has none.
class Watcher {
 public:
  using Callback = int (*)(int event, PyObject* dict, PyObject* key, PyObject* value);
  static constexpr int kDeallocated = 5;

  explicit Watcher(Callback on_change) {
    if (!ThisPython::watches) return;
    const auto add = reinterpret_cast<int (*)(Callback)>(dlsym(RTLD_DEFAULT, "PyDict_AddWatcher"));
    watch_ = reinterpret_cast<Call>(dlsym(RTLD_DEFAULT, "PyDict_Watch"));
    unwatch_ = reinterpret_cast<Call>(dlsym(RTLD_DEFAULT, "PyDict_Unwatch"));
    if (!add || !watch_ || !unwatch_) return;
    id_ = add(on_change);
    if (id_ < 0) PyErr_Clear();  // others have taken all: then contents are compared
  }
  bool works() const { return id_ >= 0; }
  bool watch(PyObject* dict) const { return done(watch_(id_, dict)); }
  bool unwatch(PyObject* dict) const { return done(unwatch_(id_, dict)); }

 private:
  using Call = int (*)(int id, PyObject* dict);
  static bool done(int status) {
    if (status < 0) PyErr_Clear();
    return status >= 0;
  }

  Call watch_ = nullptr, unwatch_ = nullptr;
  int id_ = -1;
};

// Everything is borrowed: whoever holds a Guard keeps the dictionaries, what was in them, the objects, and what is read
// of owners alive. The root is an object that is named anew at each question, for who keeps the Guard belongs to it.
class Guard {
 public:
  // An object, two lists, and one of triples: an owner, a name, and the value of that name, ``absent`` if it has none.
  Guard(PyObject* root, PyObject* dicts, PyObject* objects, PyObject* reads, PyObject* absent) : absent_(absent) {
    for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
      PyObject* dict = PyList_GetItem(dicts, i);
      if (!PyDict_Check(dict)) throw py::value_error("dicts: expected dictionaries");
      add(dict);
    }
    const py::object root_dict(PyObject_GenericGetDict(root, nullptr));
    root_ = {root_dict.ptr(), Py_TYPE(root)};
    add(root_dict.ptr());
    dicts_.push_back({nullptr, 0, entries_.size(), nullptr, nullptr, slots_.size()});
    for (Py_ssize_t i = 0; i < PyList_Size(objects); ++i) {
      PyObject* object = PyList_GetItem(objects, i);
      if (static_cast<size_t>(i) >= count()) throw py::value_error("dicts: expected one for each of the objects");
      objects_.push_back({object, Py_TYPE(object), place_of_dict(object, dicts_[i].dict)});
    }
    for (Py_ssize_t i = 0; i < PyList_Size(reads); ++i) {
      Read read;
      if (!PyArg_ParseTuple(PyList_GetItem(reads, i), "OUO", &read.owner, &read.name, &read.value))
        throw py::error_already_set();
      reads_.push_back(read);
    }
    watch();
  }
  ~Guard() { unwatch(); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  bool dicts_hold() {
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) {
        __builtin_prefetch(objects_[i + kAhead].place_of_dict);
        __builtin_prefetch(objects_[i + kAhead].object);
      }
      const auto& [object, type, place] = objects_[i];
      if (Py_TYPE(object) != type) return false;
      if (place ? *place != dicts_[i].dict : !has_dict(object, dicts_[i].dict)) return false;
    }
    const size_t unwatched = ThisPython::watches_objects ? 0 : objects_.size();
    const size_t asked = watched_ && !changed_ ? unwatched : count();
    changed_ = false;  // a change from here on is seen again
    for (size_t i = 0; i < asked; ++i) {
      prefetch(i);
      if (!dict_holds(i)) {
        changed_ = true;
        return false;
      }
    }
    return true;
  }

  // One question for all, from Python.
  bool holds(PyObject* root) { return dicts_hold() && root_holds(root) && reads_hold(); }

 private:
  // Whether the root's class and attributes are the objects that they were.
  bool root_holds(PyObject* root) {
    return Py_TYPE(root) == root_.type && has_dict(root, root_.dict) && dict_holds(count());
  }

  // Whether what is read of owners are the objects that they were. It may run their code.
  bool reads_hold() const {
    return std::all_of(reads_.begin(), reads_.end(), [this](const Read& read) { return read_holds(read); });
  }

  struct Entry {
    PyObject *key, *value;
  };
  struct Dict {
    PyObject* dict;
    uint64_t version;
    size_t first;  // of its entries
    const char* keys;
    const InlineValues* values;
    size_t first_slot;
  };
  struct Object {
    PyObject* object;
    PyTypeObject* type;
    PyObject* const* place_of_dict;
  };
  struct Root {
    PyObject* dict;
    PyTypeObject* type;
  };
  struct Read {
    PyObject *owner, *name, *value;
  };
  static constexpr size_t kAhead = 24;
  static constexpr unsigned long kManagedDict = 1 << 4;  // Py_TPFLAGS_MANAGED_DICT, which the limited API lacks

  size_t count() const { return dicts_.size() - 2; }  // of dictionaries, without the root's and the end

  void add(PyObject* dict) {
    const InlineValues* const values = InlineValues::of(dict);
    dicts_.push_back({dict, version(dict), entries_.size(), DictHead::of(dict).keys, values, slots_.size()});
    if (values) slots_.insert(slots_.end(), values->slots, values->slots + values->capacity);
    Py_ssize_t position = 0;
    Entry entry;
    while (PyDict_Next(dict, &position, &entry.key, &entry.value)) entries_.push_back(entry);
  }

  bool dict_holds(size_t i) {
    const uint64_t now = version(dicts_[i].dict);
    if (now != 0 && now == dicts_[i].version) return true;
    if (!has_its_slots(i) && !has_its_entries(i)) return false;
    dicts_[i].version = now;
    return true;
  }

  bool read_holds(const Read& read) const {
    const bool is_dict = PyDict_CheckExact(read.owner);
    PyObject* const now =
        is_dict ? Py_XNewRef(PyDict_GetItemWithError(read.owner, read.name)) : PyObject_GetAttr(read.owner, read.name);
    if (now) {
      Py_DECREF(now);
      return now == read.value;
    }
    // an empty cell raises ValueError
    const bool none =
        !PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_ValueError);
    PyErr_Clear();
    return none && read.value == absent_;
  }

  size_t slot_bytes(size_t i) const { return (dicts_[i + 1].first_slot - dicts_[i].first_slot) * sizeof(PyObject*); }

  // Whether its values are inline and the same, which is quick to see, save for the order in which they were set.
  bool has_its_slots(size_t i) const {
    const Dict& then = dicts_[i];
    if (!then.values || InlineValues::of(then.dict) != then.values || DictHead::of(then.dict).keys != then.keys)
      return false;
    return std::memcmp(then.values->slots, &slots_[then.first_slot], slot_bytes(i)) == 0;
  }

  // Where Python has the address of the object's __dict__, which is ``dict``: before the object, if its class lets
  // Python manage it. Otherwise null, and Python is asked, which makes a reference, a write to each dictionary.
  static PyObject* const* place_of_dict(PyObject* object, PyObject* dict) {
    if (!ThisPython::knows_layout || !(PyType_GetFlags(Py_TYPE(object)) & kManagedDict)) return nullptr;
    PyObject* const* const place = reinterpret_cast<PyObject* const*>(object) - 3;
    return *place == dict ? place : nullptr;
  }

  // Whether ``dict`` is the object's __dict__.
  static bool has_dict(PyObject* object, PyObject* dict) {
    PyObject* const now = PyObject_GenericGetDict(object, nullptr);
    if (!now) PyErr_Clear();
    Py_XDECREF(now);
    return now == dict;
  }

  static uint64_t version(PyObject* dict) { return ThisPython::has_versions ? DictHead::of(dict).version : 0; }

  // The guards of each watched dictionary, by its address. All calls hold the GIL.
  using Watching = std::unordered_map<PyObject*, std::vector<Guard*> >;
  static Watching& watching() {
    static Watching* const watching = new Watching;  // never freed: dictionaries may outlive all else at exit
    return *watching;
  }

  static int on_change(int event, PyObject* dict, PyObject*, PyObject*) {
    const auto found = watching().find(dict);
    if (found == watching().end()) return 0;
    for (Guard* guard : found->second) guard->changed_ = true;
    if (event == Watcher::kDeallocated) watching().erase(found);
    return 0;
  }

  static const Watcher& watcher() {
    static const Watcher watcher(&on_change);
    return watcher;
  }

  void watch() {
    if (!watcher().works()) return;
    watched_ = true;
    for (size_t i = 0; i < count(); ++i) {
      watching()[dicts_[i].dict].push_back(this);
      if (!watcher().watch(dicts_[i].dict)) watched_ = false;
    }
  }

  void unwatch() {
    if (!watcher().works()) return;
    for (size_t i = 0; i < count(); ++i) {
      const auto found = watching().find(dicts_[i].dict);
      if (found == watching().end()) continue;  // it has gone, or is a dictionary twice
      auto& guards = found->second;
      guards.erase(std::remove(guards.begin(), guards.end(), this), guards.end());
      if (!guards.empty()) continue;
      watcher().unwatch(dicts_[i].dict);
      watching().erase(found);
    }
  }

  bool has_its_entries(size_t i) const {
    const Entry *entry = &entries_[dicts_[i].first], *end = entry + (dicts_[i + 1].first - dicts_[i].first);
    if (PyDict_Size(dicts_[i].dict) != end - entry) return false;
    Py_ssize_t position = 0;
    for (Entry now; PyDict_Next(dicts_[i].dict, &position, &now.key, &now.value); ++entry) {
      if (now.key != entry->key || now.value != entry->value) return false;
    }
    return true;
  }

  // The head of a dictionary to come, and the tables of one that comes earlier, whose head is here by now.
  void prefetch(size_t i) const {
    if (const char* slots; i + kAhead < count() && (slots = reinterpret_cast<const char*>(dicts_[i + kAhead].values))) {
      __builtin_prefetch(dicts_[i + kAhead].dict);
      for (size_t at = 0; at < slot_bytes(i + kAhead) + 64; at += 64) __builtin_prefetch(slots + at);
      return;
    }
    if (i + 2 * kAhead < count()) __builtin_prefetch(dicts_[i + 2 * kAhead].dict);
    if (i + kAhead >= count()) return;
    if (ThisPython::has_versions || !ThisPython::knows_layout) return;
    const auto& [base, used, number, keys, values] = DictHead::of(dicts_[i + kAhead].dict);
    for (int line = 0; line < 7; ++line) __builtin_prefetch(keys + 64 * line);
    for (int line = 0; values && line < 3; ++line) __builtin_prefetch(values + 64 * line);
  }

  std::vector<Dict> dicts_;  // first the objects' own, in their order; at last the root's, and one more as the end
  std::vector<Entry> entries_;
  std::vector<PyObject*> slots_;  // of inline values; those that are empty are null
  std::vector<Object> objects_;
  std::vector<Read> reads_;
  Root root_;
  PyObject* absent_;
  bool watched_ = false, changed_ = false;
};

// The guard as Python's objects have it.
struct GuardObject {
  PyObject_HEAD;
  Guard* guard;

  static PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
    return py::guarded([&] {
      PyObject *root, *dicts, *objects, *reads, *absent;
      PyTypeObject* const list = &PyList_Type;
      if (!PyArg_ParseTuple(args, "OO!O!O!O", &root, list, &dicts, list, &objects, list, &reads, &absent))
        throw py::error_already_set();
      auto guard = std::make_unique<Guard>(root, dicts, objects, reads, absent);
      py::object self(PyType_GenericAlloc(type, 0));
      reinterpret_cast<GuardObject*>(self.ptr())->guard = guard.release();
      return self.release();
    });
  }

  static void free(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    delete reinterpret_cast<GuardObject*>(self)->guard;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
  }

  static Guard& of(PyObject* self) { return *reinterpret_cast<GuardObject*>(self)->guard; }
  static PyObject* holds(PyObject* self, PyObject* root) { return PyBool_FromLong(of(self).holds(root)); }
  static PyObject* dicts_hold(PyObject* self, PyObject*) { return PyBool_FromLong(of(self).dicts_hold()); }
};

inline void bind_guard(py::module_& m) {
  static PyMethodDef methods[] = {
      {"holds", &GuardObject::holds, METH_O, "Whether all are the same objects, of this root too."},
      {"dicts_hold", &GuardObject::dicts_hold, METH_NOARGS,
       "Whether those of the lists of dictionaries and objects are."},
      {}};
  static constexpr const char* doc =
      "Guard(root, dicts, objects, reads, absent): what dictionaries, the types of objects, and reads, which are "
      "(owner, "
      "name, value or absent), are now; the first dictionaries are the objects' own. Borrows all, and what they hold.";
  PyType_Slot slots[] = {{Py_tp_doc, const_cast<char*>(doc)},
                         {Py_tp_new, reinterpret_cast<void*>(&GuardObject::make)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(&GuardObject::free)},
                         {Py_tp_methods, methods},
                         {}};
  PyType_Spec spec{"ghostfused.Guard", sizeof(GuardObject), 0, Py_TPFLAGS_DEFAULT, slots};
  m.add("Guard", py::object(PyType_FromSpec(&spec)));
}

}  // namespace ghostfused
