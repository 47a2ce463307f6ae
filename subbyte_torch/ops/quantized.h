// Operations whose two operands are integers on learned steps: q(v, s) = clamp(rint(v / s), -2^(bits-1), 2^(bits-1) - 1), ties
// to even, s = max(step, eps). Values and rounding: subbyte/ops/quantized_matmul/quantized_matmul.h; gradients:
// step_gradient.h. Steps are tensors of one floating-point number on x's device and stay there; a step that is NaN or infinite
// is a ValueError; on a GPU it makes the result NaN and the next op throws (device_checks.h).
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// x [..., M, K], z [..., N, K] of one dtype, leading dimensions broadcast -> y [..., M, N] of that dtype,
// y = sx sz q(x, sx) q(z, sz)^T. Differentiable to x, z and both steps.
at::Tensor quantized_matmul(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step, const at::Tensor& z_step,
                            int64_t bits = 4, double eps = 1e-5);

// With X = x + shift in x's dtype: y = sx sw q(X, sx) q(W, sw)^T + bias, x [..., K] -> y [..., N] of x's dtype.
// W is `weight`, floating point [N, K] of any dtype, or `codes`, uint8 [N, ceil(K bits / 8)], a "uint<bits>" stream of
// q(W, sw) + 2^(bits-1): exactly one of them; both give the same bits. shift [K], bias [N].
// Differentiable to x, shift, both steps, bias, and weight. clip_weight_gradient = false gives weights beyond the range their
// gradient too, as the original did. With codes, w_step gets the plain derivative of y, since no value before rounding is left.
at::Tensor quantized_linear(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                            const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift = std::nullopt,
                            const OptionalTensor& bias = std::nullopt, int64_t bits = 4, double eps = 1e-5,
                            bool clip_weight_gradient = true);

// The same as a convolution: x [N, C, H, W], weight [O, C/groups, kh, kw] or codes uint8 [O, ceil(C/groups kh kw bits / 8)],
// shift [C], bias [O] -> y [N, O, OH, OW], in channels_last when x is. Padding is zeros around X. kernel_size is (kh, kw);
// kernel_size, stride, padding and dilation hold two numbers.
at::Tensor quantized_conv2d(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                            const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                            const OptionalTensor& bias, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups = 1, int64_t bits = 4,
                            double eps = 1e-5, bool clip_weight_gradient = true);

}  // namespace subbyte::ops
