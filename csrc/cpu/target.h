// GHOSTFUSED_TARGET("avx2,fma") … GHOSTFUSED_TARGET_END: functions between them are compiled for such CPUs.
#pragma once

#define GHOSTFUSED_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define GHOSTFUSED_TARGET(features) \
  GHOSTFUSED_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define GHOSTFUSED_TARGET_END GHOSTFUSED_PRAGMA(clang attribute pop)
#else
#define GHOSTFUSED_TARGET(features) GHOSTFUSED_PRAGMA(GCC target(features))
#define GHOSTFUSED_TARGET_END
#endif
