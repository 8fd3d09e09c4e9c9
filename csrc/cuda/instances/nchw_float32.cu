#include "cuda/ghost/nchw/forward.cuh"

GHOSTFUSED_NCHW_FLOAT32_KERNELS
