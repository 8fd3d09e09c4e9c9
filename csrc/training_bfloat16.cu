#include "training_kernels.cuh"
#include "training_primary.cuh"

GHOSTFUSED_TRAINING_KERNELS(BFloat16, "bfloat16")
GHOSTFUSED_STATISTICS_KERNELS(BFloat16, "bfloat16")
