// All kernels of training.h for one type, in the order that it gives.
#pragma once

#include "cuda/training/backward.cuh"
#include "cuda/training/forward.cuh"

#define GHOSTFUSED_NORMALIZE(STEP, PATH, NAME)                                                  \
  {reinterpret_cast<const void*>(&STEP<Path::k##PATH, Layout::kNchw>), NAME "_" #STEP "_nchw"}, \
      {reinterpret_cast<const void*>(&STEP<Path::k##PATH, Layout::kNhwc>), NAME "_" #STEP "_nhwc"}
#define GHOSTFUSED_STENCILS(STEP, PATH, NAME)                                                          \
  {reinterpret_cast<const void*>(&STEP<Path::k##PATH, 3, Layout::kNhwc>), NAME "_" #STEP "_dw3_nhwc"}, \
      {reinterpret_cast<const void*>(&STEP<Path::k##PATH, 0, Layout::kEither>), NAME "_" #STEP "_any"}
#define GHOSTFUSED_TRAINING_KERNELS(PATH, NAME)                                                                \
  namespace ghostfused {                                                                                       \
  const Kernel k##PATH##Training[kTrainingKernels] = {                                                         \
      GHOSTFUSED_NORMALIZE(normalize, PATH, NAME),       GHOSTFUSED_NORMALIZE(normalize_backward, PATH, NAME), \
      GHOSTFUSED_STENCILS(cheap_statistics, PATH, NAME), GHOSTFUSED_STENCILS(cheap_backward, PATH, NAME),      \
      GHOSTFUSED_STENCILS(primary_backward, PATH, NAME),                                                       \
  };                                                                                                           \
  }
