// The training kernels for channels_last and one type, in the order that training.h gives.
#pragma once

#include "cuda/training/pixels.cuh"
#include "cuda/training/primary_nhwc.cuh"
#include "cuda/training/strip_kernels.cuh"

#define GHOSTFUSED_MASKED(STEP, PATH, NAME) \
  {reinterpret_cast<const void*>(&STEP##_strips<Path::k##PATH, true>), NAME "_" #STEP "_strips_masked"}
#define GHOSTFUSED_STRIPS(STEP, PATH, NAME)                                                        \
  {reinterpret_cast<const void*>(&STEP##_strips<Path::k##PATH, false>), NAME "_" #STEP "_strips"}, \
      GHOSTFUSED_MASKED(STEP, PATH, NAME)
#define GHOSTFUSED_PIXELS(STEP, PATH, NAME, HALF, FULL)                                                    \
  {reinterpret_cast<const void*>(&STEP##_pixels<Path::k##PATH, HALF>), NAME "_" #STEP "_pixels_" #HALF}, { \
    reinterpret_cast<const void*>(&STEP##_pixels<Path::k##PATH, FULL>), NAME "_" #STEP "_pixels_" #FULL    \
  }
#define GHOSTFUSED_PRIMARY(PATH, NAME, TILES)                                     \
  {reinterpret_cast<const void*>(&primary_statistics_nhwc<Path::k##PATH, TILES>), \
   NAME "_primary_statistics_nhwc_" #TILES}
#define GHOSTFUSED_NHWC_TRAINING_KERNELS(PATH, NAME)           \
  namespace ghostfused {                                       \
  const Kernel k##PATH##NhwcTraining[kTrainingNhwcKernels] = { \
      GHOSTFUSED_PIXELS(normalize, PATH, NAME, 4, 8),          \
      GHOSTFUSED_PIXELS(normalize_backward, PATH, NAME, 4, 8), \
      GHOSTFUSED_STRIPS(cheap_statistics, PATH, NAME),         \
      GHOSTFUSED_STRIPS(cheap_backward, PATH, NAME),           \
      GHOSTFUSED_STRIPS(primary_backward, PATH, NAME),         \
      GHOSTFUSED_PRIMARY(PATH, NAME, 1),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 2),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 3),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 4),                       \
  };                                                           \
  }

// fp32 reads and writes twice the bytes for the same instructions: the masked strips do for every width.
#define GHOSTFUSED_NHWC_FLOAT_TRAINING_KERNELS(PATH, NAME)                                                      \
  namespace ghostfused {                                                                                        \
  const Kernel k##PATH##NhwcTraining[kTrainingNhwcFloatKernels] = {                                             \
      GHOSTFUSED_PIXELS(normalize, PATH, NAME, 2, 4),  GHOSTFUSED_PIXELS(normalize_backward, PATH, NAME, 2, 4), \
      GHOSTFUSED_MASKED(cheap_statistics, PATH, NAME), GHOSTFUSED_MASKED(cheap_backward, PATH, NAME),           \
      GHOSTFUSED_MASKED(primary_backward, PATH, NAME),                                                          \
  };                                                                                                            \
  }
