// embedding of 64 rows from tables of growing height: the time must follow the look-ups, not the table. The op is compared with
// the reference before it is timed.
#include "subbyte/ops/embedding/embedding.h"

#include <benchmark/benchmark.h>

#include <algorithm>

#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte {
namespace {

void embed(benchmark::State& state) {
  const int64_t rows = state.range(0), count = 64, k = 576;
  const testing::RandomMatrix m({"uint4", rows, k, 32, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 1);
  std::vector<int64_t> indices(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) indices[size_t(i)] = i * 7919 % rows;
  std::vector<float> out(size_t(count * k)), want(static_cast<size_t>(k));
  const EmbeddingParams p{m.w, indices.data(), true, count, out.data(), DType::kF32, k};
  embedding(p);
  for (int64_t i = 0; i < count; ++i) {
    reference::decode_row(m.w, indices[size_t(i)], want.data(), DType::kF32);
    if (!std::equal(want.begin(), want.end(), out.begin() + i * k)) return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) {
    embedding(p);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * count * k * 4);
}
BENCHMARK(embed)->Name("embedding/uint4/table_rows")->Arg(256)->Arg(4096)->Arg(16384)->UseRealTime();

}  // namespace
}  // namespace subbyte
