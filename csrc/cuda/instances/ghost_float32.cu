#include "cuda/ghost/forward.cuh"

GHOSTFUSED_KERNELS(Float32, "float32")
