#include "cuda/training/kernels.cuh"
#include "cuda/training/primary.cuh"

GHOSTFUSED_TRAINING_KERNELS(Float16, "float16")
GHOSTFUSED_STATISTICS_KERNELS(Float16, "float16")
