#include "cuda/ghost/nchw/forward.cuh"

GHOSTFUSED_NCHW_KERNELS(BFloat16, "bfloat16")
