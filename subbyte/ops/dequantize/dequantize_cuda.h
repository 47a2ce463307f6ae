// dequantize on a CUDA device: the formula and size checks of dequantize.h, device pointers, work put on the stream.
// Same bits as the CPU, except that which NaN a NaN is may differ. Nothing is waited for, allocated or queried: graph
// capture is allowed. A perm entry outside [0, K) writes nothing.
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/dequantize/dequantize.h"

namespace subbyte::cuda {

void dequantize(const DequantizeParams& p, Stream stream);

}  // namespace subbyte::cuda
