#include "cuda/training/kernels.cuh"
#include "cuda/training/primary.cuh"

GHOSTFUSED_TRAINING_KERNELS(Float32, "float32")
GHOSTFUSED_STATISTICS_KERNELS(Float32, "float32")
GHOSTFUSED_STATISTICS_KERNELS(TF32, "tf32")
