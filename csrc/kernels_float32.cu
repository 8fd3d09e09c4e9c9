#include "ghost_forward.cuh"

GHOSTFUSED_KERNELS(Float32, "float32")
