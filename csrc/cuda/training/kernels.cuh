// All kernels of training.h for one type, in the order that it gives.
#pragma once

#include "cuda/training/backward.cuh"
#include "cuda/training/forward.cuh"

#define GHOSTFUSED_NORMALIZE(STEP, PATH, NAME)                                          \
  {reinterpret_cast<const void*>(&STEP<Path::k##PATH, false>), NAME "_" #STEP "_nchw"}, \
      {reinterpret_cast<const void*>(&STEP<Path::k##PATH, true>), NAME "_" #STEP "_nhwc"}
#define GHOSTFUSED_STENCIL(STEP, PATH, NAME, D)                                                     \
  {reinterpret_cast<const void*>(&STEP<Path::k##PATH, D, false>), NAME "_" #STEP "_dw" #D "_nchw"}, \
      {reinterpret_cast<const void*>(&STEP<Path::k##PATH, D, true>), NAME "_" #STEP "_dw" #D "_nhwc"}
#define GHOSTFUSED_STENCILS(STEP, PATH, NAME)                                       \
  GHOSTFUSED_STENCIL(STEP, PATH, NAME, 1), GHOSTFUSED_STENCIL(STEP, PATH, NAME, 3), \
      GHOSTFUSED_STENCIL(STEP, PATH, NAME, 5), GHOSTFUSED_STENCIL(STEP, PATH, NAME, 7)
#define GHOSTFUSED_TRAINING_KERNELS(PATH, NAME)                                                                \
  namespace ghostfused {                                                                                       \
  const Kernel k##PATH##Training[kTrainingKernels] = {                                                         \
      GHOSTFUSED_NORMALIZE(normalize, PATH, NAME),       GHOSTFUSED_NORMALIZE(normalize_backward, PATH, NAME), \
      GHOSTFUSED_STENCILS(cheap_statistics, PATH, NAME), GHOSTFUSED_STENCILS(cheap_backward, PATH, NAME),      \
      GHOSTFUSED_STENCILS(primary_backward, PATH, NAME),                                                       \
  };                                                                                                           \
  }
