// Products of signs: sign(v) = +1 for v >= 0 (also -0), else -1. Formulas of the values:
// subbyte/ops/binary_matmul/binary_matmul.h and binary_conv2d.h; gradients straight-through, as written below. The sums are
// exact integers until the scale; of two scales the first multiplies first, and each product is rounded (float32, for float64
// float64).
//
// Scales and clips are floating-point tensors of one element, which stay on their device: nothing is read back. A scale that is
// not above 0, or not finite, is a ValueError; on CUDA the next op throws it (device_checks.h) and the formula holds as it
// stands. Bias and shift are cast to x's dtype. Under autocast binary_linear and binary_conv2d take operands as they are, since
// casting gains nothing; binary_matmul widens the narrower operand.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// x [..., M, K], z [..., N, K] of one dtype, leading dimensions broadcast -> y [..., M, N] = (sign x . sign z^T) x_clip z_clip.
// With U = z_clip (G . sign z), summed over broadcast dimensions:
//   dL/dx = 1[|x / x_clip| <= 1] U      dL/dx_clip = sum(U sign x) / sqrt(numel x)      and the same for z.
at::Tensor binary_matmul(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip, const at::Tensor& z_clip);

// X = x + shift; y [..., N] = (sign X . sign W^T) scale_a scale_w + bias. x [..., K]; W: `weight`, floating point [N, K], or
// `codes`, uint8 [N, ceil(K/8)] of the format "sign"; with both, codes give the values and `weight` only receives the gradient.
// With U = scale_w (G . sign W) and V = scale_a (G^T . sign X):
//   dL/dx = 1[|X / scale_a| <= 1] U       dL/dshift: its sum over rows      dL/dweight = V (a float, not rescaled, no mask)
//   dL/dscale_a = sum(U sign X) / sqrt(numel X)      dL/dscale_w = sum(V sign W) / sqrt(numel W)
at::Tensor binary_linear(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                         const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                         const OptionalTensor& bias = std::nullopt);

// X = x + shift, shift [C]; y [B, O, OH, OW] = conv2d(sign X, sign W) scale_a scale_w + bias, with pad_value (-1, 0 or 1)
// outside the image. x [B, C, H, W], NCHW or channels_last (then y too). W as in binary_linear, [O, C/groups, KH, KW], K =
// C/groups*KH*KW. Gradients as in binary_linear with convolutions for products; the borders of pad_value count in dL/dweight
// and dL/dscale_a, whose divisor is sqrt(numel x).
at::Tensor binary_conv2d(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                         const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                         const OptionalTensor& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride = {1, 1},
                         at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1}, int64_t groups = 1,
                         int64_t pad_value = 0);

}  // namespace subbyte::ops
