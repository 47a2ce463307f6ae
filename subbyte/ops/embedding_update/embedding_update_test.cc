#include "subbyte/ops/embedding_update/embedding_update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"

namespace subbyte {
namespace {

using Mode = EmbeddingUpdateMode;

bool bit_of(const std::vector<uint8_t>& bytes, int64_t row, int64_t k, int64_t row_bytes) {
  return bytes[size_t(row * row_bytes + k / 8)] >> (k % 8) & 1;
}

// A table of 9 rows of which 1, 4, 5 and 8 are touched; their averages lie in other slots.
struct Case {
  Case(int64_t k, Mode mode, bool masked, bool int8, uint32_t seed) : rng(seed), bytes(ceil_div(k, 8)) {
    auto random_bytes = [&](int64_t count) {
      std::vector<uint8_t> v(static_cast<size_t>(count));
      for (uint8_t& b : v) b = uint8_t(rng());
      return v;
    };
    codes = random_bytes(9 * bytes);
    signs = random_bytes(4 * bytes);
    mask = random_bytes(4 * bytes);
    floats.resize(size_t(6 * k));
    ints.resize(size_t(6 * k));
    std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
    for (float& f : floats) f = 0.02f * unit(rng);
    for (int8_t& i : ints) i = int8_t(int(rng() % 255) - 127);
    p.mode = mode;
    p.n = 9;
    p.k = k;
    p.rows = rows.data();
    p.count = 4;
    p.sign_bits = signs.data();
    if (masked) p.mask = mask.data();
    p.momentum_is_int8 = int8;
    p.momentum = int8 ? static_cast<void*>(ints.data()) : floats.data();
    p.momentum_rows = 6;
    p.slots = slots.data();
    p.lr = int8 ? 100.0f : 0.5f;
    p.one_minus_beta = 0.1f;
    p.seed = 99;
    p.offset = 7;
    p.codes = codes.data();
  }
  std::mt19937 rng;
  int64_t bytes;
  std::vector<int64_t> rows = {1, 4, 5, 8}, slots = {3, 0, 5, 2};
  std::vector<uint8_t> codes, signs, mask;
  std::vector<float> floats;
  std::vector<int8_t> ints;
  EmbeddingUpdateParams p;
};

TEST(EmbeddingUpdate, EveryModeIsItsFormulaOnTheNamedRowsAndNothingElseMoves) {
  uint32_t seed = 0;
  for (int64_t k : {1, 7, 8, 9, 20, 64, 77})
    for (Mode mode : {Mode::kDescent, Mode::kXor, Mode::kMomentum})
      for (int flags = 0; flags < 4; ++flags) {
        Case c(k, mode, flags & 1, flags & 2, ++seed);
        const std::vector<uint8_t> before = c.codes;
        const std::vector<float> floats = c.floats;
        const std::vector<int8_t> ints = c.ints;
        embedding_update(c.p);
        for (int64_t row = 0; row < 9; ++row) {
          const auto found = std::find(c.rows.begin(), c.rows.end(), row);
          const int64_t i = found - c.rows.begin();
          for (int64_t b = 0; b < c.bytes * 8; ++b) {
            const bool old = bit_of(before, row, b, c.bytes), now = bit_of(c.codes, row, b, c.bytes);
            if (found == c.rows.end() || b >= k || (c.p.mask && !bit_of(c.mask, i, b, c.bytes))) {
              ASSERT_EQ(now, old) << "row " << row << " bit " << b << " moved";
              continue;
            }
            const bool g = bit_of(c.signs, i, b, c.bytes);
            if (mode == Mode::kDescent) ASSERT_EQ(now, !g);
            if (mode == Mode::kXor) ASSERT_EQ(now, old != g);
            if (mode != Mode::kMomentum) continue;
            const int64_t m = c.slots[size_t(i)] * k + b;
            const float was = c.p.momentum_is_int8 ? float(ints[size_t(m)]) : floats[size_t(m)];
            const float v = g ? c.p.lr : -c.p.lr, step = c.p.one_minus_beta * (v - was);
            float s = was + step;
            if (c.p.momentum_is_int8) {
              const float u = uniform24(philox_word(99, 7, uint64_t(row * k + b)));
              s = std::floor(s) + (u < s - std::floor(s) ? 1.0f : 0.0f);
              s = std::min(127.0f, std::max(-127.0f, s));
              ASSERT_EQ(float(c.ints[size_t(m)]), s);
            } else {
              ASSERT_EQ(c.floats[size_t(m)], s);
            }
            ASSERT_EQ(now, s > 0 ? false : s < 0 ? true : old);
          }
        }
        for (int64_t m = 0; m < 6 * k; ++m)
          if (const int64_t slot = m / k; slot == 1 || slot == 4) {
            ASSERT_EQ(c.floats[size_t(m)], floats[size_t(m)]);
            ASSERT_EQ(c.ints[size_t(m)], ints[size_t(m)]);
          }
      }
}

TEST(EmbeddingUpdate, ADampedBitFlipsWhenTheGradientsOutweighTheStartAndNotBefore) {
  // s starts at -start for w = +1; with one sign of gradients it crosses 0 after ln(1 + start / lr) / (1 - beta) steps, nearly.
  const float start = 0.5f, lr = 1.0f, step = 0.01f;
  uint8_t codes = 1;
  const uint8_t signs = 1;
  const int64_t row = 0;
  float s = -start;
  EmbeddingUpdateParams p;
  p.mode = Mode::kMomentum;
  p.codes = &codes;
  p.n = p.k = p.count = p.momentum_rows = 1;
  p.rows = p.slots = &row;
  p.sign_bits = &signs;
  p.momentum = &s;
  p.lr = lr;
  p.one_minus_beta = step;
  int steps = 0;
  for (; (codes & 1) != 0 && steps < 1000; ++steps) embedding_update(p);
  EXPECT_NEAR(steps, std::log(1 + start / lr) / step, 2);
}

TEST(EmbeddingUpdate, TheRoundedAverageIsUnbiased) {
  const int64_t k = 1 << 16;
  std::vector<uint8_t> codes(k / 8, 0), signs(k / 8, 0xff);
  std::vector<int8_t> momentum(k, -20);
  const int64_t row = 0;
  EmbeddingUpdateParams p;
  p.mode = Mode::kMomentum;
  p.codes = codes.data();
  p.n = p.count = p.momentum_rows = 1;
  p.k = k;
  p.rows = p.slots = &row;
  p.sign_bits = signs.data();
  p.momentum = momentum.data();
  p.momentum_is_int8 = true;
  p.lr = 100;
  p.one_minus_beta = 0.002f;
  embedding_update(p);
  double mean = 0;
  for (int8_t m : momentum) mean += m;
  const double want = -20 + 0.24, deviation = std::sqrt(0.24 * 0.76 / double(k));
  EXPECT_NEAR(mean / double(k), want, 6 * deviation);
}

TEST(EmbeddingUpdate, TheNumberOfThreadsDoesNotShow) {
  const int before = num_threads();
  std::vector<uint8_t> first;
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    Case c(4099, Mode::kMomentum, false, true, 5);
    embedding_update(c.p);
    if (first.empty()) first = c.codes;
    EXPECT_EQ(c.codes, first);
  }
  set_num_threads(before);
}

TEST(EmbeddingUpdate, RowsOutsideTheTableOrOutOfOrderAreRefusedAndNothingIsWritten) {
  auto refused = [&](auto change, bool range) {
    Case c(20, Mode::kMomentum, false, false, 6);
    const std::vector<uint8_t> before = c.codes;
    change(c);
    if (range) EXPECT_THROW(embedding_update(c.p), std::out_of_range);
    else EXPECT_THROW(embedding_update(c.p), std::invalid_argument);
    EXPECT_EQ(c.codes, before);
  };
  refused([](Case& c) { c.rows[3] = 9; }, true);
  refused([](Case& c) { c.rows[0] = -1; }, true);
  refused([](Case& c) { c.rows[1] = 1; }, false);
  refused([](Case& c) { c.slots[1] = 6; }, false);
  refused([](Case& c) { c.p.slots = nullptr; }, false);
  refused([](Case& c) { c.p.one_minus_beta = 0; }, false);
  refused([](Case& c) { c.p.lr = NAN; }, false);
  EXPECT_NO_THROW(embedding_update(EmbeddingUpdateParams{}));
}

}  // namespace
}  // namespace subbyte
