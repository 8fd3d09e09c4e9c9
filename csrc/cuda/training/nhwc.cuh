// The training kernels for channels_last and one 2-byte type, in the order that training.h gives.
#pragma once

#include "cuda/training/pixels.cuh"
#include "cuda/training/primary_nhwc.cuh"
#include "cuda/training/strip_kernels.cuh"

#define GHOSTFUSED_STRIPS(STEP, PATH, NAME)                                                        \
  {reinterpret_cast<const void*>(&STEP##_strips<Path::k##PATH, false>), NAME "_" #STEP "_strips"}, \
      {reinterpret_cast<const void*>(&STEP##_strips<Path::k##PATH, true>), NAME "_" #STEP "_strips_masked"}
#define GHOSTFUSED_PIXELS(STEP, PATH, NAME)                                                      \
  {reinterpret_cast<const void*>(&STEP##_pixels<Path::k##PATH, 4>), NAME "_" #STEP "_pixels_4"}, \
      {reinterpret_cast<const void*>(&STEP##_pixels<Path::k##PATH, 8>), NAME "_" #STEP "_pixels_8"}
#define GHOSTFUSED_PRIMARY(PATH, NAME, TILES)                                     \
  {reinterpret_cast<const void*>(&primary_statistics_nhwc<Path::k##PATH, TILES>), \
   NAME "_primary_statistics_nhwc_" #TILES}
#define GHOSTFUSED_NHWC_TRAINING_KERNELS(PATH, NAME)           \
  namespace ghostfused {                                       \
  const Kernel k##PATH##NhwcTraining[kTrainingNhwcKernels] = { \
      GHOSTFUSED_PIXELS(normalize, PATH, NAME),                \
      GHOSTFUSED_PIXELS(normalize_backward, PATH, NAME),       \
      GHOSTFUSED_STRIPS(cheap_statistics, PATH, NAME),         \
      GHOSTFUSED_STRIPS(cheap_backward, PATH, NAME),           \
      GHOSTFUSED_STRIPS(primary_backward, PATH, NAME),         \
      GHOSTFUSED_PRIMARY(PATH, NAME, 1),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 2),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 3),                       \
      GHOSTFUSED_PRIMARY(PATH, NAME, 4),                       \
  };                                                           \
  }
