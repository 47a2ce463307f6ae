// Data parallelism with a replaceable backend: the core's own threads, or the host program's pool (PyTorch's, say), so that
// one process does not run two pools against each other.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace subbyte {

// body(context, begin, end) for disjoint ranges that cover [0, size). Results must not depend on how the range is cut.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
// A backend runs the body over [0, size), with ranges of at least `grain` (but the last), and returns when all are done.
using ParallelBackend = void (*)(int64_t size, int64_t grain, ParallelBody body, void* context);

// nullptr restores the built-in pool. Call before work starts.
void set_parallel_backend(ParallelBackend backend);
// Threads of the built-in pool, the caller included. Default: SUBBYTE_NUM_THREADS (1 to 4096), else the hardware's number.
void set_num_threads(int n);
int num_threads();

void parallel_for(int64_t size, int64_t grain, ParallelBody body, void* context);

// f(begin, end); f must not throw.
template <class F>
void parallel_for(int64_t size, int64_t grain, F&& f) {
  parallel_for(
      size, grain, [](void* c, int64_t b, int64_t e) { (*static_cast<std::remove_reference_t<F>*>(c))(b, e); },
      const_cast<void*>(static_cast<const void*>(std::addressof(f))));
}

}  // namespace subbyte
