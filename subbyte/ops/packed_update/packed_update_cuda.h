// packed_update on a CUDA device: the formulas and size checks of packed_update.h, device pointers, work put on the stream.
// Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed, with `numbers` and `counter` for
// what changes from step to step. Content is not checked: an element whose perm entry is outside [0, K) is skipped.
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/packed_update/packed_update.h"

namespace subbyte::cuda {

void packed_update(const PackedUpdateParams& p, Stream stream);

}  // namespace subbyte::cuda
