// What ptx-on-cpu's translated kernels include first, by FLAGS: what they call is compiled as OPT says; they themselves, long and run a
// few times each, are not optimized.
#include "ptx_rt.h"
#pragma GCC optimize("O0")
