#include "cuda/ghost/nhwc.cuh"

GHOSTFUSED_NHWC_KERNELS(BFloat16, "bfloat16")
