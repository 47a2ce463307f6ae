// Ternary weights: BitLinear and its parts as functions. T in {-1, 0, 1}, w = gamma * T with gamma a row (or one for all).
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// x rounded to `bits` bits a token (the last axis), as floating point values of x's dtype; float16 and bfloat16 are computed in
// float32:
//   s = max(max|x|, 1e-5), Q = 2^(bits-1) - 1;   y = s * clamp(rint(x / s * Q), -Q, Q) / Q         ties to even
// 2 <= bits <= 24 (Q is exact in float32). Gradient: straight-through, gx = gy, which is right at every point but those of the
// grid, since |x| <= s is never clipped. Without straight_through it is that of the formula as written, where rint has slope 0:
// only the element of largest magnitude of a token gets one. Under autocast x keeps its type.
at::Tensor activation_quant(const at::Tensor& x, int64_t bits = 8, bool straight_through = true);

// W [N, K] -> (T int8 [terms, N, K], gamma float32 [terms, N]): subbyte/ops/ternary/ternary.h, whose methods are "threshold"
// and "absmean"; per_channel is one gamma a row, otherwise one for the matrix, repeated. No gradient. On CUDA nothing is waited
// for: a NaN or infinite W, a ValueError on the CPU, gives a NaN gamma there.
std::tuple<at::Tensor, at::Tensor> ternary_decompose(const at::Tensor& w, int64_t terms = 1,
                                                     std::string_view method = "threshold", bool per_channel = true,
                                                     double threshold = 0.7);
// sum_i gamma_i T_i of that decomposition, dense, in W's dtype; straight-through gradient gW = g. The weight of quantization
// aware training (BitNet b1.58: absmean, one scale for the matrix).
at::Tensor ternarize(const at::Tensor& w, int64_t terms = 1, std::string_view method = "absmean", bool per_channel = false,
                     double threshold = 0.7);

// y = (x T^T) * gamma + bias: x [..., K], T [N, K] int8 or floating point (computed in x's dtype), gamma [], [N] or [1, N],
// bias [N] or none -> [..., N] in x's dtype. With T [terms, N, K] and gamma [terms, N] the terms are summed, after one product
// over x. gamma and bias are applied in the wider of the types. Differentiable to x, gamma, bias and a floating point T. T's
// values are not looked at (check_ternary does that); a packed T is subbyte::linear with gamma as its scales.
at::Tensor bitlinear(const at::Tensor& x, const at::Tensor& trits, const at::Tensor& gamma,
                     const OptionalTensor& bias = std::nullopt);
// ValueError naming the first value of T outside {-1, 0, 1}. Waits for the device.
void check_ternary(const char* op, const at::Tensor& trits);

// y = sum_i x W_i^T + bias, W_i = rows [i N, (i + 1) N) of a packed matrix of terms * N rows: one kernel pass over x, which is
// read (and with activation_bits = 8 quantized) once for all terms. x [..., K] -> [..., N]. `weight` [terms * N, K] receives
// the dense gradient. Differentiable to x, weight, scales, zeros, offsets and bias; with activation_bits = 8 straight-through.
at::Tensor multi_ternary_linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                                const OptionalTensor& bias = std::nullopt, int64_t activation_bits = 0);

// Ternary values (int8 or floating point, any shape) -> uint8 [ceil(count / 5)], and back to int8 of `shape`: the bytes of
// subbyte/formats/base3.h over the row-major array. ValueError for a value or byte that does not occur in it, for which the
// call waits for the device. No gradient.
at::Tensor pack_base3(const at::Tensor& trits);
at::Tensor unpack_base3(const at::Tensor& packed, at::IntArrayRef shape);

}  // namespace subbyte::ops
