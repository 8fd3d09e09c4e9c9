#include "cuda/training/nhwc.cuh"

GHOSTFUSED_NHWC_TRAINING_KERNELS(BFloat16, "bfloat16")
