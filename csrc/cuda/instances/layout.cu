#include "cuda/layout/layout.cuh"

namespace ghostfused {
const Kernel kLayout[kLayoutKernels] = {
    {reinterpret_cast<const void*>(&change_layout<2>), "change_layout_2_bytes"},
    {reinterpret_cast<const void*>(&change_layout<4>), "change_layout_4_bytes"},
};
}  // namespace ghostfused
