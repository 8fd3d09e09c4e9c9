#include "cuda/ghost/forward.cuh"

GHOSTFUSED_FLOAT_KERNELS(TF32, "tf32")
