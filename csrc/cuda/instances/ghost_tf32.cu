#include "cuda/ghost/forward.cuh"

GHOSTFUSED_KERNELS(TF32, "tf32")
