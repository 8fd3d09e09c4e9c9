#include "cuda/ghost/nhwc/forward.cuh"

GHOSTFUSED_NHWC_KERNELS(BFloat16, "bfloat16")
