// linear on a CUDA device: the formula, size checks and error bound of linear.h, device pointers, work put on the stream.
// Nothing is waited for, allocated or queried: graph capture is allowed. The result is a function of its arguments and of the
// device model alone: no atomic sums.
// Content is not checked: a perm entry outside [0, K) makes its products NaN.
// Workspace: linear_workspace_bytes() bytes of device memory, 64-byte aligned, content ignored.
// Errors: std::invalid_argument for sizes, missing arrays and a workspace that is too small; DeviceError when a launch is
// refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/linear/linear.h"

namespace subbyte::cuda {

int64_t linear_workspace_bytes(const LinearParams& p);
void linear(const LinearParams& p, Stream stream);

// True when dequantize into x's dtype followed by a dense library product (cuBLAS) is the faster way for m rows of x, which
// a caller that has such a library and the memory for [N, K] values should then take. Its weights are rounded to x's dtype,
// which linear() does not do. Pure.
bool linear_prefer_dense(int64_t m, DType dtype);

}  // namespace subbyte::cuda
