// linear_a8 on a CUDA device: the formula, size checks and error bound of linear_a8.h, device pointers, work put on the stream.
// x is quantized by the same rule, to the same bits, into the workspace; products are exact in int32; the float part is
// float32. Nothing is waited for, allocated or queried: graph capture is allowed. No atomic sums. Content is not checked: a
// perm entry outside [0, K) counts as a NaN in x, so that y is NaN. Workspace: linear_a8_workspace_bytes() bytes of device
// memory, 64-byte aligned, content ignored. Errors: std::invalid_argument for sizes, missing arrays and a workspace that is too
// small; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/linear_a8/linear_a8.h"

namespace subbyte::cuda {

int64_t linear_a8_workspace_bytes(const LinearA8Params& p);
void linear_a8(const LinearA8Params& p, Stream stream);

}  // namespace subbyte::cuda
