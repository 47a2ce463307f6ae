// What the binary ops share: scales, signs, and the straight-through gradient of a sign.
#pragma once
#include <ATen/core/Tensor.h>

#include "subbyte_torch/packed_args.h"

namespace subbyte {

// Floating point, one element.
void check_scale(const char* op, const char* name, const at::Tensor& scale);
// Finite and above 0. On the CPU at once; on CUDA the device looks and the next op throws (subbyte/base/value_watch.h).
void check_scale_values(const char* op, const char* first_name, const at::Tensor& first, const char* second_name,
                        const at::Tensor& second);

// The scale as one element of what sums of `type` are scaled in: float64 for float64, else float32.
at::Tensor wide_scale(const at::Tensor& scale, at::ScalarType type);

// +1 where v >= 0, else -1.
at::Tensor signs_of(const at::Tensor& v, at::ScalarType type);
// Codes of the format "sign" as -1 and +1, [N, K].
at::Tensor signs_of_codes(const at::Tensor& codes, int64_t k, at::ScalarType type);

// 1[|v / clip| <= 1] g, compared in float32 or wider. `g` is the gradient of sign(v), of v's shape and dtype.
at::Tensor within_clip(const at::Tensor& v, const at::Tensor& clip, const at::Tensor& g);
// sum(g * signs) / sqrt(numel of `count_of`), of the shape and dtype of `clip`.
at::Tensor clip_gradient(const at::Tensor& g, const at::Tensor& signs, const at::Tensor& clip, const at::Tensor& count_of);

// The weight of binary_linear and binary_conv2d.
struct SignWeight {
  const OptionalTensor& weight;
  const OptionalTensor& codes;
};
// weight [n, rest...] floating point; codes uint8 [n, ceil(k/8)]; at least one of them. Returns n.
c10::SymInt check_sign_weight(const char* op, const SignWeight& w, const c10::SymInt& k, c10::SymIntArrayRef rest);
// Vectors [size], floating point.
void check_vector(const char* op, const char* name, const OptionalTensor& v, const c10::SymInt& size);

}  // namespace subbyte
