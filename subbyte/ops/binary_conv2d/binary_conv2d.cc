// Idea: every pixel is packed once along its channels; a window is then a few runs of bytes, gathered into a row of bits and
// counted against the weights by binary_matmul's kernels (one for each instruction set, see kernels.inc there). A window costs
// K/8 bytes of copying for O * K products. A padding of 0 is counted as -1 and put right afterwards: the sum of the weights of
// each tap is known.
#include "subbyte/ops/binary_conv2d/binary_conv2d.h"

#include <bit>
#include <cstring>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/kernels.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte {
namespace {

constexpr int64_t kTile = 32;       // windows, and output channels, in a tile of counts
constexpr int64_t kBlock = 256;     // output channels that share one gathering of windows
constexpr int64_t kMostSlots = 64;  // tasks with a tile of windows of their own

struct Geometry {
  int64_t out_h, out_w, c_count, o_count, taps, tap_bytes, pixel_bytes, row_bytes;
  int64_t windows, tiles, blocks, tasks, slots;
  // Places in the workspace, bytes.
  int64_t pixels, pixel_nan, weights, weight_nan, tap_sums, slots_begin, slot_bytes, total;
};

// A slot: kTile rows of bits, kTile NaN marks, and for each window the number and the list of its taps outside the image.
Geometry lay_out(const BinaryConv2dParams& p) {
  Geometry g;
  g.out_h = binary_conv2d_out_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  g.out_w = binary_conv2d_out_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  g.c_count = p.channels / p.groups;
  g.o_count = p.out_channels / p.groups;
  g.taps = p.kernel_h * p.kernel_w;
  g.tap_bytes = stream_bytes(g.c_count, 1);
  g.pixel_bytes = p.groups * g.tap_bytes;
  g.row_bytes = round_up(g.taps * g.tap_bytes, kBitRowAlign);
  g.windows = p.batch * g.out_h * g.out_w;
  g.tiles = ceil_div(g.windows, kTile);
  g.blocks = ceil_div(g.o_count, kBlock);
  g.tasks = g.tiles * g.blocks * p.groups;
  g.slots = min_i64(g.tasks, kMostSlots);
  const int64_t image = p.batch * p.height * p.width;
  g.pixels = 0;
  g.pixel_nan = round_up(image * g.pixel_bytes, 64);
  g.weights = round_up(g.pixel_nan + image * p.groups, 64);
  g.weight_nan = g.weights + p.out_channels * g.row_bytes;
  g.tap_sums = round_up(g.weight_nan + p.out_channels, 64);
  g.slots_begin = round_up(g.tap_sums + p.out_channels * g.taps * 4, 64);
  g.slot_bytes = kTile * g.row_bytes + round_up(kTile * (1 + 4 * (g.taps + 1)), 64);
  g.total = g.slots_begin + g.slots * g.slot_bytes;
  return g;
}

constexpr int64_t kChunk = 512;  // pixels of one channel that are packed at a time

// Byte i, bit j of the result is byte j, bit i of v.
uint64_t transpose_bits(uint64_t v) {
  uint64_t t = (v ^ (v >> 7)) & 0x00aa00aa00aa00aaull;
  v ^= t ^ (t << 7);
  t = (v ^ (v >> 14)) & 0x0000cccc0000ccccull;
  v ^= t ^ (t << 14);
  t = (v ^ (v >> 28)) & 0x00000000f0f0f0f0ull;
  return v ^ t ^ (t << 28);
}

// Up to 8 channels of one image row whose pixels are contiguous: packed along the row, then turned.
void pack_channels(const BinaryConv2dParams& p, const Geometry& g, int64_t from, int64_t channels, uint8_t* out, uint8_t* marks,
                   PackSignsFn pack) {
  for (int64_t w0 = 0; w0 < p.width; w0 += kChunk) {
    const int64_t count = min_i64(kChunk, p.width - w0);
    uint8_t rows[8][kChunk / 8] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t begin = from + c * p.x_strides[1] + w0;
      if (!pack_sign_row(p.x, p.dtype, begin, count, rows[c], pack)) continue;
      for (int64_t w = 0; w < count; ++w) {
        bool none = false;
        is_plus(p.x, p.dtype, begin + w, none);
        marks[(w0 + w) * p.groups] = uint8_t(marks[(w0 + w) * p.groups] | unsigned(none));
      }
    }
    for (int64_t w = 0; w < count; w += 8) {
      uint64_t block = 0;
      for (int c = 0; c < 8; ++c) block |= uint64_t(rows[c][w / 8]) << (8 * c);
      block = transpose_bits(block);
      const int64_t last = min_i64(8, count - w);
      for (int64_t i = 0; i < last; ++i) out[(w0 + w + i) * g.pixel_bytes] = uint8_t(block >> (8 * i));
    }
  }
}

// Bits of one image row: channels along the bits of a pixel, groups on bytes.
void pack_image_row(const BinaryConv2dParams& p, const Geometry& g, int64_t row, uint8_t* pixels, uint8_t* nan,
                    PackSignsFn pack) {
  const int64_t begin = row / p.height * p.x_strides[0] + row % p.height * p.x_strides[2];
  std::memset(nan, 0, size_t(p.width * p.groups));
  if (g.c_count == 0) return;
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t first = begin + group * g.c_count * p.x_strides[1];
    uint8_t* out = pixels + group * g.tap_bytes;
    if (p.x_strides[1] == 1) {
      for (int64_t w = 0; w < p.width; ++w)
        nan[w * p.groups + group] =
            pack_sign_row(p.x, p.dtype, first + w * p.x_strides[3], g.c_count, out + w * g.pixel_bytes, pack);
    } else if (p.x_strides[3] == 1) {
      for (int64_t c = 0; c < g.c_count; c += 8)
        pack_channels(p, g, first + c * p.x_strides[1], min_i64(8, g.c_count - c), out + c / 8, nan + group, pack);
    } else {
      for (int64_t w = 0; w < p.width; ++w) {
        bool none = false;
        for (int64_t c = 0; c < g.c_count; c += 8) {
          unsigned bits = 0;
          for (int64_t i = c; i < min_i64(c + 8, g.c_count); ++i)
            bits |= unsigned(is_plus(p.x, p.dtype, first + w * p.x_strides[3] + i * p.x_strides[1], none)) << (i - c);
          out[w * g.pixel_bytes + c / 8] = uint8_t(bits);
        }
        nan[w * p.groups + group] = none;
      }
    }
  }
}

// The weights of one output channel in the order of a window: taps, then channels. Returns whether one is NaN.
bool pack_weights(const BinaryConv2dParams& p, const Geometry& g, int64_t o, uint8_t* row, int32_t* tap_sums) {
  std::memset(row, 0, size_t(g.row_bytes));
  const int64_t k = g.c_count * g.taps;
  bool nan = false;
  for (int64_t tap = 0; tap < g.taps; ++tap) {
    uint8_t* out = row + tap * g.tap_bytes;
    int32_t sum = 0;
    for (int64_t c = 0; c < g.c_count; ++c) {
      const int64_t at = c * g.taps + tap;
      const bool plus = p.weight_bits != nullptr ? get_code(p.weight_bits + o * stream_bytes(k, 1), at, 1) != 0
                                                 : is_plus(p.weight, p.weight_dtype, o * k + at, nan);
      out[c / 8] = uint8_t(out[c / 8] | unsigned(plus) << (c % 8));
      sum += plus ? 1 : -1;
    }
    tap_sums[tap] = sum;
  }
  return nan;
}

struct Window {
  int64_t image, h, w;  // batch index, first row and column (may lie outside)
};

Window window_of(const BinaryConv2dParams& p, const Geometry& g, int64_t at) {
  return {at / (g.out_h * g.out_w), at / g.out_w % g.out_h * p.stride_h - p.pad_h, at % g.out_w * p.stride_w - p.pad_w};
}

// Gathers the bits of a window of one group; lists the taps outside the image. Returns whether the window holds a NaN.
bool gather(const BinaryConv2dParams& p, const Geometry& g, const uint8_t* pixels, const uint8_t* nan, const Window& window,
            int64_t group, uint8_t* row, int32_t* outside) {
  unsigned any = 0;
  int32_t count = 0;
  const uint8_t fill = p.pad_value > 0 ? 0xff : 0;
  const uint8_t last = g.c_count % 8 == 0 ? 0xff : uint8_t((1u << (g.c_count % 8)) - 1u);
  for (int64_t u = 0; u < p.kernel_h; ++u) {
    const int64_t h = window.h + u * p.dilation_h;
    const bool row_inside = h >= 0 && h < p.height;
    for (int64_t v = 0; v < p.kernel_w; ++v) {
      const int64_t w = window.w + v * p.dilation_w, tap = u * p.kernel_w + v;
      uint8_t* out = row + tap * g.tap_bytes;
      if (row_inside && w >= 0 && w < p.width) {
        const int64_t pixel = (window.image * p.height + h) * p.width + w;
        std::memcpy(out, pixels + pixel * g.pixel_bytes + group * g.tap_bytes, size_t(g.tap_bytes));
        any |= nan[pixel * p.groups + group];
      } else {
        std::memset(out, fill, size_t(g.tap_bytes));
        if (g.tap_bytes > 0) out[g.tap_bytes - 1] &= last;
        outside[++count] = int32_t(tap);
      }
    }
  }
  outside[0] = count;
  const int64_t used = g.taps * g.tap_bytes;
  std::memset(row + used, 0, size_t(g.row_bytes - used));
  return any != 0;
}

}  // namespace

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dParams& p) {
  check_geometry(p);
  return lay_out(p).total;
}

void check_geometry(const BinaryConv2dParams& p) {
  const char* op = "binary_conv2d";
  check_arg(p.batch >= 0 && p.channels >= 0 && p.height >= 0 && p.width >= 0 && p.out_channels >= 0, op,
            ": sizes are B = ", p.batch, ", C = ", p.channels, ", H = ", p.height, ", W = ", p.width, ", O = ", p.out_channels,
            ", expected at least 0");
  check_arg(p.kernel_h >= 1 && p.kernel_w >= 1 && p.stride_h >= 1 && p.stride_w >= 1 && p.dilation_h >= 1 && p.dilation_w >= 1,
            op, ": kernel ", p.kernel_h, "x", p.kernel_w, ", stride ", p.stride_h, "x", p.stride_w, ", dilation ", p.dilation_h,
            "x", p.dilation_w, ", expected at least 1");
  check_arg(p.pad_h >= 0 && p.pad_w >= 0, op, ": padding is ", p.pad_h, "x", p.pad_w, ", expected at least 0");
  check_arg(p.pad_value >= -1 && p.pad_value <= 1, op, ": pad_value is ", p.pad_value, ", expected -1, 0 or 1");
  check_arg(p.groups >= 1 && p.channels % p.groups == 0 && p.out_channels % p.groups == 0, op, ": groups is ", p.groups,
            ", expected a divisor of C = ", p.channels, " and O = ", p.out_channels);
  const int64_t out_h = binary_conv2d_out_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  const int64_t out_w = binary_conv2d_out_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  check_arg(out_h >= 1 && out_w >= 1, op, ": the kernel ", p.kernel_h, "x", p.kernel_w, " with dilation ", p.dilation_h, "x",
            p.dilation_w, " does not fit into the padded image ", p.height + 2 * p.pad_h, "x", p.width + 2 * p.pad_w);
}

bool check_sizes(const BinaryConv2dParams& p) {
  const char* op = "binary_conv2d";
  check_geometry(p);
  if (p.batch == 0 || p.out_channels == 0) return false;
  const bool reads = p.channels > 0;
  check_arg(p.y != nullptr && (!reads || p.height * p.width == 0 || p.x != nullptr), op, ": x or y are missing");
  check_arg(!reads || (p.weight != nullptr) != (p.weight_bits != nullptr), op, ": expected either weight or weight_bits");
  return true;
}

void binary_conv2d(const BinaryConv2dParams& p) {
  const char* op = "binary_conv2d";
  if (!check_sizes(p)) return;
  const Geometry g = lay_out(p);
  check_arg(p.workspace != nullptr && p.workspace_bytes >= g.total, op, ": the workspace has ", p.workspace_bytes,
            " bytes, expected ", g.total);
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  uint8_t* pixels = base + g.pixels;
  uint8_t* pixel_nan = base + g.pixel_nan;
  uint8_t* weights = base + g.weights;
  uint8_t* weight_nan = base + g.weight_nan;
  auto* tap_sums = reinterpret_cast<int32_t*>(base + g.tap_sums);
  const BinaryMatmulKernel& kernel = select_binary_matmul_kernel(active_isa());
  const int64_t rows = p.batch * p.height;
  parallel_for(rows, max_i64(1, 32768 / max_i64(1, p.channels * p.width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      pack_image_row(p, g, r, pixels + r * p.width * g.pixel_bytes, pixel_nan + r * p.width * p.groups, kernel.pack);
  });
  parallel_for(p.out_channels, max_i64(1, 16384 / max_i64(1, g.c_count * g.taps)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      weight_nan[o] = pack_weights(p, g, o, weights + o * g.row_bytes, tap_sums + o * g.taps);
  });
  const int64_t used_bytes = g.taps * g.tap_bytes;
  parallel_for(g.slots, 1, [&](int64_t slot_begin, int64_t slot_end) {
    alignas(64) int32_t counts[kTile * kTile];
    const bool f32 = p.dtype == DType::kF32;
    const ScaledSum scaled(f32 ? p.scale : nullptr, f32 ? p.second_scale : nullptr, f32 ? p.bias : nullptr);
    for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
      uint8_t* bits = base + g.slots_begin + slot * g.slot_bytes;
      auto* outside = reinterpret_cast<int32_t*>(bits + kTile * g.row_bytes);
      uint8_t* nan = reinterpret_cast<uint8_t*>(outside + kTile * (g.taps + 1));
      for (int64_t task = slot; task < g.tasks; task += g.slots) {
        const int64_t group = task / g.blocks % p.groups, first = task / (g.blocks * p.groups) * kTile;
        const int64_t o_begin = group * g.o_count + task % g.blocks * kBlock;
        const int64_t o_end = min_i64(o_begin + kBlock, (group + 1) * g.o_count), count = min_i64(kTile, g.windows - first);
        for (int64_t i = 0; i < count; ++i)
          nan[i] = gather(p, g, pixels, pixel_nan, window_of(p, g, first + i), group, bits + i * g.row_bytes,
                          outside + i * (g.taps + 1));
        for (int64_t o0 = o_begin; o0 < o_end; o0 += kTile) {
          const int64_t n_count = min_i64(kTile, o_end - o0);
          kernel.fn(bits, count, weights + o0 * g.row_bytes, n_count, g.row_bytes, used_bytes, counts, kTile);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t window = first + i;
            const int64_t at = window / (g.out_h * g.out_w) * p.y_strides[0] + window / g.out_w % g.out_h * p.y_strides[2] +
                               window % g.out_w * p.y_strides[3];
            const int32_t* list = outside + i * (g.taps + 1);
            const int32_t wrong = p.pad_value == 0 ? list[0] : 0;
            if (wrong == 0 && f32) {
              float* y = static_cast<float*>(p.y) + at + o0 * p.y_strides[1];
              for (int64_t n = 0; n < n_count; ++n)
                y[n * p.y_strides[1]] = scaled.of(g.c_count * g.taps - 2 * int64_t(counts[i * kTile + n]),
                                                  (nan[i] | weight_nan[o0 + n]) != 0, o0 + n);
              continue;
            }
            for (int64_t n = 0; n < n_count; ++n) {
              const int64_t o = o0 + n;
              int64_t sum = g.c_count * g.taps - 2 * int64_t(counts[i * kTile + n]);
              for (int32_t t = 1; t <= wrong; ++t) sum += tap_sums[o * g.taps + list[t]];
              store_scaled_sum(p.y, p.dtype, at + o * p.y_strides[1], sum, (nan[i] | weight_nan[o]) != 0, p.scale,
                               p.second_scale, p.bias, o);
            }
          }
        }
      }
    }
  });
}

}  // namespace subbyte
