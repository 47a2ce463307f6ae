// embedding_update on a CUDA device: the formula and size checks of embedding_update.h, device pointers, work put on the
// stream. Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed. Content is not checked:
// a row outside [0, N), or a slot outside [0, momentum_rows), is left out; a row named twice has no defined result. Errors:
// std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/embedding_update/embedding_update.h"

namespace subbyte::cuda {

void embedding_update(const EmbeddingUpdateParams& p, Stream stream);

}  // namespace subbyte::cuda
