// Which CUDA kernel serves a linear: pure functions of shape, format and alignment, so that they are tested without a device.
#pragma once
#include "subbyte/ops/linear/linear.h"

namespace subbyte::cuda {

enum class LinearCudaKernel : uint8_t {
  kDot,   // few rows, everything
  kTile,  // many rows, everything
};
LinearCudaKernel select_linear_cuda_kernel(const LinearParams& p);

}  // namespace subbyte::cuda
