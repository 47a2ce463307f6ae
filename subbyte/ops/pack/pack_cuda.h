// pack and unpack on a CUDA device: the formulas and size checks of pack.h, device pointers, work put on the stream.
// Same bits as the CPU. Nothing is waited for, allocated or queried, so both may be captured in a CUDA graph.
// Content is not checked: of a code outside its format, bits above the format's width are dropped (a ternary 3 is kept).
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when the launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/pack/pack.h"

namespace subbyte::cuda {

void pack(const PackParams& p, Stream stream);
void unpack(const UnpackParams& p, Stream stream);

}  // namespace subbyte::cuda
