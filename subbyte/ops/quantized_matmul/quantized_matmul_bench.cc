// quantized_matmul, both operands float32, quantized on the way in. Every product kernel of the table that this machine has,
// forced through its instruction set, on one thread and on all. Counters: Gops, 2 B M N K a second (best call), and us. The
// shapes: the scores and the context of an attention layer (12 heads of 64 and 128), and a layer of 1024 by 1024. PyTorch's
// float32 product beside it: bench/compare_torch.py. A row is timed only after it has given the reference's bits.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/quantized_matmul/kernels.h"

namespace subbyte {
namespace {

struct Shape {
  const char* name;
  int64_t batch, m, n, k;
};
constexpr Shape kShapes[] = {
    {"scores", 12, 256, 256, 64}, {"context", 12, 256, 128, 256}, {"layer", 1, 256, 1024, 1024}, {"row", 1, 1, 1024, 1024}};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};

void run(benchmark::State& state, const Shape& shape, int bits, Isa isa, int threads, bool packed) {
  std::vector<float> x(size_t(shape.batch * shape.m * shape.k)), z(size_t(shape.batch * shape.n * shape.k)),
      y(size_t(shape.batch * shape.m * shape.n)), want(y.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = uniform24(philox_word(1, 0, i)) * 2 - 1;
  for (size_t i = 0; i < z.size(); ++i) z[i] = uniform24(philox_word(2, 0, i)) * 2 - 1;
  const int64_t code_bytes = stream_bytes(shape.k, bits);
  std::vector<uint8_t> codes(size_t(shape.n * code_bytes));
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(philox_word(3, 0, i));
  const float x_step = 1.2f / float(1 << (bits - 1)), z_step = 0.9f / float(1 << (bits - 1));
  QuantizedMatmulParams p;
  p.x = x.data();
  if (packed) p.z_codes = codes.data();
  else p.z = z.data();
  p.batch = shape.batch;
  p.m = shape.m;
  p.n = shape.n;
  p.k = p.x_stride = p.z_stride = shape.k;
  p.x_batch_stride = shape.m * shape.k;
  p.z_batch_stride = shape.n * shape.k;
  p.y_stride = shape.n;
  p.y_batch_stride = shape.m * shape.n;
  p.bits = bits;
  p.x_step = &x_step;
  p.z_step = &z_step;
  p.workspace_bytes = quantized_matmul_workspace_bytes(p);
  const std::unique_ptr<void, AlignedDelete> workspace(std::aligned_alloc(64, size_t(round_up(p.workspace_bytes, 64))));
  if (workspace == nullptr) throw std::bad_alloc();
  p.workspace = workspace.get();
  const int before = num_threads();
  set_num_threads(threads);
  const ScopedIsa forced(isa);
  // The first batch against the reference, which is slow.
  QuantizedMatmulParams one = p;
  one.batch = 1;
  one.m = std::min<int64_t>(shape.m, 5);
  one.y = want.data();
  reference::quantized_matmul(one);
  p.y = y.data();
  quantized_matmul(p);
  if (!std::equal(want.begin(), want.begin() + one.m * shape.n, y.begin())) {
    state.SkipWithError("differs from the reference");
    set_num_threads(before);
    return;
  }
  double best = 1e30;
  for (auto _ : state) {
    const double start = seconds();
    quantized_matmul(p);
    const double took = seconds() - start;
    best = std::min(best, took);
    state.SetIterationTime(took);
  }
  set_num_threads(before);
  state.counters["us"] = best * 1e6;
  state.counters["Gops"] = 2e-9 * double(shape.batch * shape.m * shape.n * shape.k) / best;
}

const bool registered = [] {
  const int all = num_threads();
  for (const Shape& shape : kShapes)
    for (const int bits : {4, 8})
      for (const bool packed : {false, true}) {
        if (packed && shape.batch > 1) continue;
        for (const QuantizedMatmulKernel& kernel : quantized_matmul_kernels()) {
          if (kernel.isa == Isa::kScalar || kernel.isa > detected_isa()) continue;
          if (&select_quantized_matmul_kernel(bits, kernel.isa) != &kernel) continue;
          for (int threads = 1; threads <= all; threads += std::max(1, all - 1)) {
            const std::string name = std::string(kernel.name) + "/" + shape.name + "/bits:" + std::to_string(bits) +
                                     (packed ? "/packed" : "") + "/threads:" + std::to_string(threads);
            benchmark::RegisterBenchmark(
                name.c_str(),
                [=, &shape, &kernel](benchmark::State& state) { run(state, shape, bits, kernel.isa, threads, packed); })
                ->UseManualTime()
                ->Unit(benchmark::kMicrosecond);
          }
        }
      }
  return true;
}();

}  // namespace
}  // namespace subbyte
