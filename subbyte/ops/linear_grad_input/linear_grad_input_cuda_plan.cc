#include "subbyte/ops/linear_grad_input/linear_grad_input_cuda.h"

namespace subbyte::cuda {

bool linear_grad_input_prefer_dense(int64_t m, DType dtype) { return dtype != DType::kF64 && m > 4; }

}  // namespace subbyte::cuda
