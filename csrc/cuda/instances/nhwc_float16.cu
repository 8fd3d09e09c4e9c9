#include "cuda/ghost/nhwc/forward.cuh"

GHOSTFUSED_NHWC_KERNELS(Float16, "float16")
