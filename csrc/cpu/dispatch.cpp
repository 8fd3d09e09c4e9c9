// Which compilation of the kernels runs, and the scratch memory of their threads.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace ghostfused::cpu {

namespace {

bool always() { return true; }
#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Its registers are large: Linux hands them out to a process that asks.
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool is_made_by(unsigned signature) {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature;
}

// AMD's family 19h: those of it with AVX-512 are Zen 4.
bool is_amd_19h() {
  unsigned a, b, c, d;
  if (!is_made_by(signature_AMD_ebx)) return false;
  return __get_cpuid(1, &a, &b, &c, &d) && ((a >> 8) & 0xf) + ((a >> 20) & 0xff) == 0x19;
}
#elif defined(__aarch64__)
#ifdef __linux__
// the kernel's HWCAP_ASIMDFHM and HWCAP2_BF16
bool has_neon_fp16() { return getauxval(AT_HWCAP) >> 23 & 1; }
bool has_neon_bf16() { return has_neon_fp16() && (getauxval(AT_HWCAP2) >> 14 & 1); }
#ifdef GHOSTFUSED_SVE512
// HWCAP_SVE, and the bytes of a vector by PR_SVE_GET_VL: the system may have chosen fewer than the CPU has
bool has_sve512() { return (getauxval(AT_HWCAP) >> 22 & 1) && (prctl(51) & 0xffff) == 64; }
#endif
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_neon_fp16() { return has_feature("hw.optional.arm.FEAT_FHM"); }
bool has_neon_bf16() { return has_neon_fp16() && has_feature("hw.optional.arm.FEAT_BF16"); }
#else
bool has_neon_fp16() { return false; }
bool has_neon_bf16() { return false; }
#endif
#endif

}  // namespace

const Isa kIsas[] = {
    {"baseline", 4, always, &kBaseline},
#ifdef __x86_64__
    {"avx2", 8, has_avx2, &kAvx2},
    {"avx512vl", 8, has_avx512, &kAvx512vl},
    {"avx512vl_bf16", 8, has_avx512_bf16, &kAvx512vlBf16},
    {"avx512", 16, has_avx512, &kAvx512},
    {"avx512_bf16", 16, has_avx512_bf16, &kAvx512Bf16},
    {"avx512_amx", 16, has_amx, &kAvx512Amx, true},
#elif defined(__aarch64__)
    {"neon_fp16", 4, has_neon_fp16, &kNeonFp16},
    {"neon_bf16", 4, has_neon_bf16, &kNeonBf16},
#ifdef GHOSTFUSED_SVE512
    {"sve512", 16, has_sve512, &kSve512},
#endif
#endif
    {nullptr, 0, nullptr, nullptr},
};

const Isa* chosen_isa(const char** error) {
  struct Choice {
    const Isa* isa = nullptr;
    std::string error;
  };
  static const Choice choice = [] {
    Choice c;
    const char* name = std::getenv("GHOSTFUSED_CPU_ISA");
    if (name && *name) {
      for (const Isa* isa = kIsas; isa->name; ++isa) {
        if (std::strcmp(isa->name, name) == 0) c.isa = isa;
      }
      if (c.isa && c.isa->supported()) return c;
      c.error =
          std::string("GHOSTFUSED_CPU_ISA=") + name + (c.isa ? ": this CPU lacks it" : ": no such instruction set");
      c.isa = nullptr;
      return c;
    }
    int lanes = 16;
    bool (*skipped)() = nullptr;
#ifdef __x86_64__
    // Zen 4 executes a 512-bit instruction as two halves: the shorter vector wastes fewer lanes at a row's end
    if (is_amd_19h()) lanes = 8;
    // Intel's vdpbf16ps makes fewer products in a second than fp32's multiply-add: bf16 is faster widened
    if (is_made_by(signature_INTEL_ebx)) skipped = has_avx512_bf16;
#endif
    for (const Isa* isa = kIsas; isa->name; ++isa) {
      if (isa->lanes <= lanes && isa->supported != skipped && isa->supported()) c.isa = isa;
    }
    return c;
  }();
  *error = choice.error.c_str();
  return choice.isa;
}

float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  if (floats < 0 || floats > kMaxScratch) {
    throw std::runtime_error("x: a thread would need " + std::to_string(floats) +
                             " floats of scratch memory for such sizes, expected at most " +
                             std::to_string(kMaxScratch));
  }
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

}  // namespace ghostfused::cpu
