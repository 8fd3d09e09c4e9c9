#include "bottleneck.cuh"

GHOSTFUSED_BOTTLENECK_KERNELS(Float16, "float16")
