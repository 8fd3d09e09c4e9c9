#include "cuda/training/nhwc.cuh"

GHOSTFUSED_NHWC_FLOAT_TRAINING_KERNELS(Float32, "float32")
