// embedding_grad on a CUDA device: the formula and size checks of embedding_grad.h, device pointers, work put on the stream.
// Same bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed. Content is not checked: a source
// outside gy counts as NaN, ranges are cut to [0, count).
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/embedding_grad/embedding_grad.h"

namespace subbyte::cuda {

void embedding_grad(const EmbeddingGradParams& p, Stream stream);

}  // namespace subbyte::cuda
