// The way from tensors to the core's quantized_matmul, on any device; shared by quantized_matmul, _linear and _conv2d.
#pragma once
#include "subbyte/ops/quantized_matmul/quantized_matmul.h"
#include "subbyte_torch/convert.h"

namespace subbyte {

// Runs p on the device of `anchor`, the tensor x. Sets p's steps and workspace. Everything else is the caller's.
void run_quantized_product(const char* op, QuantizedMatmulParams p, const at::Tensor& x_step, const char* z_step_name,
                           const at::Tensor& z_step, const at::Tensor& anchor);

// The weight as rows [N, K] for p.z or p.z_codes: contiguous, on x's device. Keeps a copy alive.
struct WeightRows {
  at::Tensor rows;
  bool packed = false;
  DType dtype = DType::kF32;
  // Points p at rows [begin, begin + count) of K columns.
  void set(QuantizedMatmulParams& p, int64_t begin, int64_t count) const;
};
WeightRows weight_rows_of(const char* op, const OptionalTensor& weight, const OptionalTensor& codes, const at::Tensor& x);

}  // namespace subbyte
