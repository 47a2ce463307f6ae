#include "subbyte/ops/ternary/ternary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/base3.h"

namespace subbyte {
namespace {

std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 r(seed);
  std::normal_distribution<float> d;
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = d(r);
  return v;
}

struct Decomposed {
  std::vector<int8_t> trits;
  std::vector<float> gamma;
};
Decomposed decompose(const std::vector<float>& w, int64_t n, int64_t k, TernaryDecomposeParams p = {}) {
  Decomposed out;
  out.trits.assign(size_t(p.terms * n * k), 99);
  out.gamma.assign(size_t(p.terms * n), std::numeric_limits<float>::quiet_NaN());
  p.w = w.data();
  p.n = n;
  p.k = p.w_stride = k;
  p.trits = out.trits.data();
  p.gamma = out.gamma.data();
  ternary_decompose(p);
  return out;
}

TEST(TernaryDecompose, ThresholdRuleOfOneRowIsTheHandComputedOne) {
  // mean |w| = 1, limit 0.7: -0.5 and 0.7 fall to 0 (the limit itself is not above it), gamma = (2 + 0.8) / 2.
  const Decomposed d = decompose({2.0f, -0.5f, 0.7f, -0.8f}, 1, 4);
  EXPECT_EQ(d.trits, (std::vector<int8_t>{1, 0, 0, -1}));
  EXPECT_FLOAT_EQ(d.gamma[0], 1.4f);
}

TEST(TernaryDecompose, AbsMeanRuleOfOneRowRoundsTiesToEven) {
  TernaryDecomposeParams p;
  p.method = TernaryMethod::kAbsMean;
  const Decomposed d = decompose({2.0f, -0.5f, 0.5f, -1.0f}, 1, 4, p);  // mean 1: 2 -> 1 by the clamp, +-0.5 -> 0
  EXPECT_EQ(d.trits, (std::vector<int8_t>{1, 0, 0, -1}));
  EXPECT_EQ(d.gamma[0], 1.0f);
}

TEST(TernaryDecompose, OneScaleForTheMatrixStandsInEveryRow) {
  TernaryDecomposeParams p;
  p.scale = TernaryScale::kPerMatrix;
  const Decomposed d = decompose({2.0f, -0.5f, 0.7f, -0.8f}, 2, 2, p);
  EXPECT_EQ(d.trits, (std::vector<int8_t>{1, 0, 0, -1}));
  EXPECT_FLOAT_EQ(d.gamma[0], 1.4f);
  EXPECT_EQ(d.gamma[0], d.gamma[1]);
}

TEST(TernaryDecompose, SquaredErrorFallsWithEveryTermInEveryRow) {
  const int64_t n = 7, k = 131;
  const std::vector<float> w = normal(n * k, 3);
  std::vector<double> last(size_t(n), std::numeric_limits<double>::infinity());
  for (int64_t terms = 1; terms <= 5; ++terms) {
    TernaryDecomposeParams p;
    p.terms = terms;
    const Decomposed d = decompose(w, n, k, p);
    for (int64_t row = 0; row < n; ++row) {
      double error = 0;
      for (int64_t c = 0; c < k; ++c) {
        double r = w[size_t(row * k + c)];
        for (int64_t t = 0; t < terms; ++t) r -= double(d.gamma[size_t(t * n + row)]) * d.trits[size_t((t * n + row) * k + c)];
        error += r * r;
      }
      EXPECT_LT(error, last[size_t(row)]) << "terms " << terms << " row " << row;
      last[size_t(row)] = error;
    }
  }
}

TEST(TernaryDecompose, ZeroRowsAndEmptyMatricesGiveZeros) {
  for (TernaryMethod m : {TernaryMethod::kThreshold, TernaryMethod::kAbsMean}) {
    TernaryDecomposeParams p;
    p.method = m;
    const Decomposed zero = decompose({0.0f, 0.0f, 0.0f}, 1, 3, p);
    EXPECT_EQ(zero.trits, (std::vector<int8_t>{0, 0, 0}));
    EXPECT_EQ(zero.gamma[0], 0.0f);
    EXPECT_EQ(decompose({}, 2, 0, p).gamma, (std::vector<float>{0.0f, 0.0f}));
    EXPECT_TRUE(decompose({}, 0, 5, p).gamma.empty());
  }
}

TEST(TernaryDecompose, DoesNotDependOnTheNumberOfThreads) {
  const std::vector<float> w = normal(400 * 300, 5);
  TernaryDecomposeParams p;
  p.terms = 3;
  set_num_threads(1);
  const Decomposed one = decompose(w, 400, 300, p);
  set_num_threads(3);
  const Decomposed three = decompose(w, 400, 300, p);
  EXPECT_EQ(one.trits, three.trits);
  EXPECT_EQ(one.gamma, three.gamma);
}

TEST(TernaryDecompose, RefusesWhatItCannotMean) {
  TernaryDecomposeParams p;
  p.terms = 0;
  EXPECT_THROW(decompose({1.0f}, 1, 1, p), std::invalid_argument);
  p.terms = 1;
  p.threshold = -0.1f;
  EXPECT_THROW(decompose({1.0f}, 1, 1, p), std::invalid_argument);
  p.threshold = 0.7f;
  EXPECT_THROW(decompose({std::numeric_limits<float>::infinity()}, 1, 1, p), std::invalid_argument);
  EXPECT_THROW(ternary_method_from_name("median"), std::invalid_argument);
}

TEST(Base3, EveryByteRoundTripsAndTailsOfEveryLengthDo) {
  for (int byte = 0; byte < kBase3Levels; ++byte) {
    int8_t trits[5];
    base3_decode(uint8_t(byte), trits, 5);
    EXPECT_EQ(base3_encode(trits, 5), byte);
  }
  for (int64_t count = 0; count < 12; ++count) {
    std::vector<int8_t> trits(static_cast<size_t>(count)), back(static_cast<size_t>(count), 9);
    for (int64_t i = 0; i < count; ++i) trits[size_t(i)] = int8_t(i * 7 % 3 - 1);
    std::vector<uint8_t> bytes(size_t(base3_bytes(count)) + 1, 0xaa);
    pack_base3(trits.data(), count, bytes.data());
    EXPECT_EQ(bytes.back(), 0xaa) << "wrote past the end at count " << count;
    unpack_base3(bytes.data(), base3_bytes(count), back.data(), count);
    EXPECT_EQ(trits, back);
  }
}

TEST(Base3, RefusesValuesAndBytesOutsideTheFormat) {
  const int8_t two[1] = {2};
  uint8_t byte = 243;
  int8_t out[5];
  EXPECT_THROW(pack_base3(two, 1, &byte), std::invalid_argument);
  EXPECT_THROW(unpack_base3(&byte, 1, out, 5), std::invalid_argument);
  byte = 242;
  EXPECT_THROW(unpack_base3(&byte, 1, out, 6), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
