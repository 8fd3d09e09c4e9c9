// A forward kernel of each family, and those of other kinds that need the most registers for what they may have, for
// test_cuda_architectures.py: all kernels take minutes for one architecture.
#include "cuda/bottleneck/bottleneck.cuh"
#include "cuda/ghost/forward.cuh"
#include "cuda/ghost/nchw/forward.cuh"
#include "cuda/ghost/nhwc/forward.cuh"
#include "cuda/training/pixels.cuh"

namespace ghostfused {
const void* const kernels[] = {
    kernel<Path::kFloat16, 0, true>(),
    nhwc_kernel<Path::kFloat16, 1, 3, Epilogue::kNone>(),
    nhwc_kernel<Path::kBFloat16, 2, 3, Epilogue::kReLU>(),
    nhwc_kernel<Path::kFloat16, 2, 1, Epilogue::kAny>(),
    nchw_kernel<Path::kFloat16, NchwMap::kFourteen, 2, 3, false>(),
    nchw_kernel<Path::kTF32, NchwMap::kWide4, 2, 3, false>(),
    nchw_kernel<Path::kFloat32, NchwMap::kWide4, 2, 3, true>(),
    nchw_kernel<Path::kFloat16, NchwMap::kWide4, 2, 5, true>(),  // with 3×3 primary convs
    depthwise_kernel<Path::kFloat16, 5, 2, true>(),
    excite_kernel<Path::kFloat16>(),
    reinterpret_cast<const void*>(&normalize_pixels<Path::kFloat16, 8>),
};
}  // namespace ghostfused
