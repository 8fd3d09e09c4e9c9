#include "cuda/ghost/nchw/forward.cuh"

GHOSTFUSED_NCHW_TF32_KERNELS
