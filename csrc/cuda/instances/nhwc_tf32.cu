#include "cuda/ghost/nhwc/forward.cuh"

GHOSTFUSED_NHWC_FLOAT_KERNELS(TF32, "tf32")
