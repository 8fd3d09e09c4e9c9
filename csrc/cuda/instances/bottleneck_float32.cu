#include "cuda/bottleneck/bottleneck.cuh"

GHOSTFUSED_BOTTLENECK_KERNELS(Float32, "float32")
