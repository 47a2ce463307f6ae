// Which CUDA kernel serves a linear_a8: a pure function of shape, format and alignment, tested without a device.
#pragma once
#include "subbyte/ops/linear_a8/linear_a8.h"

namespace subbyte::cuda {

enum class LinearA8CudaKernel : uint8_t {
  kRows,  // matrix units; widths 1, 2, 4, 8, groups of 32, 64, 128 or a scale a row
  kDot,   // dp4a, everything
};
LinearA8CudaKernel select_linear_a8_cuda_kernel(const LinearA8Params& p);

}  // namespace subbyte::cuda
