// dequantize, one thread, kernel by kernel: bytes written a second, to be read against `store` (filling the same array) of the
// same run. A kernel is compared with the reference before it is timed.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kRows = 1024, kColumns = 4096;

void store(benchmark::State& state) {
  std::vector<float> out(size_t(kRows * kColumns));
  float v = 0;
  for (auto _ : state) {
    std::fill(out.begin(), out.end(), v += 1);
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * int64_t(out.size() * sizeof(float)));
}
BENCHMARK(store)->UseRealTime();

void decode(benchmark::State& state, const DecodeKernel& kernel, const testing::MatrixShape& shape, DType t) {
  const testing::RandomMatrix m(shape, 1);
  const int64_t row_bytes = kColumns * dtype_bytes(t);
  std::vector<uint8_t> out(size_t(kRows * row_bytes)), want(static_cast<size_t>(row_bytes));
  for (int64_t n = 0; n < kRows; ++n) kernel.decode_row(m.w, n, out.data() + n * row_bytes, t);
  for (int64_t n = 0; n < kRows; n += 101) {
    reference::decode_row(m.w, n, want.data(), t);
    if (!std::equal(want.begin(), want.end(), out.begin() + n * row_bytes))
      return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) {
    for (int64_t n = 0; n < kRows; ++n) kernel.decode_row(m.w, n, out.data() + n * row_bytes, t);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * int64_t(out.size()));
}

const bool registered = [] {
  for (const DecodeKernel& kernel : decode_kernels()) {
    if (kernel.isa > detected_isa()) continue;
    for (const char* format : {"sign", "uint3", "uint4", "uint8"})
      for (int64_t group : {32, 128})
        for (DType t : {DType::kF32, DType::kBF16})
          benchmark::RegisterBenchmark(
              (std::string("dequantize/") + kernel.name + "/" + format + "/g" + std::to_string(group) + "/" + dtype_name(t))
                  .c_str(),
              [&kernel, format, group, t](benchmark::State& state) {
                decode(state, kernel, {format, kRows, kColumns, group, ZeroKind::kOffsets, DType::kF16, DType::kF16}, t);
              })
              ->UseRealTime();
  }
  return true;
}();

}  // namespace
}  // namespace subbyte
