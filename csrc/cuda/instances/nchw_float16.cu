#include "cuda/ghost/nchw/forward.cuh"

GHOSTFUSED_NCHW_KERNELS(Float16, "float16")
