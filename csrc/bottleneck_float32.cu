#include "bottleneck.cuh"

GHOSTFUSED_BOTTLENECK_KERNELS(Float32, "float32")
