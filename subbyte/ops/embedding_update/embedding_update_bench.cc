// One training step of a sign table: 1024 touched rows of 512 columns, in tables of growing height. The time must follow the
// touched rows. Sums of gy (embedding_grad, four look-ups a row) and the update are compared with the formula before they are
// timed.
#include "subbyte/ops/embedding_update/embedding_update.h"

#include <benchmark/benchmark.h>

#include "subbyte/ops/embedding_grad/embedding_grad.h"
#include "subbyte/ops/embedding_grad/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kRows = 1024, kColumns = 512, kLookUps = 4096;

struct Step {
  explicit Step(int64_t height)
      : codes(size_t(height * kColumns / 8), 0x5a),
        gy(size_t(kLookUps * kColumns)),
        signs(size_t(kRows * kColumns / 8)),
        momentum(size_t(kRows * kColumns), 20) {
    for (size_t i = 0; i < gy.size(); ++i) gy[i] = float(int64_t(i * 2654435761u % 2001) - 1000);
    for (int64_t i = 0; i < kRows; ++i) {
      rows.push_back(i * (height / kRows));
      begins.push_back(i * 4);
      ends.push_back(i * 4 + 4);
      slots.push_back(i);
    }
    for (int64_t j = 0; j < kLookUps; ++j) sources.push_back(j * 1021 % kLookUps);
    grad.gy = gy.data();
    grad.gy_rows = grad.count = kLookUps;
    grad.gy_stride = grad.k = kColumns;
    grad.sources = sources.data();
    grad.begins = begins.data();
    grad.ends = ends.data();
    grad.rows = kRows;
    grad.sign_bits = signs.data();
    update.codes = codes.data();
    update.n = height;
    update.k = kColumns;
    update.rows = rows.data();
    update.count = kRows;
    update.sign_bits = signs.data();
    update.momentum = momentum.data();
    update.momentum_is_int8 = true;
    update.momentum_rows = kRows;
    update.slots = slots.data();
    update.lr = 127;
  }

  bool gradient_matches() {
    embedding_grad(grad);
    const std::vector<uint8_t> got = signs;
    for (int64_t t = 0; t < kRows; ++t) reference::embedding_grad_piece(grad, t, 0, kColumns);
    return got == signs;
  }
  bool descent_matches() {
    update.mode = EmbeddingUpdateMode::kDescent;
    embedding_update(update);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t b = 0; b < kColumns / 8; ++b)
        if (codes[size_t(rows[size_t(i)] * kColumns / 8 + b)] != uint8_t(~signs[size_t(i * kColumns / 8 + b)])) return false;
    return true;
  }

  std::vector<uint8_t> codes;
  std::vector<float> gy;
  std::vector<uint8_t> signs;
  std::vector<int8_t> momentum;
  std::vector<int64_t> rows, begins, ends, sources, slots;
  EmbeddingGradParams grad;
  EmbeddingUpdateParams update;
};

void train_step(benchmark::State& state, EmbeddingUpdateMode mode) {
  Step step(state.range(0));
  if (!step.gradient_matches() || !step.descent_matches()) return state.SkipWithError("differs from the formula");
  step.update.mode = mode;
  for (auto _ : state) {
    embedding_grad(step.grad);
    embedding_update(step.update);
    ++step.update.offset;
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kRows * kColumns);
}
BENCHMARK_CAPTURE(train_step, descent, EmbeddingUpdateMode::kDescent)
    ->Name("embedding_update/descent/table_rows")
    ->Arg(10000)
    ->Arg(1000000)
    ->UseRealTime();
BENCHMARK_CAPTURE(train_step, momentum, EmbeddingUpdateMode::kMomentum)
    ->Name("embedding_update/momentum_int8/table_rows")
    ->Arg(10000)
    ->Arg(1000000)
    ->UseRealTime();

}  // namespace
}  // namespace subbyte
