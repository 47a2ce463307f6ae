// binary_conv2d on a CUDA device: formula and checks of binary_conv2d.h, every pointer (scale too) a device pointer, work put
// on the stream. Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed. Workspace:
// cuda::binary_conv2d_workspace_bytes() bytes, 64-byte aligned. Errors: std::invalid_argument as on the CPU, and beyond 2^31
// tiles of 32 windows x 32 channels; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/binary_conv2d/binary_conv2d.h"

namespace subbyte::cuda {

int64_t binary_conv2d_workspace_bytes(const BinaryConv2dParams& p);
void binary_conv2d(const BinaryConv2dParams& p, Stream stream);

}  // namespace subbyte::cuda
