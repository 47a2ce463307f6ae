// Idea: pixels and weights are packed along channels into words; no window is ever gathered. A warp owns 32 windows and 4
// output channels: each lane walks its window's taps, one word of pixels against the same word of four weights, which the warp
// reads as a broadcast. Bound by __popc and by the loads of pixel words, which hit L1 since neighbouring windows overlap.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_conv2d/binary_conv2d_cuda.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte::cuda {
namespace {

constexpr int kThreads = 256, kWindows = 32, kEach = 4, kChannels = kThreads / kWindows * kEach;

struct Geometry {
  int64_t out_h, out_w, c_count, o_count, taps, words, windows;
};

__host__ __device__ Geometry geometry_of(const BinaryConv2dParams& p) {
  Geometry g;
  g.out_h = binary_conv2d_out_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  g.out_w = binary_conv2d_out_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  g.c_count = p.channels / p.groups;
  g.o_count = p.out_channels / p.groups;
  g.taps = p.kernel_h * p.kernel_w;
  g.words = ceil_div(g.c_count, 32);
  g.windows = p.batch * g.out_h * g.out_w;
  return g;
}

// Word (pixel, group, w) of the image: 32 channels of a pixel. Neighbouring threads take neighbouring pixels. A NaN sets the
// mark of its pixel and group, which the memset before has cleared; several threads may write the same 1.
__global__ void __launch_bounds__(kThreads) pack_pixels(BinaryConv2dParams p, Geometry g, uint32_t* out, uint8_t* nan) {
  const int64_t image = p.batch * p.height * p.width, parts = p.groups * g.words, total = image * parts;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < total; at += int64_t(gridDim.x) * kThreads) {
    const int64_t pixel = at % image, part = at / image, group = part / g.words, w = part % g.words;
    const int64_t begin = pixel / (p.height * p.width) * p.x_strides[0] + pixel / p.width % p.height * p.x_strides[2] +
                          pixel % p.width * p.x_strides[3] + group * g.c_count * p.x_strides[1];
    uint32_t word = 0;
    bool none = false;
    for (int i = 0; i < 32; ++i) {
      const int64_t c = w * 32 + i;
      if (c < g.c_count) word |= uint32_t(is_plus(p.x, p.dtype, begin + c * p.x_strides[1], none)) << i;
    }
    out[pixel * parts + part] = word;
    if (none) nan[pixel * p.groups + group] = 1;
  }
}

__global__ void __launch_bounds__(kThreads) pack_weights(BinaryConv2dParams p, Geometry g, uint32_t* out, uint8_t* nan) {
  const int64_t row = g.taps * g.words, total = p.out_channels * row, k = g.c_count * g.taps;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < total; at += int64_t(gridDim.x) * kThreads) {
    const int64_t o = at / row, tap = at % row / g.words, w = at % g.words;
    uint32_t word = 0;
    bool none = false;
    for (int i = 0; i < 32; ++i) {
      const int64_t c = w * 32 + i;
      if (c >= g.c_count) break;
      const int64_t from = c * g.taps + tap;
      const bool plus = p.weight_bits != nullptr ? get_code(p.weight_bits + o * stream_bytes(k, 1), from, 1) != 0
                                                 : is_plus(p.weight, p.weight_dtype, o * k + from, none);
      word |= uint32_t(plus) << i;
    }
    out[at] = word;
    if (none) nan[o] = 1;
  }
}

__global__ void __launch_bounds__(kThreads)
    count_windows(BinaryConv2dParams p, Geometry g, const uint32_t* pixels, const uint8_t* pixel_nan, const uint32_t* weights,
                  const uint8_t* weight_nan, int64_t channel_tiles) {
  const int64_t tile = blockIdx.x, tiles_a_group = channel_tiles, group = tile / tiles_a_group % p.groups;
  const int64_t window = tile / (tiles_a_group * p.groups) * kWindows + threadIdx.x % kWindows;
  const int64_t first = tile % tiles_a_group * kChannels + threadIdx.x / kWindows * kEach;  // within the group
  if (window >= g.windows || first >= g.o_count) return;
  const int64_t image = window / (g.out_h * g.out_w);
  const int64_t h0 = window / g.out_w % g.out_h * p.stride_h - p.pad_h, w0 = window % g.out_w * p.stride_w - p.pad_w;
  const int64_t row = g.taps * g.words, parts = p.groups * g.words;
  const uint32_t* w[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) w[j] = weights + (group * g.o_count + min_i64(first + j, g.o_count - 1)) * row;
  int64_t counted = 0;  // channels of the taps that contribute
  int count[kEach] = {};
  bool nan = false;
  for (int64_t u = 0; u < p.kernel_h; ++u)
    for (int64_t v = 0; v < p.kernel_w; ++v) {
      const int64_t h = h0 + u * p.dilation_h, l = w0 + v * p.dilation_w, tap = u * p.kernel_w + v;
      const bool inside = h >= 0 && h < p.height && l >= 0 && l < p.width;
      if (!inside && p.pad_value == 0) continue;
      counted += g.c_count;
      const int64_t pixel = inside ? (image * p.height + h) * p.width + l : 0;
      if (inside) nan = nan || pixel_nan[pixel * p.groups + group] != 0;
      const uint32_t* x = pixels + pixel * parts + group * g.words;
      for (int64_t i = 0; i < g.words; ++i) {
        const int64_t left = g.c_count - i * 32;
        const uint32_t fill = p.pad_value < 0 ? 0u : left < 32 ? (1u << left) - 1u : 0xffffffffu;
        const uint32_t bits = inside ? x[i] : fill;
#pragma unroll
        for (int j = 0; j < kEach; ++j) count[j] += __popc(bits ^ w[j][tap * g.words + i]);
      }
    }
  const int64_t at = image * p.y_strides[0] + window / g.out_w % g.out_h * p.y_strides[2] + window % g.out_w * p.y_strides[3];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t o = group * g.o_count + first + j;
    if (first + j >= g.o_count) continue;
    store_scaled_sum(p.y, p.dtype, at + o * p.y_strides[1], counted - 2 * int64_t(count[j]), nan || weight_nan[o] != 0, p.scale,
                     p.second_scale, p.bias, o);
  }
}

struct Workspace {
  int64_t weights, pixel_nan, weight_nan, total;
};

Workspace lay_out(const BinaryConv2dParams& p, const Geometry& g) {
  Workspace w;
  const int64_t image = p.batch * p.height * p.width;
  w.weights = round_up(image * p.groups * g.words * 4, 64);
  w.pixel_nan = round_up(w.weights + p.out_channels * g.taps * g.words * 4, 64);
  w.weight_nan = w.pixel_nan + image * p.groups;
  w.total = w.weight_nan + p.out_channels;
  return w;
}

}  // namespace

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dParams& p) {
  check_geometry(p);
  return lay_out(p, geometry_of(p)).total;
}

void binary_conv2d(const BinaryConv2dParams& p, Stream stream) {
  const char* op = "binary_conv2d";
  if (!check_sizes(p)) return;
  const Geometry g = geometry_of(p);
  const Workspace w = lay_out(p, g);
  check_arg(p.workspace != nullptr && p.workspace_bytes >= w.total, op, ": the workspace has ", p.workspace_bytes,
            " bytes, expected ", w.total);
  const int64_t channel_tiles = ceil_div(g.o_count, kChannels),
                tiles = ceil_div(g.windows, kWindows) * channel_tiles * p.groups;
  check_arg(tiles <= 0x7fffffff, op, ": the output needs ", tiles, " tiles, expected at most 2^31 - 1");
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  auto* pixels = reinterpret_cast<uint32_t*>(base);
  auto* weights = reinterpret_cast<uint32_t*>(base + w.weights);
  check(cudaMemsetAsync(base + w.pixel_nan, 0, size_t(w.total - w.pixel_nan), stream_of(stream)), op);
  const auto grid_of = [](int64_t threads) { return unsigned(max_i64(1, min_i64(ceil_div(threads, kThreads), 1 << 16))); };
  pack_pixels<<<grid_of(p.batch * p.height * p.width * p.groups * g.words), kThreads, 0, stream_of(stream)>>>(
      p, g, pixels, base + w.pixel_nan);
  check_launch(op);
  pack_weights<<<grid_of(p.out_channels * g.taps * g.words), kThreads, 0, stream_of(stream)>>>(p, g, weights,
                                                                                               base + w.weight_nan);
  check_launch(op);
  count_windows<<<unsigned(tiles), kThreads, 0, stream_of(stream)>>>(p, g, pixels, base + w.pixel_nan, weights,
                                                                     base + w.weight_nan, channel_tiles);
  check_launch(op);
}

}  // namespace subbyte::cuda
