#include "cuda/ghost/forward.cuh"

GHOSTFUSED_FLOAT_KERNELS(Float32, "float32")
