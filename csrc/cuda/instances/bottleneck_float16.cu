#include "cuda/bottleneck/bottleneck.cuh"

GHOSTFUSED_BOTTLENECK_KERNELS(Float16, "float16")
