#include "cuda/bottleneck/bottleneck.cuh"

GHOSTFUSED_BOTTLENECK_KERNELS(BFloat16, "bfloat16")
