#include "cuda/ghost/nhwc/forward.cuh"

GHOSTFUSED_NHWC_FLOAT_KERNELS(Float32, "float32")
