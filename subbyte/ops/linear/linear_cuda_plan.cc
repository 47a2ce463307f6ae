#include "subbyte/ops/linear/linear_cuda_plan.h"

#include "subbyte/ops/linear/linear_cuda.h"

namespace subbyte::cuda {

LinearCudaKernel select_linear_cuda_kernel(const LinearParams& p) {
  return p.m <= 16 ? LinearCudaKernel::kDot : LinearCudaKernel::kTile;
}

bool linear_prefer_dense(int64_t m, DType dtype) { return dtype != DType::kF64 && m > 16; }

}  // namespace subbyte::cuda
