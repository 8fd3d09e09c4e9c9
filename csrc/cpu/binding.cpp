// The Torch side of the CPU kernels: the ops' registration (stable ABI, so that one build serves torch 2.11 and later),
// programs of them, and the Python module for plain-data queries.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

#include "common/guard.h"
#include "cpu/network.h"

#ifndef GHOSTFUSED_FLAGS  // setup.py's, for people to read
#define GHOSTFUSED_FLAGS ""
#endif

namespace ghostfused::cpu {
namespace {

constexpr const char* kGlobalPoolNames[] = {"global_pool", "x"};
constexpr const char* kLinearNames[] = {"linear", "x", "weight", "bias"};
constexpr const char* kCastNames[] = {"cast", "x", "dtype"};
constexpr const char* kConcatNames[] = {"concat", "x", "second", "third", "fourth"};
constexpr const char* kMaxPoolNames[] = {"max_pool", "x", "kernel", "stride"};
constexpr const char* kAvgPoolNames[] = {"avg_pool", "x", "kernel"};
constexpr const char* kUpsampleNames[] = {"upsample", "x", "scale"};
constexpr const char* kGateNames[] = {"gate", "x", "gate"};

using Forward = StepKind<&GhostOp<Tensor>::run<launch>, kForwardNames>;
using Depthwise = StepKind<&depthwise<launch>, kDepthwiseNames>;
using SqueezeExcite = StepKind<&squeeze_excite<launch>, kSqueezeExciteNames>;
using GlobalPool = StepKind<&global_pool, kGlobalPoolNames>;
using Linear = StepKind<&linear, kLinearNames>;
using Cast = StepKind<&cast, kCastNames>;
using Concat = StepKind<&concat, kConcatNames>;
using MaxPool = StepKind<&max_pool, kMaxPoolNames>;
using AvgPool = StepKind<&avg_pool, kAvgPoolNames>;
using Upsample = StepKind<&upsample, kUpsampleNames>;
using GateStep = StepKind<&through_gate, kGateNames>;
template <typename... Steps>
using ProgramsOf = Programs<&Network<Steps...>::run, Steps...>;
using CpuPrograms = ProgramsOf<Forward, Depthwise, SqueezeExcite, GlobalPool, Linear, Cast, Concat, MaxPool, AvgPool,
                               GateStep, Upsample>;

STABLE_TORCH_LIBRARY_IMPL(ghostfused, CPU, m) {
  m.impl("forward_cpu", TORCH_BOX(&GhostOp<Tensor>::run<launch>));
  m.impl("depthwise_cpu", TORCH_BOX(&depthwise<launch>));
  m.impl("squeeze_excite_cpu", TORCH_BOX(&squeeze_excite<launch>));
  m.impl("program_cpu", TORCH_BOX(&CpuPrograms::run_once));
  m.impl("keep_program_cpu", TORCH_BOX(&CpuPrograms::keep));
  m.impl("replay_cpu", TORCH_BOX(&CpuPrograms::run_kept));
}

py::dict build_info() {
  py::dict info;
  py::list compiled, usable;
  for (const Isa* isa = kIsas; isa->name; ++isa) {
    compiled.append(isa->name);
    if (isa->supported()) usable.append(isa->name);
  }
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = GHOSTFUSED_FLAGS;
  info["compiled"] = compiled;
  info["supported"] = usable;
  const char* error = nullptr;
  const Isa* chosen = chosen_isa(&error);
  info["chosen"] = chosen ? py::object(py::str(chosen->name)) : py::none();
  info["error"] = chosen ? py::none() : py::object(py::str(error));
  return info;
}

// On as many threads as PyTorch has. Returns the operations that all of them did.
double multiply_adds(int64_t count, bool bfloat16) {
  struct Loop {
    int64_t count;
    Path path;
  } loop{count, bfloat16 ? Path::kBFloat16 : Path::kFloat32};
  const int threads = torch_threads(), items = 8 * threads;  // should a thread begin late, the others do more
  loop.count = (count + 7) / 8;
  const py::gil_scoped_release release;
  const auto body = [](Items& items, void* context) {
    const Loop& loop = *static_cast<Loop*>(context);
    for (int64_t begin, end; items.next(&begin, &end);) kernels().multiply_adds((end - begin) * loop.count, loop.path);
  };
  parallel_for(threads, items, items, body, &loop);
  return items * (kernels().multiply_adds(1, loop.path) * static_cast<double>(loop.count));
}

}  // namespace
}  // namespace ghostfused::cpu

PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_cpu",
      "ghostfused's CPU kernels: loading this registers ghostfused::{forward,depthwise,squeeze_excite}_cpu.", -1};
  return ghostfused::py::make_module(definition, [](ghostfused::py::module_& m) {
    using ghostfused::py::arg;
    m.def("build_info", &ghostfused::cpu::build_info,
          "Instruction sets compiled, those that this CPU has, the chosen one, and why there is none.");
    ghostfused::bind_guard(m);
    m.def("drop_program", &ghostfused::cpu::CpuPrograms::drop, arg("number"),
          "Forgets a program that keep_program_cpu has kept.");
    m.def("renew_packs", &ghostfused::cpu::Packs::renew, arg("number"), arg("bfloat16"),
          "Forgets what programs of that number of packs have made of their weights: they make it anew, in half the "
          "bytes "
          "if all are numbers that bfloat16 holds.");
    m.def("drop_packs", &ghostfused::cpu::Packs::drop, arg("number"), "There are none of that number any more.");
    m.def("multiply_adds", &ghostfused::cpu::multiply_adds, arg("count"), arg("bfloat16") = false,
          "Multiply-adds in registers, those of a 1×1 convolution of float32 or of bfloat16, on each of PyTorch's "
          "threads, for the benchmarks; returns the operations done.");
  });
}
