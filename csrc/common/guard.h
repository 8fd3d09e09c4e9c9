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
    for (const auto& each : dicts) {
      PyObject* dict = each.cast<pybind11::dict>().ptr();
      dicts_.push_back({dict, version(dict), entries_.size()});
      Py_ssize_t position = 0;
      Entry entry;
      while (PyDict_Next(dict, &position, &entry.key, &entry.value)) entries_.push_back(entry);
    }
    dicts_.push_back({nullptr, 0, entries_.size()});
    for (const auto& object : objects) objects_.push_back({object.ptr(), Py_TYPE(object.ptr())});
  }

  bool holds() const {
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) __builtin_prefetch(objects_[i + kAhead].object);
      if (Py_TYPE(objects_[i].object) != objects_[i].type) return false;
    }
    for (size_t i = 0; i + 1 < dicts_.size(); ++i) {
      prefetch(i);
      const uint64_t now = version(dicts_[i].dict);
      if ((now == 0 || now != dicts_[i].version) && !has_its_entries(i)) return false;
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

  // Another number after every change of the dictionary (PEP 509), which newer Pythons no longer promise; else 0.
  static uint64_t version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030c0000
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
    return 0;
#endif
  }

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

  std::vector<Dict> dicts_;  // and one more after the last
  std::vector<Entry> entries_;
  std::vector<Object> objects_;
};

inline void bind_guard(pybind11::module_& m) {
  pybind11::class_<Guard>(m, "Guard", pybind11::module_local(), "What dictionaries and the types of objects are now.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&>(), pybind11::arg("dicts"),
           pybind11::arg("objects"), "Borrows all of them, and what the dictionaries hold.")
      .def("holds", &Guard::holds, "Whether all are as they were.");
}

}  // namespace ghostfused
