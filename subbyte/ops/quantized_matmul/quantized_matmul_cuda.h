// quantized_matmul on a CUDA device: the formula and size checks of quantized_matmul.h, device pointers (the steps too: they
// are read by the kernels, so that a learned step never leaves the device), work put on the stream. The bits are those of the
// CPU. Nothing is waited for, allocated or queried: graph capture is allowed. What cannot be checked without waiting: a step
// that is NaN or infinite makes all of y NaN. Workspace: cuda::quantized_matmul_workspace_bytes() bytes of device memory,
// 64-byte aligned, content ignored. Errors: std::invalid_argument as in quantized_matmul.h, and for more than 2^31 tiles of 64
// x 64 in a matrix of y or 2^34 rows of an operand; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

namespace subbyte::cuda {

int64_t quantized_matmul_workspace_bytes(const QuantizedMatmulParams& p);
void quantized_matmul(const QuantizedMatmulParams& p, Stream stream);

}  // namespace subbyte::cuda
