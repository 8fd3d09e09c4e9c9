#include "ghost_forward.cuh"

GHOSTFUSED_KERNELS(BFloat16, "bfloat16")
