#include "ghost_forward.cuh"

GHOSTFUSED_KERNELS(Float16, "float16")
