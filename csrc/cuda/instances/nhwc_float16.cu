#include "cuda/ghost/nhwc.cuh"

GHOSTFUSED_NHWC_KERNELS(Float16, "float16")
