// embedding on a CUDA device: the formula and size checks of embedding.h, device pointers (indices too), work put on the
// stream. Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed.
// An index outside [0, N) makes its row of out NaN; a perm entry outside [0, K) writes nothing.
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/embedding/embedding.h"

namespace subbyte::cuda {

void embedding(const EmbeddingParams& p, Stream stream);

}  // namespace subbyte::cuda
