// y[b, o, i, j] = S * scale * second_scale + bias[o],
//   S = sum over c, u, v of sign(x[b, g*C/G + c, i*stride_h - pad_h + u*dilation_h, j*stride_w - pad_w + v*dilation_w])
//                         * sign(w[o, c, u, v]),     g = o / (O/G)
// A position outside the image counts as pad_value: -1 or +1, or 0 for no contribution. sign(v) = +1 for v >= 0, else -1.
// Source: Rastegari et al., "XNOR-Net" (2016). A true cross-correlation, as PyTorch's conv2d.
//
// x       [B, C, H, W] float32, float16, bfloat16 or float64, any strides (elements): NCHW and channels_last alike
// weight  [O, C/G, KH, KW] contiguous, any float type: only signs are read; or weight_bits u8 [O, ceil(K/8)], the codes of a
//         "sign" matrix with K = C/G*KH*KW
// scale, second_scale  one float32 (float64 where x is float64), or null for 1; bias [O] of x's dtype, or null
// y       [B, O, OH, OW] of x's dtype, any strides; OH = binary_conv2d_out_size(H, KH, stride_h, pad_h, dilation_h)
// S is an exact integer. (float(S) * scale) * second_scale, then + bias, in float32 (float64: double), rounded once. Same bits
// on every path and thread count. A NaN makes NaN of every output whose window holds it, in its group; a NaN weight its output
// channel. B, C, O, H, W may be 0 where the padded image holds a kernel (C = 0 gives the bias). Spare bits of weight_bits are
// not read. Errors: std::invalid_argument for sizes, a kernel larger than the padded image, groups that divide C or O not,
// pad_value, both or neither of weight and weight_bits, missing arrays, a small workspace. Threads: parallel over B, output
// pixels and blocks of O. Workspace: binary_conv2d_workspace_bytes() bytes, 64-byte aligned, content ignored: bits of x and w,
// and a tile of gathered windows for each of at most 64 tasks.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

struct BinaryConv2dParams {
  const void* x = nullptr;
  DType dtype = DType::kF32;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t x_strides[4] = {0, 0, 0, 0};
  const void* weight = nullptr;
  DType weight_dtype = DType::kF32;
  const uint8_t* weight_bits = nullptr;
  int64_t out_channels = 0, kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  int pad_value = 0;
  const void* scale = nullptr;
  const void* second_scale = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_strides[4] = {0, 0, 0, 0};
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// 0 when the kernel does not fit into the padded image.
constexpr int64_t binary_conv2d_out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}
// Throws for sizes as binary_conv2d does; needs no pointer.
int64_t binary_conv2d_workspace_bytes(const BinaryConv2dParams& p);
void binary_conv2d(const BinaryConv2dParams& p);

// What both paths refuse. check_geometry looks at sizes alone; check_sizes at pointers too (memory is not read), and is false
// when there is nothing to write.
void check_geometry(const BinaryConv2dParams& p);
bool check_sizes(const BinaryConv2dParams& p);

namespace reference {
void binary_conv2d(const BinaryConv2dParams& p) noexcept;
}

}  // namespace subbyte
