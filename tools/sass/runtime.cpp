// Takes libcudart's place under PyTorch (LD_PRELOAD): one device with an H100's limits, whose memory is the host's and
// whose launches go to a callback instead of a GPU. Fresh memory is full of one byte, by default NaN, each tensor lies
// between pages that nothing may touch, and no address is given twice. Work is done when a call returns, so streams and
// events are names only.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#undef cudaGetDeviceProperties

namespace {

constexpr int kSms = 132, kSmemPerBlock = 232448, kSmemPerSm = 233472;
constexpr size_t kArena = size_t{1} << 38, kPage = 4096, kFilling = size_t{1} << 26;

using Callback = void (*)(const char* name, const unsigned* grid, const unsigned* block, unsigned smem, void** args);
using Allocations = std::map<uintptr_t, size_t>;

struct Configuration {
  dim3 grid, block;
  size_t smem;
  void* stream;
};

// Never destroyed: PyTorch frees memory while the program ends.
std::map<const void*, std::string>& names = *new std::map<const void*, std::string>;
Allocations& allocations = *new Allocations;
std::vector<Configuration>& configurations = *new std::vector<Configuration>;
Callback on_launch = nullptr;
cudaError_t last = cudaSuccess;
int handle;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

char* arena() {
  static char* const start =
      static_cast<char*>(mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return start;
}

int fill = 0xff;

// A file of that byte: its private mappings cost memory only where they are written.
int filling() {
  static std::map<int, int>& files = *new std::map<int, int>;
  const auto found = files.find(fill);
  if (found != files.end()) return found->second;
  const int file = memfd_create("filling", 0);
  const std::vector<char> bytes(kFilling, static_cast<char>(fill));
  if (file < 0 || write(file, bytes.data(), kFilling) != static_cast<ssize_t>(kFilling)) std::abort();
  return files[fill] = file;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t smem) {
  const auto found = names.find(function);
  if (found == names.end() || on_launch == nullptr) return result(cudaErrorInvalidDeviceFunction);
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || smem > kSmemPerBlock) {
    return result(cudaErrorInvalidConfiguration);
  }
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  on_launch(found->second.c_str(), g, b, static_cast<unsigned>(smem), args);
  return cudaSuccess;
}

bool is_device(const void* p) {
  auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(p));
  if (after == allocations.begin()) return false;
  --after;
  return reinterpret_cast<uintptr_t>(p) < after->first + after->second;
}

template <class T>
cudaError_t answer(T* out, T value) {
  if (out) *out = value;
  return cudaSuccess;
}

}  // namespace

// For the simulator.
API void sass_on_launch(Callback callback) { on_launch = callback; }
API void* sass_arena(size_t* bytes) {
  *bytes = kArena;
  return arena();
}
API void sass_fill(int byte) { fill = byte; }
API size_t sass_allocations(size_t capacity, uintptr_t* starts, size_t* sizes) {
  size_t n = 0;
  for (const auto& [start, size] : allocations) {
    if (n < capacity) starts[n] = start, sizes[n] = size;
    ++n;
  }
  return n;
}

// Kernels and launches.
API void** __cudaRegisterFatBinary(void*) {
  static void* h[1];
  return h;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 0; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  names[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, void* stream) {
  configurations.push_back({grid, block, smem, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *smem = c.smem, *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  return answer(kernel, const_cast<void*>(function));
}
API cudaError_t __cudaLaunchKernel(void* f, dim3 grid, dim3 block, void** args, size_t smem, void*) {
  return launch(f, grid, block, args, smem);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t smem, cudaStream_t) {
  return launch(f, grid, block, args, smem);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes);
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  std::memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return answer(n, 1);
}

// Memory.
API cudaError_t cudaMalloc(void** out, size_t bytes) {
  static size_t used = kPage;
  const size_t size = bytes ? bytes : 1, pages = (size + kPage - 1) / kPage * kPage;
  if (used + pages + kPage > kArena) return result(cudaErrorMemoryAllocation);
  char* const start = arena() + used;
  for (size_t at = 0; at < pages; at += kFilling) {
    const size_t part = pages - at < kFilling ? pages - at : kFilling;
    if (mmap(start + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, filling(), 0) ==
        MAP_FAILED) {
      return result(cudaErrorMemoryAllocation);
    }
  }
  used += pages + kPage;
  allocations[reinterpret_cast<uintptr_t>(start)] = size;
  *out = start;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(p));
  if (found == allocations.end()) return cudaSuccess;
  mmap(p, (found->second + kPage - 1) / kPage * kPage, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  allocations.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  return posix_memalign(p, 512, n ? n : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  std::memcpy(to, from, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, n);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* p, int value, size_t n) {
  std::memset(p, value, n);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
  std::memset(p, value, n);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  answer(free, size_t{72} << 30);
  return answer(total, size_t{80} << 30);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::memset(a, 0, sizeof *a);
  const bool inside = is_device(p);
  a->type = inside ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (inside) a->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}

// The device.
API cudaError_t cudaGetDevice(int* device) { return answer(device, 0); }
API cudaError_t cudaSetDevice(int) { return cudaSuccess; }
API cudaError_t cudaGetDeviceCount(int* n) { return answer(n, 1); }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return answer(value, kSms);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return answer(value, kSmemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return answer(value, kSmemPerSm);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return answer(value, 49152);
    case cudaDevAttrComputeCapabilityMajor:
      return answer(value, 9);
    case cudaDevAttrWarpSize:
      return answer(value, 32);
    case cudaDevAttrMaxThreadsPerBlock:
      return answer(value, 1024);
    default:
      return answer(value, 0);
  }
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, "sm_90 machine code on the CPU");
  p->totalGlobalMem = size_t{80} << 30;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = kSmemPerBlock;
  p->sharedMemPerMultiprocessor = kSmemPerSm;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = kSms;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->totalConstMem = 65536;
  p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = 1;
  p->textureAlignment = 512;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* p, int d) { return cudaGetDeviceProperties(p, d); }
API cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) { return answer(value, 0); }
API cudaError_t cudaDeviceGetPCIBusId(char* out, int n, int) {
  std::snprintf(out, static_cast<size_t>(n), "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) { return answer(v, CUDART_VERSION); }
API cudaError_t cudaRuntimeGetVersion(int* v) { return answer(v, CUDART_VERSION); }
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** p, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
  answer(r, cudaDriverEntryPointSymbolNotFound);
  return answer<void*>(p, nullptr);
}

// Errors.
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaError"; }
API const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess                      ? "no error"
         : e == cudaErrorInvalidConfiguration  ? "invalid configuration argument"
         : e == cudaErrorInvalidDeviceFunction ? "invalid device function"
                                               : "CUDA error";
}

// Streams and events.
API cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  answer(low, 0);
  return answer(high, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return answer(s, reinterpret_cast<cudaStream_t>(&handle)); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  return answer(s, cudaStreamCaptureStatusNone);
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long*, cudaGraph_t*,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return answer(s, cudaStreamCaptureStatusNone);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return answer(e, reinterpret_cast<cudaEvent_t>(&handle)); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return answer(ms, 0.0f); }
