// Answers about the build, the launch plans and the compiled kernels, for tests and benchmarks: no op runs here.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "common/python.h"
#include "cuda/binding.h"
#include "cuda/bottleneck/bottleneck.h"
#include "cuda/training/training.h"

namespace ghostfused {
namespace {

py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = GHOSTFUSED_ARCHITECTURES;
  return info;
}

Path path_named(const std::string& name) {
  const char* names[] = {"float16", "bfloat16", "tf32", "float32"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Path>(i);
  }
  throw py::value_error("path: expected float16, bfloat16, tf32 or float32, got " + name);
}

Tensor4 dense(bool channels_last, int64_t c, int64_t h, int64_t w) {
  void* aligned = reinterpret_cast<void*>(256);  // never read
  return channels_last ? Tensor4{aligned, c * h * w, 1, w * c, c} : Tensor4{aligned, c * h * w, h * w, w, 1};
}

void describe_plan(py::dict& r, const LaunchPlan& p, const VectorWidths& v, int element) {
  r["tile_h"] = p.tile_h;
  r["tile_w"] = p.tile_w;
  r["block_c"] = p.block_c;
  r["block_k"] = p.block_k;
  r["stages"] = p.stages;
  r["threads"] = p.threads;
  r["warps_n"] = p.warps_n;
  r["strip_h"] = p.strip_h;
  r["col_align"] = p.col_align;
  r["weights_resident"] = p.weights_resident;
  r["tiles_h"] = p.tiles_h;
  r["tiles_w"] = p.tiles_w;
  r["channel_blocks"] = p.channel_blocks;
  r["k_chunks"] = p.k_chunks;
  r["grid"] = p.grid;
  r["smem_bytes"] = p.smem_bytes;
  r["blocks_per_sm"] = p.blocks_per_sm;
  r["x_vector_bytes"] = v.x;
  r["weight_vector_bytes"] = v.primary_weight;
  r["out_vector_bytes"] = v.out * element;
  r["dram_read"] = p.dram_read;
  r["dram_write"] = p.dram_write;
  r["l2_read"] = p.l2_read;
  r["recompute"] = p.recompute;
}

void describe_plan(py::dict& r, const NhwcPlan& p) {
  r["warp_tiles"] = p.warp_tiles;
  r["threads"] = p.threads;
  r["warps_n"] = p.warps_n;
  r["images"] = p.images;
  r["tile_h"] = p.tile_h;
  r["block_c"] = p.block_c;
  r["k_blocks"] = p.k_blocks;
  r["strip_h"] = p.strip_h;
  r["strips"] = p.strips;
  r["column_groups"] = p.column_groups;
  r["tiles_h"] = p.tiles_h;
  r["channel_blocks"] = p.channel_blocks;
  r["grid"] = p.grid;
  r["pitch"] = p.pitch;
  r["row_pixels"] = p.row_pixels;
  r["smem_bytes"] = p.smem_bytes;
  r["blocks_per_sm"] = p.blocks_per_sm;
  r["dram_read"] = p.dram_read;
  r["dram_write"] = p.dram_write;
  r["l2_read"] = p.l2_read;
  r["recompute"] = p.recompute;
}

void describe_plan(py::dict& r, const NchwPlan& p) {
  constexpr const char* names[] = {"wide8", "wide4", "fourteen", "seven"};
  r["map"] = names[static_cast<int>(p.map)];
  r["k_chunk"] = p.k_chunk;
  r["warp_tiles"] = p.tiles;
  r["threads"] = 32 * p.warps;
  r["warps_k"] = p.warps_k;
  r["tile_h"] = p.tile_h;
  r["strip_h"] = p.strip_h;
  r["block_c"] = p.block_c;
  r["warp_c"] = p.warp_c;
  r["tiles_h"] = p.tiles_h;
  r["channel_blocks"] = p.channel_blocks;
  r["row_pitch"] = p.row_pitch;
  r["plane_pitch"] = p.plane_pitch;
  r["smem_bytes"] = p.smem_bytes;
  r["blocks_per_sm"] = p.blocks_per_sm;
  r["dram_read"] = p.dram_read;
  r["dram_write"] = p.dram_write;
  r["l2_read"] = p.l2_read;
  r["recompute"] = p.recompute;
}

// The plan for dense, aligned tensors, as a dict: of the family that the planner chooses, or of ``family``.
py::dict plan(int batch, int in_channels, int height, int width, int init_channels, int out_channels, int ratio,
              int dw_size, const std::string& path, bool channels_last, bool input_gate, bool full, int sm_count,
              int smem_per_block, int smem_per_sm, const std::string& family, int window_stride) {
  for (const int v : {batch, in_channels, height, width, init_channels, out_channels, ratio - 1, dw_size, sm_count}) {
    if (v < 1) throw py::value_error("plan: expected positive sizes and a ratio of at least 2");
  }
  GhostForwardParams a{};
  a.shape = {path_named(path), channels_last, input_gate, batch,   in_channels, height,         width,
             init_channels,    out_channels,  ratio,      dw_size, sm_count,    smem_per_block, smem_per_sm};
  a.shape.window_stride = window_stride;  // the height and width are the output's
  a.shape.full = full || window_stride > 0 || (input_gate && !channels_last);
  drop_unused_ghosts(a.shape);
  const ForwardPlan plans = plan_forward(a.shape);
  py::dict r;
  if (plans.general.block_c == 0 && window_stride == 0) return r;
  a.x = dense(channels_last, in_channels, height, width);
  a.out = dense(channels_last, out_channels, height, width);
  a.primary_weight = a.x.data;
  a.primary_weight_stride_n = in_channels;
  a.primary_weight_stride_k = 1;
  const Family chosen = choose(a, plans);
  if (window_stride > 0 && chosen == Family::kGeneral) return r;
  const std::string name = family.empty() ? kFamilyNames[static_cast<int>(chosen)] : family;
  r["family"] = name;
  if (name == "general") {
    describe_plan(r, plans.general, vector_widths(a, plans.general), element_size(a.shape.path));
  } else if (name == "nhwc") {
    if (!nhwc_takes(a, plans.nhwc)) return {};
    describe_plan(r, plans.nhwc);
  } else if (name == "nchw") {
    if (!nchw_takes(a, plans.nchw)) return {};
    describe_plan(r, plans.nchw);
  } else {
    throw py::value_error("family: expected general, nhwc or nchw, got " + name);
  }
  return r;
}

// The same for a depthwise conv and for squeeze-and-excite's two kernels.
py::dict plan_of_depthwise(int batch, int channels, int height, int width, int kernel_h, int kernel_w, int stride,
                           const std::string& path, bool channels_last, int sm_count) {
  for (const int v : {batch, channels, height, width, kernel_h, kernel_w, stride, sm_count}) {
    if (v < 1) throw py::value_error("plan_depthwise: expected positive sizes");
  }
  DepthwiseParams a{};
  a.path = path_named(path);
  a.channels_last = channels_last;
  a.batch = batch;
  a.channels = channels;
  a.height = height;
  a.width = width;
  a.out_height = (height - 1) / stride + 1;
  a.out_width = (width - 1) / stride + 1;
  a.kernel_h = kernel_h;
  a.kernel_w = kernel_w;
  a.stride = stride;
  a.x = dense(channels_last, channels, height, width);
  a.out = dense(channels_last, channels, a.out_height, a.out_width);
  const DepthwisePlan p = plan_depthwise(a, sm_count);
  py::dict r;
  r["block_c"] = p.block_c;
  r["block_p"] = p.block_p;
  r["channel_blocks"] = p.channel_blocks;
  r["position_blocks"] = p.position_blocks;
  r["columns"] = p.columns;
  r["row_groups"] = p.row_groups;
  r["x_vector"] = p.x_vector;
  r["out_vector"] = p.out_vector;
  r["threads"] = kBottleneckThreads;
  r["smem_bytes"] = p.smem_bytes;
  r["grid"] = p.grid;
  return r;
}

py::dict plan_of_squeeze_excite(int batch, int channels, int height, int width, int reduced, const std::string& path,
                                bool channels_last, int sm_count) {
  for (const int v : {batch, channels, height, width, reduced, sm_count}) {
    if (v < 1) throw py::value_error("plan_squeeze_excite: expected positive sizes");
  }
  SqueezeExciteParams a{};
  a.path = path_named(path);
  a.batch = batch;
  a.channels = channels;
  a.height = height;
  a.width = width;
  a.reduced = reduced;
  a.x = dense(channels_last, channels, height, width);
  a.reduce = {a.x.data, channels, 1};
  a.expand = {a.x.data, reduced, 1};
  const SqueezeExcitePlan p = plan_squeeze_excite(a, sm_count);
  py::dict r;
  r["images"] = p.images;
  r["chunk"] = p.chunk;
  r["parts"] = p.parts;
  r["excite_c"] = p.excite_c;
  r["channels_adjacent"] = p.channels_adjacent;
  r["x_vector"] = p.x_vector;
  r["reduce_vector"] = p.reduce_vector;
  r["expand_vector"] = p.expand_vector;
  r["threads"] = kBottleneckThreads;
  r["squeeze_grid"] = p.squeeze_grid;
  r["excite_grid"] = p.excite_grid;
  return r;
}

// A training step's kernel and grid, for dense, aligned tensors; by the choice that the ops make.
py::dict plan_of_training(const std::string& step, int batch, int in_channels, int height, int width, int init_channels,
                          int out_channels, int ratio, int dw_size, const std::string& path, bool channels_last,
                          bool gates, bool prelu, bool batch_statistics, int sm_count) {
  const char* names[] = {"normalize",      "normalize_backward", "cheap_statistics",
                         "cheap_backward", "primary_backward",   "primary_statistics"};
  const auto found = std::find(std::begin(names), std::end(names), step);
  if (found == std::end(names)) throw py::value_error("step: expected the name of a training kernel, got " + step);
  const auto kernel = static_cast<TrainingStep>(found - names);
  GhostForwardParams a{};
  a.shape = {path_named(path), channels_last, gates, batch,   in_channels, height, width,
             init_channels,    out_channels,  ratio, dw_size, sm_count,    232448, 233472};
  a.kernel = a.stride = a.dilation = 1;
  a.x = dense(channels_last, in_channels, height, width);
  a.out = dense(channels_last, out_channels, height, width);
  void* aligned = a.x.data;
  a.primary_weight = a.cheap_weight = aligned;
  a.primary_weight_stride_n = in_channels;
  a.primary_weight_stride_k = 1;
  if (gates) {
    a.input_gate = aligned;
    a.output_gate = a.residual = a.out;
  }
  a.primary.act = prelu ? Act::kPReLU : Act::kReLU;
  TrainingParams p{a};
  p.maps = {aligned, nullptr, aligned, aligned, aligned, aligned, aligned};
  p.batch_statistics = batch_statistics;
  p.sums = static_cast<float*>(aligned);
  p.weight_gradient = aligned;
  py::dict r;
  if (kernel == TrainingStep::kPrimaryStatistics && !nhwc_fits(kernel, p)) {
    r["kernel"] = statistics_kernel(static_cast<int>(a.shape.path) * 2 + channels_last).name;
    return r;
  }
  const TrainingPlan plan = plan_training(kernel, p, sm_count);
  r["kernel"] = plan.kernel->name;
  r["threads"] = plan.threads;
  r["block_c"] = plan.block_c;
  r["channel_blocks"] = plan.channel_blocks;
  r["rows"] = plan.rows.rows;
  r["grid"] = int64_t{plan.channel_blocks} * plan.passes * plan.rows.rows;
  r["strip_h"] = plan.strip.strip_h;
  return r;
}

void pretend_device(int sm_count, int smem_per_block, int smem_per_sm) {
  pretended_device = {sm_count, smem_per_block, smem_per_sm};
}

py::list all_kernel_attributes() {
  py::list all;
  for (int i = 0; i < kKernelCount; ++i) {
    KernelAttributes k;
    if (const char* error = kernel_attributes(i, &k)) fail("kernel_attributes: ", error);
    py::dict d;
    d["name"] = k.name;
    d["registers"] = k.registers;
    d["local_bytes"] = k.local_bytes;
    d["static_smem_bytes"] = k.static_smem_bytes;
    d["max_threads"] = k.max_threads;
    d["binary_version"] = k.binary_version;
    all.append(d);
  }
  return all;
}

}  // namespace

void bind_introspection(py::module_& m) {
  m.def("build_info", &build_info, "CUDA version and architectures of this build.");
  m.def("plan", &plan, py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("height"), py::arg("width"),
        py::arg("init_channels"), py::arg("out_channels"), py::arg("ratio") = 2, py::arg("dw_size") = 3,
        py::arg("path") = "float16", py::arg("channels_last") = true, py::arg("input_gate") = false,
        py::arg("full") = false, py::arg("sm_count") = 132, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472, py::arg("family") = "", py::arg("window_stride") = 0,
        "The launch plan for dense tensors on a device (the default is an H100), of the family of kernels that the "
        "planner chooses or of the one that is named; empty if it takes no such module.");
  m.def("plan_depthwise", &plan_of_depthwise, py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("height"),
        py::arg("width"), py::arg("kernel_h"), py::arg("kernel_w"), py::arg("stride") = 1, py::arg("path") = "float16",
        py::arg("channels_last") = true, py::arg("sm_count") = 132,
        "The launch plan of a depthwise conv of dense tensors.");
  m.def("plan_squeeze_excite", &plan_of_squeeze_excite, py::kw_only(), py::arg("batch"), py::arg("channels"),
        py::arg("height"), py::arg("width"), py::arg("reduced"), py::arg("path") = "float16",
        py::arg("channels_last") = true, py::arg("sm_count") = 132,
        "The launch plan of a squeeze-and-excite gate, two kernels, for dense tensors.");
  m.def("plan_training", &plan_of_training, py::arg("step"), py::kw_only(), py::arg("batch"), py::arg("in_channels"),
        py::arg("height"), py::arg("width"), py::arg("init_channels"), py::arg("out_channels"), py::arg("ratio") = 2,
        py::arg("dw_size") = 3, py::arg("path") = "float16", py::arg("channels_last") = true, py::arg("gates") = false,
        py::arg("prelu") = false, py::arg("batch_statistics") = true, py::arg("sm_count") = 132,
        "Which kernel makes a training step of dense tensors, and its grid.");
  m.def("pretend_device", &pretend_device, py::arg("sm_count") = 0, py::arg("smem_per_block") = 232448,
        py::arg("smem_per_sm") = 233472,
        "For tests: plan launches as for this device, of which the real one must have the shared memory; 0: stop it.");
  m.def(
      "general_only", +[](bool only) { general_only = only; }, py::arg("only"),
      "For tests: whether the general family of kernels computes every forward.");
  m.def("kernel_attributes", &all_kernel_attributes, "Registers and memory of every compiled kernel.");
}

}  // namespace ghostfused
