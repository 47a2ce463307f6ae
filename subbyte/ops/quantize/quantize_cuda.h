// quantize and encode on a CUDA device: the formulas and size checks of quantize.h, device pointers, work put on the stream.
// Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed.
// Content is not checked. A group that holds a NaN or infinity, or that a perm entry outside [0, K) reaches into, gets scale
// NaN (quantize); encode gives such a value a code inside the format. A scale that overflows its dtype is stored as infinity.
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte::cuda {

void quantize(const QuantizeParams& p, Stream stream);
void encode(const QuantizeParams& p, Stream stream);

}  // namespace subbyte::cuda
