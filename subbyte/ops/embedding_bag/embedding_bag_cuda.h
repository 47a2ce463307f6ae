// embedding_bag on a CUDA device: the formula and size checks of embedding_bag.h, device pointers, work put on the stream. Same
// bits as the CPU. Nothing is waited for, allocated or queried: graph capture is allowed. Content is not checked: an index
// outside [0, N) makes its bag NaN, offsets are cut to [0, count], a perm entry outside [0, K) writes nothing. Errors:
// std::invalid_argument for sizes and missing arrays; DeviceError when a launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/embedding_bag/embedding_bag.h"

namespace subbyte::cuda {

void embedding_bag(const EmbeddingBagParams& p, Stream stream);

}  // namespace subbyte::cuda
