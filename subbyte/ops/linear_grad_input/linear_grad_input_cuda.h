// linear_grad_input on a CUDA device: the formula, size checks and error bound of linear_grad_input.h, device pointers, work
// put on the stream. Nothing is waited for, allocated or queried: graph capture is allowed. No atomic sums.
// Content is not checked: a column whose perm entry is outside [0, K) is written nowhere.
// Workspace: linear_grad_input_workspace_bytes() bytes of device memory, 64-byte aligned, content ignored.
// Errors: std::invalid_argument for sizes, missing arrays and a workspace that is too small; DeviceError when a launch is
// refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

namespace subbyte::cuda {

int64_t linear_grad_input_workspace_bytes(const LinearGradInputParams& p);
void linear_grad_input(const LinearGradInputParams& p, Stream stream);

// As linear_prefer_dense, for gx = gy W. Pure.
bool linear_grad_input_prefer_dense(int64_t m, DType dtype);

}  // namespace subbyte::cuda
