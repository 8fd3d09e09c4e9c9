// The Torch side of the change of layout.
#include "cuda/binding.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda/layout/layout.h"

namespace ghostfused {
namespace {

// What lies side by side in x is pixels or channels, in out the other; out is dense.
void change_layout(Tensor x, Tensor out) {
  for (const auto& [name, t] : {std::pair{"x", &x}, {"out", &out}}) {
    if (t->dim() != 4) fail(name, ": expected 4 dimensions, got ", t->dim());
  }
  const auto sizes = x.sizes();
  const int64_t batch = sizes[0], channels = sizes[1], height = sizes[2], width = sizes[3];
  const Checker checker(x);
  const int32_t index = cuda_device(x);
  LayoutParams p{};
  p.from = checker.check("x", x, {batch, channels, height, width});
  p.to = checker.check("out", out, {batch, channels, height, width});
  if (x.numel() == 0) return;
  check_pixels(height, width);
  channels32("x", channels);
  p.images = size32("x", batch);

  const bool to_channels_last = is_channels_last(out);
  const int64_t pixels = height * width, pixel = to_channels_last ? channels : 1;
  const auto expect = [](const char* name, const Tensor& t, int64_t d, int64_t stride, const char* what) {
    if (t.size(d) > 1 && t.stride(d) != stride) fail(name, ": expected ", what);
  };
  const char* dense = to_channels_last ? "a dense map, channels_last" : "a dense map, contiguous";
  expect("out", out, 0, channels * pixels, dense);
  expect("out", out, 1, to_channels_last ? 1 : pixels, dense);
  expect("out", out, 2, pixel * width, dense);
  expect("out", out, 3, pixel, dense);
  const int64_t from_pixel = to_channels_last ? 1 : width > 1 ? x.stride(3) : height > 1 ? x.stride(2) : 1;
  const char* opposite = to_channels_last ? "its pixels side by side, as out is channels_last"
                                          : "its channels side by side, as out is contiguous";
  expect("x", x, 3, from_pixel, opposite);
  expect("x", x, 2, from_pixel * width, opposite);
  if (!to_channels_last) expect("x", x, 1, 1, opposite);

  const int64_t x_channel = channels > 1 ? x.stride(1) : 0;
  p.rows = static_cast<int>(to_channels_last ? channels : pixels);
  p.columns = static_cast<int>(to_channels_last ? pixels : channels);
  p.from_row = to_channels_last ? x_channel : from_pixel;
  p.to_row = p.rows;
  p.from_image = batch > 1 ? x.stride(0) : 0;
  p.to_image = channels * pixels;
  const torch::stable::accelerator::DeviceGuard guard(index);
  const int element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  if (const char* error = launch_layout(p, element, current_stream(index))) {
    fail("ghostfused change_layout_cuda: ", error);
  }
}

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CUDA, m) { m.impl("change_layout_cuda", TORCH_BOX(&change_layout)); }

}  // namespace
}  // namespace ghostfused
