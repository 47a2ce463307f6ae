// quantize and encode, one thread, kernel by kernel: weights a second. A kernel is compared with the reference before it is
// timed.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/quantize/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kRows = 64, kColumns = 4096;

enum class Part { kChoose, kNearest, kStochastic };

void quantize_part(benchmark::State& state, const QuantizeKernel& kernel, const char* format, DType t, Part part) {
  testing::RandomMatrix m({format, kRows, kColumns, 64, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 1);
  std::vector<uint8_t> w(size_t(kRows * kColumns * dtype_bytes(t)));
  for (int64_t i = 0; i < kRows * kColumns; ++i) store_float(w.data(), t, i, float(int(m.rng() % 2001) - 1000) / 4000);
  std::vector<uint8_t> codes(m.codes.size()), want(codes);
  QuantizeParams p;
  p.w = w.data();
  p.w_dtype = t;
  p.w_stride = kColumns;
  p.out = m.w;
  p.scales = m.scales.data();
  p.zeros = m.zeros.data();
  p.seed = 5;
  reference::choose_rows(p, 0, kRows);
  p.rounding = part == Part::kStochastic ? Rounding::kStochastic : Rounding::kNearest;
  p.codes = want.data();
  reference::encode_rows(p, 0, kRows);
  const std::vector<uint8_t> want_scales = m.scales;
  p.codes = codes.data();
  std::fill(m.scales.begin(), m.scales.end(), uint8_t{0});
  kernel.choose_rows(p, 0, kRows);
  kernel.encode_rows(p, 0, kRows);
  if (codes != want || m.scales != want_scales) return state.SkipWithError("differs from the reference");
  for (auto _ : state) {
    if (part == Part::kChoose) kernel.choose_rows(p, 0, kRows);
    else kernel.encode_rows(p, 0, kRows);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kColumns);
}

const bool registered = [] {
  for (const QuantizeKernel& kernel : quantize_kernels()) {
    if (kernel.isa > detected_isa()) continue;
    for (const char* format : {"sign", "uint4", "uint8"})
      for (DType t : {DType::kF32, DType::kBF16})
        for (Part part : {Part::kChoose, Part::kNearest, Part::kStochastic}) {
          const char* parts[] = {"choose", "encode_nearest", "encode_stochastic"};
          benchmark::RegisterBenchmark(
              (std::string(parts[int(part)]) + "/" + kernel.name + "/" + format + "/" + dtype_name(t)).c_str(),
              [&kernel, format, t, part](benchmark::State& state) { quantize_part(state, kernel, format, t, part); })
              ->UseRealTime();
        }
  }
  return true;
}();

}  // namespace
}  // namespace subbyte
