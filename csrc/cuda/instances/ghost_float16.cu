#include "cuda/ghost/forward.cuh"

GHOSTFUSED_KERNELS(Float16, "float16")
