// binary_matmul on a CUDA device: formula and checks of binary_matmul.h, every pointer (scale too) a device pointer, work put
// on the stream. Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed. Workspace:
// cuda::binary_matmul_workspace_bytes() bytes, 64-byte aligned. M * N * B may need at most 2^31 tiles of 64 x 64. Errors:
// std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/binary_matmul/binary_matmul.h"

namespace subbyte::cuda {

int64_t binary_matmul_workspace_bytes(const BinaryMatmulParams& p);
void binary_matmul(const BinaryMatmulParams& p, Stream stream);

}  // namespace subbyte::cuda
