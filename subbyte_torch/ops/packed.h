// The dispatcher's operations on a packed weight as C++ functions. Formulas stand in subbyte/ops/<op>/<op>.h, the arguments of
// a packed weight in packed_args.h. All are differentiable where a derivative exists, take CPU and (when built with CUDA) CUDA
// tensors, and throw c10::ValueError, c10::IndexError or c10::Error.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// uint8 codes [N, K] -> packed [N, row_bytes], and back. No gradient.
at::Tensor pack(const at::Tensor& codes, std::string_view format);
at::Tensor unpack(const at::Tensor& packed, std::string_view format, int64_t in_features);

// Float [N, K] -> (codes, scales, zeros). zero_kind: "fixed" (third result has 0 elements), "zeros" or "offsets". The scales
// have w's dtype unless scale_dtype says otherwise (float64 w: float32). No gradient.
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(
    const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme = "minmax",
    std::string_view zero_kind = "offsets", std::optional<at::ScalarType> scale_dtype = std::nullopt,
    const OptionalTensor& perm = std::nullopt, std::string_view rounding = "nearest", int64_t seed = 0, int64_t offset = 0);
// Codes of w on scales that are kept. encode_ writes into existing codes and bumps their version. No gradient.
at::Tensor encode(const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
                  const OptionalTensor& perm, std::string_view format, int64_t group_size,
                  std::string_view rounding = "nearest", int64_t seed = 0, int64_t offset = 0);
void encode_(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
             const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
             std::string_view rounding = "nearest", int64_t seed = 0, int64_t offset = 0);

// Dense [N, K] in `dtype` (the scales' when none). Differentiable to scales, zeros and offsets.
at::Tensor dequantize(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype = std::nullopt);

// x [..., K] -> y [..., N]. `weight`, float [N, K], receives the dense gradient; its values are never read. Differentiable
// twice, to x, weight, scales, zeros, offsets and bias.
at::Tensor linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias);
// gy [..., N] -> gx [..., K].
at::Tensor linear_grad_input(const at::Tensor& gy, SB_PACKED_PARAMS);
// gy [..., N], x [..., K] -> dense [N, K].
at::Tensor linear_grad_weight(const at::Tensor& gy, const at::Tensor& x);
// linear with x rounded to int8 on the way in; x_scale "row" or "row_group". Straight-through: the gradients of linear.
at::Tensor linear_a8(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                     std::string_view x_scale = "row");

}  // namespace subbyte::ops
