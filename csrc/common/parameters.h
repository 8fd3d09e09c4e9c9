// The bridge between Torch and the kernels: plain structs of pointers, sizes and strides, and a few functions.
// Neither Torch nor CUDA is needed to read or include it.
#pragma once

#include <cstdint>

namespace ghostfused {

// How the numbers are stored and multiplied. Sums are fp32 on every path.
enum class Path : int { kFloat16, kBFloat16, kTF32, kFloat32 };

// The values of ghostfused/spec/activations.py's Act.
enum class Act : int { kNone, kReLU, kReLU6, kSiLU, kHardswish, kLeakyReLU, kPReLU, kGELU, kGELUTanh, kMish };
constexpr Act kLastAct = Act::kMish;

// GELU is x Φ(x), and Φ(x) = 1 / (1 + e^-a) with a = x (c0 + c1 x² + … + c7 x^14), fitted to that up to |x| = 5.5 and
// with x² no larger: x Φ(x) is wrong by at most 6e-8 of itself where x > 0, by 2e-7 where it isn't. Of the tanh form (1
// + tanh u) / 2 = 1 / (1 + e^-2u), a is 2u = x (c0 + c1 x²) itself.
struct GeluArgument {
  static constexpr float kEnd = 5.5f * 5.5f;
  static constexpr float c0 = 1.59577008f, c1 = 0.0726644372f, c2 = -6.22502996e-5f, c3 = -1.12367225e-4f,
                         c4 = 8.38135248e-6f, c5 = -3.18023385e-7f, c6 = 6.31141226e-9f, c7 = -5.14441887e-11f;
  static constexpr float kTanh0 = 1.59576912f, kTanh1 = 0.0713548163f;
};

// A (N, C, H, W) tensor with any strides, in elements.
struct Tensor4 {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// One number per channel. Stride 0: one number for all; data null: absent.
struct ChannelVector {
  const void* data;
  int64_t stride;
};

// What follows either convolution: bias, then a norm with stored statistics (mean null: none), then an activation.
struct NormAct {
  ChannelVector bias, mean, var, gamma, beta, slope;  // slope is PReLU's
  float eps, negative_slope;                          // LeakyReLU's
  Act act;
  bool norm_is_float32;  // mean, var, gamma, beta; else they are of x's type
};

// What a launch plan depends on.
struct GhostShape {
  Path path;
  bool channels_last;  // of the output
  bool input_gate;
  int batch, in_channels, height, width, init_channels, out_channels, ratio, dw_size;
  int sm_count, smem_per_block, smem_per_sm;  // of the device, in bytes
  bool full = false;                          // of a CUDA forward: needs_full_kernel()
  int window_stride = 0;                      // of a 3×3 primary conv there; 0: it is 1×1 at stride 1

  bool operator==(const GhostShape&) const = default;
};

struct GhostForwardParams {
  GhostShape shape;
  // The primary conv, padded by dilation * (kernel - 1) / 2; shape has the output's height and width. On a GPU it is
  // 1×1 at stride 1 or 3×3.
  int kernel, stride, dilation, x_height, x_width;
  Tensor4 x, out, residual, output_gate;  // data null: absent
  int gate_height, gate_width;            // of output_gate
  const void* input_gate;                 // (N, Cin)
  int64_t input_gate_stride_n, input_gate_stride_c;
  const void* primary_weight;  // (Cp, Cin, kernel, kernel)
  int64_t primary_weight_stride_n, primary_weight_stride_k, primary_weight_stride_h, primary_weight_stride_w;
  const void* cheap_weight;  // (Cp * (ratio - 1), d, d)
  int64_t cheap_weight_stride_c, cheap_weight_stride_h, cheap_weight_stride_w;
  NormAct primary, cheap;
};

// act(norm(depthwise_conv(x))), padded by half the kernel.
struct DepthwiseParams {
  Path path;
  bool channels_last;  // of the output
  int batch, channels, height, width, out_height, out_width, kernel_h, kernel_w, stride;
  Tensor4 x, out;
  const void* weight;  // (C, kernel_h, kernel_w)
  int64_t weight_stride_c, weight_stride_h, weight_stride_w;
  NormAct norm;
};

// The values of ghostfused/spec/arguments.py's Gate.
enum class Gate : int { kSigmoid, kHardsigmoid, kReLU6 };

// A matrix with any strides, in elements.
struct Matrix {
  const void* data;
  int64_t stride_row, stride_col;
};

// gate(expand act(reduce mean(x))), a number per image and channel.
struct SqueezeExciteParams {
  Path path;
  int batch, channels, height, width, reduced;
  Tensor4 x;
  Matrix reduce, expand;  // (reduced, C) and (C, reduced)
  ChannelVector reduce_bias, expand_bias;
  Act act;
  Gate gate;
  void* out;  // (N, C), contiguous
};

// How a module is cut into blocks, and what that costs. See plan.cpp.
struct LaunchPlan {
  int tile_h, tile_w;     // output pixels of a block
  int block_c;            // init channels of a block, a multiple of 8
  int block_k;            // input channels of one pipeline stage
  int stages;             // of the cp.async pipeline
  int threads, warps_n;   // warps side by side along the channels; the others lie along the pixels
  int strip_h;            // rows that a thread of the depthwise conv slides down
  int col_align;          // NCHW: the halo's columns start and end at multiples of this, so that loads stay aligned
  bool weights_resident;  // the block's 1×1 weights stay in shared memory; else they are loaded for each pixel chunk
  int tiles_h, tiles_w, channel_blocks;
  int64_t grid;

  int pixels;  // of the largest tile with halo, inside the image
  int k_chunks;
  // Shared memory, in bytes: offsets of its parts and the whole.
  int a_pitch, w_pitch, x1_pitch, staging_pitch;  // rows of x, of the 1×1 weights, of x1, of the staged output
  int a_stage, w_stage;                           // one stage of either
  int cheap_offset, dw_offset, gate_offset, x1_offset, pipeline_offset, resident_offset;
  int smem_bytes;

  // The traffic that this plan implies, in bytes.
  int64_t dram_read;   // x and the parameters once: blocks that share pixels or weights run close in time
  int64_t dram_write;  // the output
  int64_t l2_read;     // all loads of x and the 1×1 weights, halos and channel blocks repeated
  double recompute;    // pixels of the 1×1 conv / pixels of the image
  int blocks_per_sm;   // by shared memory and threads
};

// The families of kernels that compute the forward: ``general`` takes every shape and stride, the others take what
// plan.cpp's choose() gives them.
enum class Family : int { kGeneral, kNhwc, kNchw };
constexpr int kFamilies = 3;
constexpr const char* kFamilyNames[kFamilies] = {"general", "nhwc", "nchw"};

// How ghost/nhwc.cuh cuts a module: whole rows of a map, or whole maps. See nhwc_plan.cpp.
struct NhwcPlan {
  int warp_tiles;        // m16 tiles of channels that a warp multiplies at a time: picks the compiled kernel
  int threads, warps_n;  // warps side by side along the channels; the others lie along the pixels
  int images, tile_h;    // of a block; more than one image only where it takes their whole maps
  int block_c;           // init channels of a block, a multiple of 4
  int k_blocks;          // of 32 input channels
  int strip_h, strips, column_groups;  // rows that a thread of the cheap conv slides down, and how many such pieces
  int tiles_h, channel_blocks;
  int64_t grid;

  int pitch, row_pixels;  // of x1 in shared memory: bytes of a pixel, pixels of a row with its zeros
  int affine_offset, cheap_offset, x1_offset, smem_bytes;

  int64_t dram_read, dram_write, l2_read;  // as in LaunchPlan
  double recompute;
  int blocks_per_sm;
};

// How the map's width decides the way that pixels are read and x1 is kept.
enum class NchwMap : int {
  kWide8,     // W is a multiple of 8
  kWide4,     // W is a multiple of 4
  kFourteen,  // 14 × 14
  kSeven,     // 7 × 7
};

// How ghost/nchw cuts a module: whole rows of a map, or whole maps. See nchw/plan.cpp.
struct NchwPlan {
  NchwMap map;
  Path path;            // of the kernel: what TF32 has no kernel for is made in fp32
  int tiles;            // of 16 init channels that a warp multiplies: 1 … 4
  int tile_h, tiles_h;  // output rows of a block
  int strip_h;          // and of a thread of the cheap conv
  int block_c, warp_c;  // init channels of a block, and of a warp: 7 × 7 puts warps side by side
  int channel_blocks;
  int warps, warps_k;          // warps that share the input channels: 7 × 7 only
  int k_chunk;                 // input channels that shared memory has at a time: 7 × 7 of x, 3×3 of the weights
  int group_pitch;             // bytes between the weights of groups of channels there: IEEE fp32 only
  int row_chunks;              // vectors of pixels in a row
  int row_pitch, plane_pitch;  // bytes between x1's rows and channels in shared memory
  // Shared memory: [affines of x1 | cheap conv | gate | zeros | x1 | stage], in bytes.
  int cheap_offset, gate_offset, zero_offset, x1_offset, stage_offset, smem_bytes;

  int64_t dram_read, dram_write, l2_read;  // as in LaunchPlan
  double recompute;
  int blocks_per_sm;
};

// The plan of each family for a shape. block_c = 0 in one means that it doesn't take the shape.
struct ForwardPlan {
  LaunchPlan general;
  NhwcPlan nhwc;
  NchwPlan nchw;
};

// Pure functions. If plan_general() finds nothing, nothing fits the device.
LaunchPlan plan_general(const GhostShape& shape);
NhwcPlan plan_nhwc(const GhostShape& shape);
NchwPlan plan_nchw(const GhostShape& shape);
ForwardPlan plan_forward(const GhostShape& shape);

// Whether a call needs the kernels with all activations, gates and the residual, which shape.full then says. Plain ones
// have no activation or ReLU: channels_last, after both convolutions alike; NCHW, and no input gate.
bool needs_full_kernel(const GhostForwardParams& params);

// Which family computes a call: it depends on pointers and strides as well as on the shape.
Family choose(const GhostForwardParams& params, const ForwardPlan& plan);

// Queues the one kernel on ``stream`` (a cudaStream_t). Returns null, or what went wrong.
const char* launch_forward(const GhostForwardParams& params, const ForwardPlan& plan, void* stream);

// For tests and reports: one entry per compiled kernel.
struct KernelAttributes {
  char name[64];
  int registers, local_bytes, static_smem_bytes, max_threads, binary_version;
};
constexpr int kGhostKernelCount = 10;  // 2 × (3×3 in NCHW, any size and ratio in 2 layouts), 2 × any
constexpr int kNhwcKernelCount = 26;   // nhwc.h's: 2 paths × 10, 2 × 3
constexpr int kNchwKernelCount = 39;   // nchw.h's: 2 paths × 15, 3 of TF32, 6 of fp32
constexpr int kKernelCount = kGhostKernelCount + 3 * 14 + 8 + 3 * 10 + 35 + kNhwcKernelCount + kNchwKernelCount +
                             2;  // and bottleneck.h's, training.h's, layout.h's
const char* kernel_attributes(int index, KernelAttributes* attributes);

}  // namespace ghostfused
