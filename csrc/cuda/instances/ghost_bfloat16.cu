#include "cuda/ghost/forward.cuh"

GHOSTFUSED_KERNELS(BFloat16, "bfloat16")
