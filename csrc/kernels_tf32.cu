#include "ghost_forward.cuh"

GHOSTFUSED_KERNELS(TF32, "tf32")
