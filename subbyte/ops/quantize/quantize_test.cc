#include "subbyte/ops/quantize/quantize.h"

#include <gtest/gtest.h>

#include <cmath>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/formats/golden_test.h"
#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/quantize/kernels.h"

namespace subbyte {
namespace {

using testing::GoldenCase;
using testing::GuardedBuffer;
using testing::MatrixShape;
using testing::RandomMatrix;

// Bytes of a matrix [n, k] of type t whose values lie on, between and outside the codes of m, some of them on ties, with
// `gap` columns between rows that must never be read (NaN).
std::vector<uint8_t> values_around(const RandomMatrix& m, DType t, int64_t stride, bool extremes, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> out(size_t(m.w.n * stride * dtype_bytes(t)), 0xff);
  for (int64_t n = 0; n < m.w.n; ++n)
    for (int64_t k = 0; k < m.w.k; ++k) {
      const int64_t i = n * m.w.groups() + k / m.w.group_size;
      const Format f = segment_of(m.w.layout, k).format;
      const float scale = load_float(m.w.scales, m.w.scale_dtype, i), zero = group_zero(m.w, f, i);
      float code = float(rng() % 4096) / 4096 * 2 * float(format_levels(f)) - 0.5f * float(format_levels(f));
      if (rng() % 3 == 0) code = std::floor(code * 2) / 2;
      float v = affine_value(code, scale, zero, m.w.zero_kind);
      if (scale == 0) v = code;
      if (extremes && rng() % 4 == 0) {
        const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 3e38f, -3e38f, 1e-42f};
        v = special[rng() % 8];
      }
      store_float(out.data(), t, n * stride + (m.w.perm != nullptr ? m.w.perm[k] : k), v);
    }
  return out;
}

QuantizeParams params_of(const RandomMatrix& m, const void* w, DType t, int64_t stride, uint8_t* codes) {
  QuantizeParams p;
  p.w = w;
  p.w_dtype = t;
  p.w_stride = stride;
  p.out = m.w;
  p.codes = codes;
  return p;
}

class QuantizeKernelTest : public ::testing::TestWithParam<size_t> {
 protected:
  const QuantizeKernel& kernel() const { return quantize_kernels()[GetParam()]; }
  void SetUp() override {
    if (kernel().isa > detected_isa()) GTEST_SKIP() << kernel().name << " needs " << isa_name(kernel().isa);
  }
};
INSTANTIATE_TEST_SUITE_P(Table, QuantizeKernelTest, ::testing::Range(size_t(0), quantize_kernels().size()),
                         [](const auto& row) { return std::string(quantize_kernels()[row.param].name); });

constexpr DType kInTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};

TEST_P(QuantizeKernelTest, EncodesEveryShapeAndTypeToTheBitsOfTheReferenceAndTouchesNothingElse) {
  uint32_t seed = 0;
  for (const MatrixShape& shape : testing::codec_shapes()) {
    RandomMatrix m(shape, ++seed);
    const DType t = kInTypes[seed % 4];
    const int64_t stride = shape.k + int64_t(seed % 3);
    // Non-finite values too: a kernel that is handed them stays total and agrees, though the entry refuses them.
    const std::vector<uint8_t> w = values_around(m, t, stride, seed % 2 == 0, seed);
    for (Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
      GuardedBuffer<uint8_t> codes(m.w.codes_bytes()), want(m.w.codes_bytes());
      QuantizeParams p = params_of(m, w.data(), t, stride, want.data());
      p.rounding = rounding;
      p.seed = 0x123456789abcdefull * seed;
      p.offset = seed % 5 == 0 ? ~uint64_t(0) : seed;
      p.first_row = seed % 7 == 0 ? uint64_t(1) << 40 : seed % 3;
      reference::encode_rows(p, 0, shape.n);
      p.codes = codes.data();
      kernel().encode_rows(p, 0, shape.n);
      ASSERT_EQ(codes.copy(), want.copy()) << shape.name() << " from " << dtype_name(t) << ", rounding " << int(rounding);
      ASSERT_TRUE(codes.intact()) << shape.name();
    }
  }
}

TEST_P(QuantizeKernelTest, ChoosesScalesAndZerosWithTheBitsOfTheReferenceAndTouchesNothingElse) {
  uint32_t seed = 0;
  for (MatrixShape shape : testing::codec_shapes()) {
    const DType t = kInTypes[++seed % 4];
    RandomMatrix m(shape, seed);
    std::vector<uint8_t> w = values_around(m, t, shape.k, false, seed);
    // Groups of one value, of zeros of both signs, and of one sign.
    for (int64_t i = 0; i < m.w.n * m.w.k; ++i) {
      const int64_t block = i / 29 % 6;
      if (block == 1) store_float(w.data(), t, i, -0.25f);
      if (block == 2) store_float(w.data(), t, i, i % 2 == 0 ? 0.0f : -0.0f);
      if (block == 3) store_float(w.data(), t, i, std::fabs(load_float(w.data(), t, i)));
    }
    for (Scheme scheme : {Scheme::kMinMax, Scheme::kAbsMax, Scheme::kAbsMean, Scheme::kMidRise, Scheme::kFanIn}) {
      if (!scheme_takes(scheme, shape.zero_kind, m.w.layout)) continue;
      const int64_t count = m.w.n * m.w.groups();
      const bool fixed = shape.zero_kind == ZeroKind::kFixed;
      GuardedBuffer<uint8_t> scales(count * dtype_bytes(m.w.scale_dtype)), want_scales(scales.size());
      GuardedBuffer<uint8_t> zeros(fixed ? 0 : count * dtype_bytes(m.w.zero_dtype)), want_zeros(zeros.size());
      QuantizeParams p = params_of(m, w.data(), t, shape.k, nullptr);
      p.scheme = scheme;
      p.scales = want_scales.data();
      p.zeros = fixed ? nullptr : want_zeros.data();
      const bool want = reference::choose_rows(p, 0, shape.n);
      p.scales = scales.data();
      p.zeros = fixed ? nullptr : zeros.data();
      ASSERT_EQ(kernel().choose_rows(p, 0, shape.n), want) << shape.name();
      ASSERT_EQ(scales.copy(), want_scales.copy()) << shape.name() << " from " << dtype_name(t) << ", scheme " << int(scheme);
      ASSERT_EQ(zeros.copy(), want_zeros.copy()) << shape.name() << " from " << dtype_name(t) << ", scheme " << int(scheme);
      ASSERT_TRUE(scales.intact() && zeros.intact()) << shape.name();
    }
  }
}

TEST_P(QuantizeKernelTest, AScaleBeyondItsTypeIsReported) {
  RandomMatrix m({"uint4", 3, 40, 20, ZeroKind::kOffsets, DType::kF16, DType::kF32}, 1);
  std::vector<float> w(120, 0.5f);
  std::vector<uint16_t> scales(6);
  std::vector<float> zeros(6);
  QuantizeParams p = params_of(m, w.data(), DType::kF32, 40, nullptr);
  p.scales = scales.data();
  p.zeros = zeros.data();
  EXPECT_TRUE(kernel().choose_rows(p, 0, 3));
  w[77] = 2e6f;  // (2e6 - 0.5) / 15 is above 65504
  EXPECT_FALSE(kernel().choose_rows(p, 0, 3));
  EXPECT_TRUE(kernel().choose_rows(p, 0, 1));
}

TEST_P(QuantizeKernelTest, FindsANonFiniteValueAtAnyColumnOfAnyTypeAndLooksAtNoOther) {
  for (DType t : kInTypes)
    for (int64_t k : {1, 7, 8, 9, 16, 17, 40}) {
      RandomMatrix m({"uint4", 3, k, 8}, 1);
      const int64_t stride = k + 2;
      const std::vector<uint8_t> good = values_around(m, t, stride, false, 1);  // NaN between rows
      EXPECT_EQ(kernel().find_bad_row(params_of(m, good.data(), t, stride, nullptr), 0, 3), -1) << dtype_name(t) << " " << k;
      for (int64_t column = 0; column < k; ++column)
        for (double bad : {double(NAN), double(INFINITY), -double(INFINITY), 1e39}) {
          if (bad == 1e39 && t != DType::kF64) continue;
          std::vector<uint8_t> w = good;
          store_double(w.data(), t, stride + column, bad);
          ASSERT_EQ(kernel().find_bad_row(params_of(m, w.data(), t, stride, nullptr), 0, 3), 1)
              << bad << " as " << dtype_name(t) << " in column " << column << " of " << k;
          ASSERT_EQ(kernel().find_bad_row(params_of(m, w.data(), t, stride, nullptr), 2, 3), -1);
        }
    }
}

TEST(Quantize, TheTableHasOneRowAnInstructionSetAndSelectionTakesTheBest) {
  EXPECT_STREQ(select_quantize_kernel(Isa::kScalar).name, "quantize_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_quantize_kernel(Isa::kAvx2).name, "quantize_avx2");
  EXPECT_STREQ(select_quantize_kernel(Isa::kAvx512).name, "quantize_avx512");
  EXPECT_STREQ(select_quantize_kernel(Isa::kAvx512Vnni).name, "quantize_avx512");
#endif
  EXPECT_EQ(quantize_kernels().back().isa, Isa::kScalar);
}

std::vector<uint8_t> codes_of(const PackedMatrix& w) {
  std::vector<uint8_t> out;
  for (int64_t n = 0; n < w.n; ++n)
    for (int64_t k = 0; k < w.k; ++k) out.push_back(uint8_t(packed_code(w, n, k)));
  return out;
}

TEST(Encode, GoldenCodesComeOutOnEveryInstructionSetForBothRoundings) {
  const std::vector<GoldenCase> cases = testing::read_golden("encode.txt");
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const GoldenCase& c : cases) {
      SCOPED_TRACE(c.name + " on " + isa_name(Isa(isa)));
      for (Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
        std::vector<uint8_t> codes(size_t(c.n * c.layout.row_bytes), 0xff);
        QuantizeParams p;
        p.w = c.input.data();
        p.w_stride = c.k;
        p.out = c.view();
        p.codes = codes.data();
        p.rounding = rounding;
        p.seed = c.seed;
        p.offset = c.offset;
        p.first_row = c.first_row;
        encode(p);
        p.out.codes = codes.data();
        EXPECT_EQ(codes_of(p.out), rounding == Rounding::kNearest ? c.nearest : c.stochastic);
      }
    }
  }
}

TEST(Quantize, GoldenScalesAndZerosComeOutOnEveryInstructionSet) {
  const std::vector<GoldenCase> cases = testing::read_golden("choose.txt");
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const GoldenCase& c : cases) {
      SCOPED_TRACE(c.name + " on " + isa_name(Isa(isa)));
      std::vector<uint8_t> codes(size_t(c.n * c.layout.row_bytes)), scales(c.scales.size()), zeros(c.zeros.size());
      QuantizeParams p;
      p.w = c.input.data();
      p.w_stride = c.k;
      p.out = c.view();
      p.codes = codes.data();
      p.scales = scales.data();
      p.zeros = zeros.empty() ? nullptr : zeros.data();
      p.scheme = scheme_from_name(c.scheme);
      quantize(p);
      EXPECT_EQ(scales, c.scales);
      EXPECT_EQ(zeros, c.zeros);
    }
  }
}

struct Quantized {
  std::vector<uint8_t> codes, scales, zeros;
  PackedMatrix w;
};
Quantized quantized(const std::vector<float>& values, const MatrixShape& shape, Scheme scheme) {
  Quantized q;
  q.w.layout = row_layout(shape.layout, shape.k);
  q.w.n = shape.n;
  q.w.k = shape.k;
  q.w.group_size = shape.group_size;
  q.w.zero_kind = shape.zero_kind;
  q.w.scale_dtype = shape.scale_dtype;
  q.w.zero_dtype = shape.zero_dtype;
  q.codes.resize(size_t(q.w.codes_bytes()));
  q.scales.resize(size_t(q.w.n * q.w.groups() * dtype_bytes(shape.scale_dtype)));
  q.zeros.resize(shape.zero_kind == ZeroKind::kFixed ? 0 : size_t(q.w.n * q.w.groups() * dtype_bytes(shape.zero_dtype)));
  QuantizeParams p;
  p.w = values.data();
  p.w_stride = shape.k;
  p.out = q.w;
  p.codes = q.codes.data();
  p.scales = q.scales.data();
  p.zeros = q.zeros.empty() ? nullptr : q.zeros.data();
  p.scheme = scheme;
  quantize(p);
  q.w.codes = q.codes.data();
  q.w.scales = q.scales.data();
  q.w.zeros = p.zeros;
  return q;
}

std::vector<float> dequantized(const PackedMatrix& w) {
  std::vector<float> out(size_t(w.n * w.k));
  dequantize({w, out.data(), DType::kF32, w.k});
  return out;
}

// The weights of a GGUF Q4_1 file lie on d * q + m with float16 d and m in groups of 32. Where a group uses the codes 0 and
// 15, minimum, maximum and so the grid are known, and nothing may be lost, whatever the type of the new scales.
TEST(Quantize, WeightsOnAQ41GridComeBackBitForBitWhereAGroupUsesBothEnds) {
  std::mt19937 rng(41);
  const int64_t n = 300, k = 576, groups = k / 32;
  std::vector<float> values(size_t(n * k));
  std::uniform_real_distribution<float> d_range(1e-3f, 0.04f), m_range(-12.0f, -3.0f);
  for (int64_t g = 0; g < n * groups; ++g) {
    const float d = f16_to_float(float_to_f16(d_range(rng))), m = f16_to_float(float_to_f16(d * m_range(rng)));
    for (int64_t j = 0; j < 32; ++j) {
      const float q = j == 3 ? 0.0f : j == 17 ? 15.0f : float(rng() % 16);
      const float product = d * q;
      values[size_t(g * 32 + j)] = product + m;
    }
  }
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (DType t : {DType::kF32, DType::kF16}) {
      const Quantized q = quantized(values, {"uint4", n, k, 32, ZeroKind::kOffsets, t, t}, Scheme::kMinMax);
      const std::vector<float> back = dequantized(q.w);
      int64_t lost = 0;
      for (size_t i = 0; i < values.size(); ++i) lost += std::bit_cast<uint32_t>(back[i]) != std::bit_cast<uint32_t>(values[i]);
      EXPECT_EQ(lost, 0) << "of " << values.size() << " with " << dtype_name(t) << " scales on " << isa_name(Isa(isa));
    }
  }
}

TEST(Quantize, EachSchemeKeepsItsPromiseForEveryFormat) {
  std::mt19937 rng(8);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  const int64_t n = 5, k = 100, group = 32;
  std::vector<float> values(size_t(n * k));
  for (float& v : values) v = normal(rng);
  for (const FormatInfo& f : kFormats) {
    SCOPED_TRACE(f.name);
    const float top = float(f.levels - 1);
    for (ZeroKind kind : {ZeroKind::kZeros, ZeroKind::kOffsets, ZeroKind::kFixed}) {
      const Scheme scheme = kind == ZeroKind::kFixed ? Scheme::kAbsMax : Scheme::kMinMax;
      const Quantized q = quantized(values, {f.name, n, k, group, kind}, scheme);
      const std::vector<float> back = dequantized(q.w);
      for (int64_t i = 0; i < n * k; ++i) {
        const float scale = load_float(q.w.scales, DType::kF32, i / k * 4 + i % k / group);
        ASSERT_GT(scale, 0.0f);
        // Nothing is clipped by more than the half step by which the zero was rounded.
        const float steps = std::fabs(back[size_t(i)] - values[size_t(i)]) / scale;
        ASSERT_LE(steps, (kind == ZeroKind::kZeros ? 1.0f : 0.5f) + 1e-4f * top) << int(kind) << " element " << i;
      }
    }
    // absmean, in double.
    const Quantized q = quantized(values, {f.name, n, k, group}, Scheme::kAbsMean);
    for (int64_t g = 0; g < 4; ++g) {
      double mean = 0;
      const int64_t end = std::min(k, (g + 1) * group);
      for (int64_t j = g * group; j < end; ++j) mean += std::fabs(values[size_t(2 * k + j)]);
      mean /= double(end - g * group);
      const std::string name = f.name;
      const double want = name == "sign" ? 2 * mean : name == "ternary" ? mean : 2 * mean / std::sqrt((1 << (f.bits - 1)) - 1);
      EXPECT_NEAR(load_float(q.w.scales, DType::kF32, 2 * 4 + g), want, want * 1e-6);
    }
  }
}

TEST(Quantize, MidRiseGridsAreSymmetricAndAsWideAsTheirSchemesSay) {
  const int64_t n = 200, k = 256;
  std::mt19937 rng(11);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> values(size_t(n * k));
  for (float& v : values) v = normal(rng);
  const struct {
    const char* format;
    double levels, c, squared_error;  // of Max's quantizer of a normal distribution of deviation 1 (1960, table II)
  } formats[] = {{"sign", 2, 2, 0.3634},       {"ternary", 3, 3, 0.1902},      {"uint2", 4, 2, 0.1188},
                 {"uint3", 8, 2.5, 0.03744},   {"uint4", 16, 3, 0.01154},      {"uint5", 32, 3.25, 0.003495},
                 {"uint6", 64, 3.5, 0.001040}, {"uint7", 128, 3.75, 3.043e-4}, {"uint8", 256, 4, 8.769e-5}};
  for (const auto& f : formats) {
    SCOPED_TRACE(f.format);
    const bool fixed = f.levels < 4;
    const MatrixShape shape{f.format, n, k, k, fixed ? ZeroKind::kFixed : ZeroKind::kZeros};
    const Quantized fan_in = quantized(values, shape, Scheme::kFanIn), mid_rise = quantized(values, shape, Scheme::kMidRise);
    for (int64_t row = 0; row < n; ++row) {
      EXPECT_FLOAT_EQ(load_float(fan_in.w.scales, DType::kF32, row), float(2 * f.c / (f.levels * 16)));
      if (!fixed) {
        ASSERT_EQ(load_float(fan_in.w.zeros, DType::kF32, row), float(f.levels - 1) / 2);
        ASSERT_EQ(load_float(mid_rise.w.zeros, DType::kF32, row), float(f.levels - 1) / 2);
      }
    }
    // Groups of 256 know the deviation to about 5 %, which costs a few percent of error; another width would cost far more.
    const std::vector<float> back = dequantized(mid_rise.w);
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i) sum += (back[i] - values[i]) * double(back[i] - values[i]);
    EXPECT_NEAR(sum / double(n * k) / 0.09, f.squared_error, 0.06 * f.squared_error);
  }
}

TEST(Encode, SignOfZeroIsPlusOneAndTiesGoToEven) {
  RandomMatrix sign({"sign", 1, 4, 4}, 1), uint2({"uint2", 1, 5, 5}, 1);
  const float one = 1.0f;
  sign.w.scales = uint2.w.scales = &one;
  const float w[] = {0.0f, -0.0f, -0.25f, 0.25f}, ties[] = {-2.5f, -1.5f, -0.5f, 0.5f, 1.5f};
  uint8_t codes[2] = {};
  QuantizeParams p = params_of(sign, w, DType::kF32, 4, codes);
  encode(p);
  p.out.codes = codes;
  EXPECT_EQ(codes_of(p.out), (std::vector<uint8_t>{1, 1, 0, 1}));
  p = params_of(uint2, ties, DType::kF32, 5, codes);
  encode(p);
  p.out.codes = codes;
  EXPECT_EQ(codes_of(p.out), (std::vector<uint8_t>{0, 0, 2, 2, 3}));  // t = -0.5, 0.5, 1.5, 2.5, 3.5
}

// ---- stochastic rounding ----

constexpr int64_t kDraws = 1 << 16;

// Mean code of 2^16 elements that all have t = `steps`, by the given instruction set.
double mean_code(const char* layout, float steps, uint64_t seed, uint64_t offset) {
  RandomMatrix m({layout, 16, kDraws / 16, kDraws / 16, ZeroKind::kOffsets}, 1);
  const std::vector<float> scales(16, 0.5f), offsets(16, 0.0f), w(size_t(kDraws), steps * 0.5f);
  std::vector<uint8_t> codes(m.codes.size());
  m.w.scales = scales.data();
  m.w.zeros = offsets.data();
  QuantizeParams p = params_of(m, w.data(), DType::kF32, kDraws / 16, codes.data());
  p.rounding = Rounding::kStochastic;
  p.seed = seed;
  p.offset = offset;
  encode(p);
  p.out.codes = codes.data();
  double sum = 0;
  for (uint8_t c : codes_of(p.out)) sum += c;
  return sum / double(kDraws);
}

TEST(StochasticRounding, MeanIsTheValueWithinSixStandardErrorsInsideTheRange) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const char* layout : {"sign", "uint2", "uint3", "uint8"})
      for (uint64_t seed : {1ull, 2ull})
        for (float steps : {0.5f, 0.25f, 0.9f, 0.001f, 1.5f, 2.75f, 100.3f}) {
          const int levels = format_levels(format_from_name(layout));
          if (steps > float(levels - 1)) continue;
          const double fraction = steps - std::floor(steps), error = std::sqrt(fraction * (1 - fraction) / kDraws);
          EXPECT_NEAR(mean_code(layout, steps, seed, 17), steps, 6 * error)
              << layout << " at " << steps << " seed " << seed << " on " << isa_name(Isa(isa));
        }
  }
}

TEST(StochasticRounding, WholeStepsAndTheEndsOfTheRangeAreExact) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (float steps : {0.0f, 1.0f, 2.0f, 3.0f}) EXPECT_EQ(mean_code("uint2", steps, 5, 0), steps);
    for (float above : {3.25f, 4.0f, 1e9f}) EXPECT_EQ(mean_code("uint2", above, 5, 0), 3);
    for (float below : {-0.25f, -0.5f, -1.0f, -1e9f}) EXPECT_LE(mean_code("uint2", below, 5, 0), 0.0);
    EXPECT_EQ(mean_code("uint2", -1e-20f, 5, 0), 0);
  }
}

TEST(StochasticRounding, BlocksOfRowsGiveTheBitsOfOneCallAndThreadsAndOtherSeedsBehave) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    const int64_t n = 64, k = 251;  // K no multiple of 4: rows begin inside a block of random words
    RandomMatrix m({"uint4", n, k, 32, ZeroKind::kZeros, DType::kF16, DType::kF16}, 3);
    const std::vector<uint8_t> w = values_around(m, DType::kBF16, k, false, 3);
    auto run = [&](int64_t begin, int64_t end, uint64_t seed, uint64_t offset, std::vector<uint8_t>& codes) {
      QuantizeParams p = params_of(m, w.data() + begin * k * 2, DType::kBF16, k, codes.data() + begin * m.w.layout.row_bytes);
      const int64_t groups = m.w.groups();
      p.out.n = end - begin;
      p.out.scales = m.scales.data() + begin * groups * 2;
      p.out.zeros = m.zeros.data() + begin * groups * 2;
      p.rounding = Rounding::kStochastic;
      p.seed = seed;
      p.offset = offset;
      p.first_row = uint64_t(begin);
      encode(p);
    };
    std::vector<uint8_t> whole(m.codes.size()), parts(whole), threads(whole), other_seed(whole), other_offset(whole);
    const int before = num_threads();
    set_num_threads(1);
    run(0, n, 77, 8, whole);
    for (int64_t begin = 0; begin < n; begin += 5) run(begin, std::min(n, begin + 5), 77, 8, parts);
    set_num_threads(4);
    run(0, n, 77, 8, threads);
    run(0, n, 78, 8, other_seed);
    run(0, n, 77, 9, other_offset);
    set_num_threads(before);
    EXPECT_EQ(parts, whole);
    EXPECT_EQ(threads, whole);
    EXPECT_NE(other_seed, whole);
    EXPECT_NE(other_offset, whole);
  }
}

// ---- the entry ----

TEST(Quantize, NonFiniteWeightsAreRefusedWithTheirPlaceBeforeAnythingIsWritten) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    RandomMatrix m({"uint4", 3, 20, 8, ZeroKind::kZeros}, 1);
    std::vector<float> w(60, 0.1f), scales(9, 7.0f), zeros(9, 7.0f);
    w[2 * 20 + 13] = NAN;
    std::vector<uint8_t> codes(m.codes.size(), 0xaa);
    QuantizeParams p = params_of(m, w.data(), DType::kF32, 20, codes.data());
    p.scales = scales.data();
    p.zeros = zeros.data();
    for (auto op : {quantize, encode}) {
      try {
        op(p);
        FAIL() << "taken";
      } catch (const std::invalid_argument& e) {
        EXPECT_NE(std::string(e.what()).find("w[2, 13] is nan"), std::string::npos) << e.what();
      }
    }
    EXPECT_EQ(codes, std::vector<uint8_t>(codes.size(), 0xaa));
    EXPECT_EQ(scales, std::vector<float>(9, 7.0f));
    EXPECT_EQ(zeros, std::vector<float>(9, 7.0f));
  }
}

TEST(Quantize, SchemesAndZeroKindsThatDoNotGoTogetherAndOverflowsAreRefused) {
  std::vector<float> values(40, 1.0f);
  values[5] = 3e38f;
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kFixed}, Scheme::kMinMax), std::invalid_argument);
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kZeros}, Scheme::kAbsMax), std::invalid_argument);
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kOffsets}, Scheme::kAbsMean), std::invalid_argument);
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kOffsets, DType::kF16, DType::kF32}, Scheme::kMinMax),
               std::invalid_argument);
  EXPECT_NO_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kOffsets}, Scheme::kMinMax));
  EXPECT_NO_THROW(quantized({}, {"uint4", 0, 40, 8, ZeroKind::kOffsets}, Scheme::kMinMax));
  EXPECT_NO_THROW(quantized({}, {"uint4", 3, 0, 8, ZeroKind::kOffsets}, Scheme::kMinMax));
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kFixed}, Scheme::kMidRise), std::invalid_argument);
  EXPECT_THROW(quantized(values, {"uint4", 1, 40, 8, ZeroKind::kOffsets}, Scheme::kFanIn), std::invalid_argument);
  EXPECT_THROW(quantized(values, {"sign", 1, 40, 8, ZeroKind::kOffsets}, Scheme::kMidRise), std::invalid_argument);
  for (const char* name : {"minmax", "absmax", "absmean", "midrise", "fan_in"}) EXPECT_NO_THROW(scheme_from_name(name));
  EXPECT_THROW(scheme_from_name("max"), std::invalid_argument);
  EXPECT_EQ(rounding_from_name("stochastic"), Rounding::kStochastic);
  EXPECT_THROW(rounding_from_name("up"), std::invalid_argument);
}

TEST(Quantize, APermutationOrdersTheColumnsBeforeGroupsAreFormed) {
  std::mt19937 rng(2);
  const int64_t n = 3, k = 70;
  std::vector<int32_t> perm(static_cast<size_t>(k));
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), rng);
  std::vector<float> values(size_t(n * k)), stored(values);
  for (float& v : values) v = float(int(rng() % 2001) - 1000) / 500;
  for (int64_t i = 0; i < n * k; ++i) stored[size_t(i)] = values[size_t(i / k * k + perm[size_t(i % k)])];
  const Quantized want = quantized(stored, {"uint3", n, k, 16, ZeroKind::kZeros}, Scheme::kMinMax);
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    std::vector<uint8_t> codes(want.codes.size());
    std::vector<float> scales(size_t(n * 5)), zeros(scales);
    QuantizeParams p;
    p.w = values.data();
    p.w_stride = k;
    p.out = want.w;
    p.out.perm = perm.data();
    p.codes = codes.data();
    p.scales = scales.data();
    p.zeros = zeros.data();
    quantize(p);
    EXPECT_EQ(codes, want.codes);
    EXPECT_EQ(std::memcmp(scales.data(), want.scales.data(), want.scales.size()), 0);
    EXPECT_EQ(std::memcmp(zeros.data(), want.zeros.data(), want.zeros.size()), 0);
  }
}

}  // namespace
}  // namespace subbyte
