// The core runs on PyTorch's threads: one pool a process, and torch.set_num_threads holds for both.
#include <ATen/Parallel.h>

#include "subbyte/base/parallel_for.h"

namespace subbyte {
namespace {

void torch_backend(int64_t size, int64_t grain, ParallelBody body, void* context) {
  at::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

[[maybe_unused]] const bool installed = [] {
  set_parallel_backend(&torch_backend);
  return true;
}();

}  // namespace
}  // namespace subbyte
