// Small kernels for test_sass.py: each has one thing that the simulator must get right, or a planted fault that it must
// find.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// The first ``bytes`` of each lane's vector, then zeros.
template <int kSize>
__device__ void partial_copy(const char* in, char* out, int bytes) {
  extern __shared__ char vectors[];
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(vectors + threadIdx.x * kSize));
  const int own = bytes > 0 && threadIdx.x % 2 ? bytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(in + threadIdx.x * kSize), "n"(kSize),
               "r"(own));
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 0; i < kSize; ++i) out[threadIdx.x * kSize + i] = vectors[threadIdx.x * kSize + i];
}

extern "C" {

__global__ void integers(const int* a, const int* b, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t wide = int64_t{a[i]} * b[i];
  out[6 * i] = a[i] / b[i];
  out[6 * i + 1] = a[i] % b[i];
  out[6 * i + 2] = static_cast<int>(wide >> 32);
  out[6 * i + 3] = (a[i] >> (b[i] & 31)) ^ static_cast<int>(static_cast<unsigned>(a[i]) >> 7);
  out[6 * i + 4] = min(max(a[i], -5), b[i]) + __popc(a[i]) + __clz(b[i]);
  out[6 * i + 5] = static_cast<int>((wide + n) / 7);
}

__global__ void floats(const float* a, const float* b, float* out, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  out[4 * i] = a[i] / b[i];
  out[4 * i + 1] = sqrtf(fabsf(a[i])) + expf(b[i]);
  out[4 * i + 2] = fmaxf(a[i], 0.f) - fminf(b[i], 1.f);
  out[4 * i + 3] = truncf(a[i] * 100.f) + static_cast<float>(static_cast<int>(b[i] * 50.f));
}

__global__ void halves(const __half2* a, const __half2* b, __half2* out, __nv_bfloat162* wide) {
  const int i = threadIdx.x;
  out[2 * i] = __hfma2(a[i], b[i], a[i]);
  out[2 * i + 1] = __hmax2(__hadd2(a[i], b[i]), __hmul2(a[i], b[i]));
  wide[i] = __floats2bfloat162_rn(__low2float(a[i]) + 1.f, __high2float(b[i]) * 3.f);
}

// Lanes that leave a loop at different times, and a sum over the warp.
__global__ void divergence(const int* trips, int* out) {
  int sum = 0;
  for (int k = 0; k < trips[threadIdx.x]; ++k) sum += k & 1 ? 3 : threadIdx.x;
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  out[threadIdx.x] = sum;
}

// Some lanes of a warp leave for a slow division, whose code lies behind all else; then the warp goes on together, with
// a loop whose counter is the warp's own.
__global__ void slow_division(const float* a, const float* b, float* out, int n) {
  float sum = 0.f;
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    sum += a[k * 32 + threadIdx.x] / b[k * 32 + threadIdx.x];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}

__global__ void product(const __half* a, const __half* b, float* d) {  // 16 × 16 times 16 × 8, both with K adjacent
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const auto pair = [](const __half* p) { return *reinterpret_cast<const unsigned*>(p); };
  const unsigned a0 = pair(a + g * 16 + 2 * q), a1 = pair(a + (g + 8) * 16 + 2 * q);
  const unsigned a2 = pair(a + g * 16 + 2 * q + 8), a3 = pair(a + (g + 8) * 16 + 2 * q + 8);
  const unsigned b0 = pair(b + g * 16 + 2 * q), b1 = pair(b + g * 16 + 2 * q + 8);
  float c[4] = {};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  d[g * 8 + 2 * q] = c[0], d[g * 8 + 2 * q + 1] = c[1];
  d[(g + 8) * 8 + 2 * q] = c[2], d[(g + 8) * 8 + 2 * q + 1] = c[3];
}

// One word a lane, ``stride`` words apart.
__global__ void banks(int stride, float* out) {
  extern __shared__ volatile float words[];
  words[threadIdx.x * stride] = threadIdx.x;
  out[threadIdx.x] = words[threadIdx.x * stride];
}

__global__ void count(unsigned* counter, float* sum) {
  atomicAdd(counter, 1u);
  if (threadIdx.x % 2) atomicAdd(sum, 0.5f);
}

// Reverses a block's numbers by way of shared memory; the fault leaves the barrier out.
__global__ void reverse(const float* in, float* out, int synchronized) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = in[threadIdx.x];
  if (synchronized) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// The second half of the block hands numbers to the first, which waits for it at a barrier of its own.
__global__ void hand_over(const float* in, float* out, int waits) {
  extern __shared__ float shared[];
  if (threadIdx.x >= 32) {
    shared[threadIdx.x - 32] = in[threadIdx.x];
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    if (waits) asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = shared[threadIdx.x];
  }
}

// Two copies in flight; the fault doesn't wait for the second.
__global__ void copies(const float* in, float* out, int waits) {
  extern __shared__ float shared[];
  for (int k = 0; k < 2; ++k) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared + k * blockDim.x + threadIdx.x));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(in + k * blockDim.x + threadIdx.x));
    asm volatile("cp.async.commit_group;");
  }
  if (waits) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x ^ 32] + shared[blockDim.x + (threadIdx.x ^ 32)];
}

__global__ void partial_copy_4(const char* in, char* out, int bytes) { partial_copy<4>(in, out, bytes); }
__global__ void partial_copy_8(const char* in, char* out, int bytes) { partial_copy<8>(in, out, bytes); }
__global__ void partial_copy_16(const char* in, char* out, int bytes) { partial_copy<16>(in, out, bytes); }

__global__ void beyond(float* out, int at) { out[at] = 1.f; }

__global__ void beyond_shared(float* out, int at) {
  extern __shared__ float shared[];
  shared[at] = out[0];
  out[threadIdx.x] = shared[at];
}

__global__ void lonely_barrier(float* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
  out[threadIdx.x] = 1.f;
}

__global__ void endless(volatile int* flag) {
  while (*flag == 0) {
  }
}
}
