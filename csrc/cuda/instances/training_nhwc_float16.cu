#include "cuda/training/nhwc.cuh"

GHOSTFUSED_NHWC_TRAINING_KERNELS(Float16, "float16")
