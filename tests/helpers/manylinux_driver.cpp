// csrc/common/manylinux.cpp's own copies of what libstdc++ and glibc have: pointers to exceptions are counted, streams
// write.
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

struct Counted : std::runtime_error {
  static inline int alive = 0;
  explicit Counted(const char* what) : std::runtime_error(what) { ++alive; }
  Counted(const Counted& other) : std::runtime_error(other) { ++alive; }
  ~Counted() override { --alive; }
};

bool check(bool ok, const char* what) {
  if (!ok) std::printf("wrong: %s\n", what);
  return ok;
}

int main() {
  bool ok = true;
  {
    std::exception_ptr error;
    try {
      throw Counted("asked for");
    } catch (...) {
      error = std::current_exception();
    }
    ok &= check(Counted::alive == 1, "kept after the handler");
    std::vector<std::exception_ptr> copies(100, error);
    error = nullptr;
    copies.resize(1);
    ok &= check(Counted::alive == 1, "kept by one copy");
    try {
      std::rethrow_exception(copies[0]);
    } catch (const Counted& again) {
      ok &= check(std::string(again.what()) == "asked for", "thrown again");
    }
    copies[0] = nullptr;
    ok &= check(Counted::alive == 0, "freed with the last copy");
  }
  std::ostringstream out;
  out << "x: " << 1.5 << ' ' << 7;
  ok &= check(out.str() == "x: 1.5 7" && std::move(out).str() == "x: 1.5 7", "a stream's text");
  ok &= check(dlsym(RTLD_DEFAULT, "main") == nullptr && dlsym(RTLD_DEFAULT, "malloc") != nullptr, "dlsym");
  try {
    volatile size_t count = -1;
    delete[] new double[count];
    ok = check(false, "no array is that long");
  } catch (const std::bad_alloc&) {
  }
  return ok ? 0 : 1;
}
