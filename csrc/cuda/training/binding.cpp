// The Torch side of the training kernels. Each op is GhostArgs and then what its kernel reads and writes, which
// backends/cuda_training.py allocates.
#include "cuda/binding.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "cuda/training/training.h"

namespace ghostfused {
namespace {

// Checks the tensors of an op, and knows what it works on.
struct Step {
  const Checker checker;
  const int32_t index;
  const torch::stable::accelerator::DeviceGuard guard;
  const bool channels_last;
  const int64_t batch, cp, cheap_channels, out_channels, height, width;

  Step(GhostForwardParams& a, const Tensor& x)
      : checker(x),
        index(cuda_device(x)),
        guard(index),
        channels_last(is_channels_last(x)),
        batch(a.shape.batch),
        cp(a.shape.init_channels),
        cheap_channels(cp * (a.shape.ratio - 1)),
        out_channels(a.shape.out_channels),
        height(a.shape.height),
        width(a.shape.width) {
    if (a.kernel != 1) fail("primary_weight: the kernel takes 1×1, got ", a.kernel);
    check_pixels(height, width);
    describe(a.shape, current_device(index), channels_last);
    a.shape.channels_last = channels_last;
  }

  // A dense map in the layout of x's output.
  void* map(const char* name, const OptionalTensor& t, int64_t channels) const {
    if (!t) return nullptr;
    void* data = checker.check(name, *t, {batch, channels, height, width});
    const int64_t wanted[] = {channels * height * width, channels_last ? 1 : height * width,
                              width * (channels_last ? channels : 1), channels_last ? channels : 1};
    for (int d = 0; d < 4; ++d) {
      if (batch > 0 && t->size(d) > 1 && t->stride(d) != wanted[d]) {
        fail(name, ": expected a dense map, ", channels_last ? "channels_last" : "contiguous");
      }
    }
    return data;
  }

  float* floats(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) const {
    if (!t) return nullptr;
    if (!t->defined()) fail(name, ": expected a tensor, got none");
    if (t->scalar_type() != ScalarType::Float || !t->is_contiguous()) fail(name, ": expected float32, contiguous");
    return static_cast<float*>(checker.check(name, *t, sizes, true));
  }

  void zero(const OptionalTensor& t) const {
    if (!t) return;
    const size_t bytes = t->numel() * (t->scalar_type() == ScalarType::Float ? 4 : 2);
    cudaMemsetAsync(t->data_ptr(), 0, bytes, static_cast<cudaStream_t>(current_stream(index)));
  }

  // Partial results and the counters behind them.
  Tensor scratch(int64_t partial, int64_t counters) const {
    return new_output({partial + counters}, ScalarType::Float, index);
  }
};

void launch(const Step& step, TrainingStep kernel, TrainingParams& p, bool reduces) {
  if (step.batch == 0) return;
  p.plan = plan_training(kernel, p, current_device(step.index).sm_count);
  Tensor scratch;
  if (reduces) {
    scratch = step.scratch(p.plan.partial, p.plan.counters);
    p.partial = static_cast<float*>(scratch.data_ptr());
    p.counters = reinterpret_cast<unsigned*>(p.partial + p.plan.partial);
  }
  if (const char* error = launch_training(kernel, p, current_stream(step.index))) fail("ghostfused training: ", error);
}

void primary_statistics(GhostForwardParams& a, const Tensor& x, Tensor out, Tensor mean, Tensor var) {
  const Step step(a, x);
  step.map("out", out, step.out_channels);
  StatisticsParams s{};
  s.mean = step.floats("mean", mean, {step.cp});
  s.var = step.floats("var", var, {step.cp});
  if (step.batch == 0) {
    step.zero(mean);
    step.zero(var);
    return;
  }
  TrainingParams p{a};
  p.maps.out = out.data_ptr();
  p.mean = s.mean;
  p.var = s.var;
  if (nhwc_fits(TrainingStep::kPrimaryStatistics, p)) {
    launch(step, TrainingStep::kPrimaryStatistics, p, true);
    return;
  }
  // an ordinary 1×1 conv: nothing follows it
  a.out = map_of(out);
  a.primary = a.cheap = NormAct{};
  a.residual = a.output_gate = Tensor4{};
  a.shape.out_channels = a.shape.init_channels;
  a.shape.ratio = 2;
  a.shape.dw_size = 1;
  describe(a.shape, current_device(step.index), step.channels_last);
  a.shape.smem_per_block -= kScratchBytes;
  const LaunchPlan& plan = cached_plan(a.shape).general;
  s.plan = plan_statistics(a, plan);
  const Tensor scratch = step.scratch(s.plan.partial, s.plan.counters);
  s.partial = static_cast<float*>(scratch.data_ptr());
  s.counters = reinterpret_cast<unsigned*>(s.partial + s.plan.partial);
  if (const char* error = launch_statistics(a, plan, s, current_stream(step.index))) {
    fail("ghostfused primary_statistics: ", error);
  }
}

void cheap_statistics(GhostForwardParams& a, const Tensor& x, Tensor out, Tensor mean, Tensor var) {
  const Step step(a, x);
  TrainingParams p{a};
  p.maps.out = step.map("out", out, step.out_channels);
  p.mean = step.floats("mean", mean, {step.cheap_channels});
  p.var = step.floats("var", var, {step.cheap_channels});
  if (step.batch == 0) {
    step.zero(mean);
    step.zero(var);
  }
  launch(step, TrainingStep::kCheapStatistics, p, true);
}

void normalize(GhostForwardParams& a, const Tensor& x, Tensor out) {
  const Step step(a, x);
  TrainingParams p{a};
  p.maps.out = step.map("out", out, step.out_channels);
  launch(step, TrainingStep::kNormalize, p, false);
}

void cheap_backward(GhostForwardParams& a, const Tensor& x, Tensor grad, Tensor y1, Tensor dz2, OptionalTensor y2,
                    OptionalTensor product, OptionalTensor sums) {
  const Step step(a, x);
  TrainingParams p{a};
  p.batch_statistics = y2.has_value();
  p.maps.grad = step.map("grad", grad, step.out_channels);
  p.maps.y1 = step.map("y1", y1, step.cp);
  p.maps.dz2 = step.map("dz2", dz2, step.cheap_channels);
  p.maps.y2 = step.map("y2", y2, step.cheap_channels);
  p.maps.product = step.map("product", product, step.out_channels);
  p.sums = step.floats("sums", sums, {3, step.cheap_channels});
  if (step.batch == 0) step.zero(sums);
  launch(step, TrainingStep::kCheapBackward, p, sums.has_value());
}

void primary_backward(GhostForwardParams& a, const Tensor& x, Tensor grad, Tensor y1, OptionalTensor dz2,
                      OptionalTensor y2, OptionalTensor means2, bool batch_statistics, OptionalTensor dz1,
                      OptionalTensor sums, OptionalTensor weight) {
  const Step step(a, x);
  TrainingParams p{a};
  p.batch_statistics = batch_statistics;
  p.maps.grad = step.map("grad", grad, step.out_channels);
  p.maps.y1 = step.map("y1", y1, step.cp);
  p.maps.dz2 = step.map("dz2", dz2, step.cheap_channels);
  p.maps.y2 = step.map("y2", y2, step.cheap_channels);
  p.maps.dz1 = step.map("dz1", dz1, step.cp);
  p.means = step.floats("means2", means2, {2, step.cheap_channels});
  p.sums = step.floats("sums", sums, {3, step.cp});
  if (dz2 && batch_statistics && !(y2 && means2)) fail("y2, means2: expected both with batch statistics");
  if (weight && !dz2) fail("weight: expected None without dz2");
  if (weight) {
    if (!weight->is_contiguous()) fail("weight: expected a contiguous tensor");
    p.weight_gradient =
        step.checker.check("weight", *weight, {step.cheap_channels, 1, a.shape.dw_size, a.shape.dw_size});
  }
  if (step.batch == 0) {
    step.zero(sums);
    step.zero(weight);
  }
  launch(step, TrainingStep::kPrimaryBackward, p, sums || weight);
}

void normalize_backward(GhostForwardParams& a, const Tensor& x, Tensor dz1, Tensor y1, Tensor means1) {
  const Step step(a, x);
  TrainingParams p{a};
  p.maps.dz1 = step.map("dz1", dz1, step.cp);
  p.maps.y1 = step.map("y1", y1, step.cp);
  p.means = step.floats("means1", means1, {2, step.cp});
  launch(step, TrainingStep::kNormalizeBackward, p, false);
}

template <typename... Extra>
using Op = GhostOp<void, Extra...>;

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CUDA, m) {
  m.impl("primary_statistics_cuda", TORCH_BOX((&Op<Tensor, Tensor, Tensor>::run<primary_statistics>)));
  m.impl("cheap_statistics_cuda", TORCH_BOX((&Op<Tensor, Tensor, Tensor>::run<cheap_statistics>)));
  m.impl("normalize_cuda", TORCH_BOX((&Op<Tensor>::run<normalize>)));
  m.impl("cheap_backward_cuda",
         TORCH_BOX((&Op<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>::run<cheap_backward>)));
  m.impl("primary_backward_cuda",
         TORCH_BOX((&Op<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, bool, OptionalTensor,
                        OptionalTensor, OptionalTensor>::run<primary_backward>)));
  m.impl("normalize_backward_cuda", TORCH_BOX((&Op<Tensor, Tensor, Tensor>::run<normalize_backward>)));
}

}  // namespace
}  // namespace ghostfused
