#include "cuda/training/kernels.cuh"
#include "cuda/training/primary.cuh"

GHOSTFUSED_TRAINING_KERNELS(BFloat16, "bfloat16")
GHOSTFUSED_STATISTICS_KERNELS(BFloat16, "bfloat16")
