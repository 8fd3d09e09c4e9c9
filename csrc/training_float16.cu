#include "training_kernels.cuh"
#include "training_primary.cuh"

GHOSTFUSED_TRAINING_KERNELS(Float16, "float16")
GHOSTFUSED_STATISTICS_KERNELS(Float16, "float16")
