// packed_update, one thread, kernel by kernel: bytes read and written a second, to be read against `packed_update_triad` (two
// arrays read, one of them written) of the same run, and items (weights) a second. A kernel is compared with the reference
// before it is timed.
#include <benchmark/benchmark.h>

#include <string>

#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/packed_update/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kRows = 2048, kColumns = 4096;

// What the memory allows a step: a[i] += b[i] over arrays that no cache holds.
void packed_update_triad(benchmark::State& state) {
  std::vector<float> a(size_t(kRows * kColumns), 1.0f), b(a);
  for (auto _ : state) {
    for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    benchmark::DoNotOptimize(a.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * int64_t(a.size()) * 12);
}
BENCHMARK(packed_update_triad)->UseRealTime();

struct Buffers {
  explicit Buffers(const PackedUpdateParams& p, const testing::RandomMatrix& matrix) : codes(matrix.codes) {
    for (int i = 0; i < 2; ++i) {
      const MomentType type = i == 0 ? p.m.type : p.v.type;
      moments[i].resize(size_t(kRows * moment_row_bytes(type, kColumns)));
      absmax[i].resize(size_t(kRows * kColumns / kMomentBlock));
    }
  }
  void into(PackedUpdateParams& p) {
    p.codes = codes.data();
    p.m.data = moments[0].data();
    p.m.absmax = absmax[0].data();
    p.v.data = moments[1].data();
    p.v.absmax = absmax[1].data();
  }
  bool operator==(const Buffers&) const = default;
  std::vector<uint8_t> codes, moments[2];
  std::vector<float> absmax[2];
};

void update(benchmark::State& state, const PackedUpdateKernel& kernel, const char* format, UpdateRule rule, MomentType moment,
            DType grad_type) {
  const testing::RandomMatrix matrix({format, kRows, kColumns, 64, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 1);
  std::vector<uint8_t> grad(size_t(kRows * kColumns * dtype_bytes(grad_type)));
  std::mt19937 rng(1);
  for (int64_t i = 0; i < kRows * kColumns; ++i) store_float(grad.data(), grad_type, i, float(int(rng() % 2001) - 1000) / 4000);
  PackedUpdateParams p;
  p.rule = rule;
  p.w = matrix.w;
  p.grad = grad.data();
  p.grad_dtype = grad_type;
  p.grad_stride = kColumns;
  p.m.type = moment;
  p.v.type = rule == UpdateRule::kAdamW ? moment : MomentType::kNone;
  p.lr = 1e-3;
  p.weight_decay = 0.01;
  p.beta1 = 0.9;
  p.beta2 = 0.999;
  p.eps = 1e-8;
  p.bias_correction1 = 0.5;
  p.bias_correction2 = 0.1;
  p.momentum = rule == UpdateRule::kSgd ? 0.9 : 0;
  Buffers got(p, matrix), want(p, matrix);
  for (int step = 0; step < 2; ++step) {
    want.into(p);
    reference::update_rows(p, 0, 8);
    got.into(p);
    kernel.update_rows(p, 0, 8);
  }
  if (got != want) return state.SkipWithError("differs from the reference");
  for (auto _ : state) {
    kernel.update_rows(p, 0, kRows);
    benchmark::ClobberMemory();
  }
  const int64_t weights = kRows * kColumns, blocks = weights / kMomentBlock;
  const int64_t states = moment_row_bytes(p.m.type, weights) + moment_row_bytes(p.v.type, weights) +
                         4 * blocks * (is_blockwise(p.m.type) + is_blockwise(p.v.type));
  const int64_t bytes = 2 * (matrix.w.codes_bytes() + states) + weights * dtype_bytes(grad_type) + weights / 64 * 4;
  state.SetBytesProcessed(state.iterations() * bytes);
  state.SetItemsProcessed(state.iterations() * weights);
}

const bool registered = [] {
  struct Case {
    const char *name, *format;
    UpdateRule rule;
    MomentType moment;
    DType grad;
  };
  const Case cases[] = {{"adamw/uint8/q8", "uint8", UpdateRule::kAdamW, MomentType::kQ8, DType::kBF16},
                        {"adamw/uint4/q8", "uint4", UpdateRule::kAdamW, MomentType::kQ8, DType::kBF16},
                        {"adamw/uint4/q4", "uint4", UpdateRule::kAdamW, MomentType::kQ4, DType::kBF16},
                        {"adamw/uint4/bf16", "uint4", UpdateRule::kAdamW, MomentType::kBF16, DType::kBF16},
                        {"adamw/uint4/f32", "uint4", UpdateRule::kAdamW, MomentType::kF32, DType::kF32},
                        {"sgd/uint4/bf16", "uint4", UpdateRule::kSgd, MomentType::kBF16, DType::kBF16},
                        {"sign/sign/q8", "sign", UpdateRule::kSign, MomentType::kQ8, DType::kBF16}};
  for (const PackedUpdateKernel& kernel : packed_update_kernels()) {
    if (kernel.isa > detected_isa()) continue;
    for (const Case& c : cases)
      benchmark::RegisterBenchmark(
          (std::string(kernel.name) + "/" + c.name + "/grad_" + dtype_name(c.grad)).c_str(),
          [&kernel, c](benchmark::State& state) { update(state, kernel, c.format, c.rule, c.moment, c.grad); })
          ->UseRealTime();
  }
  return true;
}();

}  // namespace
}  // namespace subbyte
