// Which modules the channels_last kernel takes, and how it cuts them into blocks. Pure functions, no CUDA.
#include "cuda/ghost/nhwc.h"

namespace ghostfused {

NhwcPlan plan_nhwc(const GhostShape&) { return {}; }

bool nhwc_takes(const GhostForwardParams&, const NhwcPlan& plan) { return plan.block_c > 0; }

}  // namespace ghostfused
