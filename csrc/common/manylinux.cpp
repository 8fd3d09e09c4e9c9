// Keeps the extensions to the symbols that manylinux_2_28 has, whatever this machine's glibc and libstdc++ add: what a
// newer compiler asks for beyond them is defined here, and csrc/exports.map keeps it inside.
// tests/packaging/test_symbols.py tells when there is more.
#include <exception>
#include <new>
#include <sstream>

#if defined(__x86_64__)
#define OLDEST_GLIBC "GLIBC_2.2.5"
#else  // aarch64
#define OLDEST_GLIBC "GLIBC_2.17"
#endif

// glibc 2.32: without threads atomic operations may be left out; they are not.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

// glibc 2.34 has it in libc, which makes it a new version of the symbol. The linker's --wrap sends all calls here.
extern "C" void* oldest_dlsym(void* handle, const char* name);
__asm__(".symver oldest_dlsym, dlsym@" OLDEST_GLIBC);
extern "C" void* __wrap_dlsym(void* handle, const char* name) { return oldest_dlsym(handle, name); }

// libstdc++ 9 and 11: constructors without arguments, and str() that differs by what it is called on.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// libstdc++ 11.
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// libstdc++ 11 makes copies in the caller, by these two; here by the copies that all versions have.
extern "C" void copy_exception(void* to,
                               const std::exception_ptr* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy_exception(std::exception_ptr* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

void std::__exception_ptr::exception_ptr::_M_addref() noexcept {
  void* copy;  // never destroyed: it leaves its reference behind
  copy_exception(&copy, this);
}

void std::__exception_ptr::exception_ptr::_M_release() noexcept {
  destroy_exception(this);
  _M_exception_object = nullptr;
}
