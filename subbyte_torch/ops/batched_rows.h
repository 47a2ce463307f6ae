// The two operands of a batched product x [..., M, K] times z [..., N, K] -> [..., M, N], leading dimensions broadcast.
#pragma once
#include <ATen/core/Tensor.h>

#include "subbyte_torch/convert.h"

namespace subbyte {

// Checks ranks, dtypes and K, and allocates the result; holds for fake tensors.
at::Tensor batched_product_shape(const char* op, const at::Tensor& x, const at::Tensor& z);

// One operand over the batch of the result y, rows contiguous. An operand that is the same for the whole batch is not repeated.
struct BatchedRows {
  at::Tensor tensor;  // keeps a copy alive
  int64_t batch = 1;
  int64_t batch_stride = 0;  // elements; 0 repeats
  DType dtype = DType::kF32;
};
BatchedRows batched_rows_of(const char* op, const char* name, const at::Tensor& v, const at::Tensor& y);

}  // namespace subbyte
