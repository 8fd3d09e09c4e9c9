// Whether Python objects and dictionaries are as they were: ghostfused/nn/cache.py asks at every call of a network, about
// thousands of dictionaries, which have left the caches since the last.
//
// Up to Python 3.11 a dictionary has a version (PEP 509), another number after every change. Python 3.12 tells a
// watcher of each change as it happens, and then nothing of the dictionaries need be read. Later Pythons don't tell it
// of attributes that are set on an object, so that there objects' own dictionaries are compared.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace ghostfused {

// Everything is borrowed: whoever holds a Guard keeps the dictionaries, what was in them, and the objects alive.
class Guard {
 public:
  Guard(const pybind11::list& dicts, const pybind11::list& objects) {
    for (const auto& each : dicts) {
      PyObject* dict = each.cast<pybind11::dict>().ptr();
      dicts_.push_back({dict, version(dict), entries_.size()});
      Py_ssize_t position = 0;
      Entry entry;
      while (PyDict_Next(dict, &position, &entry.key, &entry.value)) entries_.push_back(entry);
    }
    dicts_.push_back({nullptr, 0, entries_.size()});
    for (const auto& object : objects) objects_.push_back({object.ptr(), Py_TYPE(object.ptr())});
    if (objects_.size() >= dicts_.size()) throw pybind11::value_error("dicts: expected one for each of the objects");
    watch();
  }
  ~Guard() { unwatch(); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  bool holds() {
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) __builtin_prefetch(objects_[i + kAhead].object);
      if (Py_TYPE(objects_[i].object) != objects_[i].type || !has_dict(objects_[i].object, dicts_[i].dict))
        return false;
    }
    const size_t all = dicts_.size() - 1, unwatched = kWatchesObjects ? 0 : objects_.size();
    const size_t count = watched_ && !changed_ ? unwatched : all;
    changed_ = false;  // a change from here on is seen again
    for (size_t i = 0; i < count; ++i) {
      prefetch(i);
      const uint64_t now = version(dicts_[i].dict);
      if (now != 0 && now == dicts_[i].version) continue;
      if (!has_its_entries(i)) {
        changed_ = true;
        return false;
      }
      dicts_[i].version = now;
    }
    return true;
  }

 private:
  struct Entry {
    PyObject *key, *value;
  };
  struct Dict {
    PyObject* dict;
    uint64_t version;
    size_t first;  // of its entries
  };
  struct Object {
    PyObject* object;
    PyTypeObject* type;
  };
  static constexpr size_t kAhead = 24;
  static constexpr bool kWatchesObjects = PY_VERSION_HEX < 0x030d0000;

  // Whether ``dict`` is the object's __dict__.
  static bool has_dict(PyObject* object, PyObject* dict) {
    PyObject* const now = PyObject_GenericGetDict(object, nullptr);
    if (!now) PyErr_Clear();
    Py_XDECREF(now);
    return now == dict;
  }

#if PY_VERSION_HEX < 0x030c0000
  static uint64_t version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
  void watch() {}
  void unwatch() {}
#else
  static uint64_t version(PyObject*) { return 0; }

  // The guards of each watched dictionary, by its address. All calls hold the GIL.
  using Watching = std::unordered_map<PyObject*, std::vector<Guard*> >;
  static Watching& watching() {
    static Watching* const watching = new Watching;  // never freed: dictionaries may outlive all else at exit
    return *watching;
  }

  static int on_change(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
    const auto found = watching().find(dict);
    if (found == watching().end()) return 0;
    for (Guard* guard : found->second) guard->changed_ = true;
    if (event == PyDict_EVENT_DEALLOCATED) watching().erase(found);
    return 0;
  }

  static int watcher() {
    static const int id = PyDict_AddWatcher(&on_change);
    if (id < 0) PyErr_Clear();  // others have taken all: then contents are compared
    return id;
  }

  void watch() {
    if (watcher() < 0) return;
    watched_ = true;
    for (size_t i = 0; i + 1 < dicts_.size(); ++i) {
      watching()[dicts_[i].dict].push_back(this);
      if (PyDict_Watch(watcher(), dicts_[i].dict) < 0) {
        PyErr_Clear();
        watched_ = false;
      }
    }
  }

  void unwatch() {
    if (watcher() < 0) return;
    for (size_t i = 0; i + 1 < dicts_.size(); ++i) {
      const auto found = watching().find(dicts_[i].dict);
      if (found == watching().end()) continue;  // it has gone, or is a dictionary twice
      auto& guards = found->second;
      guards.erase(std::remove(guards.begin(), guards.end(), this), guards.end());
      if (!guards.empty()) continue;
      if (PyDict_Unwatch(watcher(), dicts_[i].dict) < 0) PyErr_Clear();
      watching().erase(found);
    }
  }
#endif

  bool has_its_entries(size_t i) const {
    const Entry *entry = &entries_[dicts_[i].first], *end = entry + (dicts_[i + 1].first - dicts_[i].first);
    if (PyDict_GET_SIZE(dicts_[i].dict) != end - entry) return false;
    Py_ssize_t position = 0;
    for (Entry now; PyDict_Next(dicts_[i].dict, &position, &now.key, &now.value); ++entry) {
      if (now.key != entry->key || now.value != entry->value) return false;
    }
    return true;
  }

  // The head of a dictionary to come, and the tables of one that comes earlier, whose head is here by now.
  void prefetch(size_t i) const {
    if (i + 2 * kAhead < dicts_.size()) __builtin_prefetch(dicts_[i + 2 * kAhead].dict);
    if (i + kAhead + 1 >= dicts_.size()) return;
    const auto* dict = reinterpret_cast<const PyDictObject*>(dicts_[i + kAhead].dict);
    if (version(dicts_[i + kAhead].dict)) return;
    const char *keys = reinterpret_cast<const char*>(dict->ma_keys),
               *values = reinterpret_cast<const char*>(dict->ma_values);
    for (int line = 0; line < 7; ++line) __builtin_prefetch(keys + 64 * line);
    for (int line = 0; values && line < 3; ++line) __builtin_prefetch(values + 64 * line);
  }

  std::vector<Dict> dicts_;  // first the objects' own, in their order, and one more after the last
  std::vector<Entry> entries_;
  std::vector<Object> objects_;
  bool watched_ = false, changed_ = false;
};

inline void bind_guard(pybind11::module_& m) {
  pybind11::class_<Guard>(
      m, "Guard", pybind11::module_local(),
      "What dictionaries and the types of objects are now; the first dictionaries are the objects' own.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&>(), pybind11::arg("dicts"),
           pybind11::arg("objects"), "Borrows all of them, and what the dictionaries hold.")
      .def("holds", &Guard::holds, "Whether all are as they were.");
}

}  // namespace ghostfused
