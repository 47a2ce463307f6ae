#include "subbyte/ops/packed_update/packed_update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/update_rule.h"

namespace subbyte {
namespace {

using testing::GuardedBuffer;
using testing::MatrixShape;
using testing::RandomMatrix;

constexpr MomentType kMomentTypes[] = {MomentType::kF32, MomentType::kBF16, MomentType::kQ8, MomentType::kQ4};

// A moment with values in use: what some steps from zero leave.
struct OwnedMoment {
  OwnedMoment(MomentType t, int64_t n, int64_t k)
      : type(t), data(n * moment_row_bytes(t, k)), absmax(is_blockwise(t) ? n * ceil_div(k, kMomentBlock) : 0) {
    std::fill(data.data(), data.data() + data.size(), uint8_t{0});
    std::fill(absmax.data(), absmax.data() + absmax.size(), 0.0f);
  }
  MomentView view() { return {type, data.size() > 0 ? data.data() : nullptr, absmax.size() > 0 ? absmax.data() : nullptr}; }
  bool intact() const { return data.intact() && absmax.intact(); }
  bool operator==(const OwnedMoment& other) const {
    return data.copy() == other.data.copy() && absmax.copy() == other.absmax.copy();
  }

  MomentType type;
  GuardedBuffer<uint8_t> data;
  GuardedBuffer<float> absmax;
};

// Everything a step writes.
struct State {
  State(const RandomMatrix& matrix, MomentType m_type, MomentType v_type, int r)
      : codes(matrix.w.codes_bytes()),
        residual(matrix.w.n * stream_bytes(matrix.w.k, r)),
        m(m_type, matrix.w.n, matrix.w.k),
        v(v_type, matrix.w.n, matrix.w.k),
        residual_bits(r) {
    std::copy(matrix.codes.begin(), matrix.codes.end(), codes.data());
    for (int64_t i = 0; i < residual.size(); ++i) residual[i] = uint8_t(i * 37 + 11);
  }
  void into(PackedUpdateParams& p) {
    p.codes = codes.data();
    p.residual = residual_bits > 0 ? residual.data() : nullptr;
    p.residual_bits = residual_bits;
    p.m = m.view();
    p.v = v.view();
  }
  bool intact() const { return codes.intact() && residual.intact() && m.intact() && v.intact(); }

  GuardedBuffer<uint8_t> codes, residual;
  OwnedMoment m, v;
  int residual_bits;
};

// Gradients over many orders of magnitude, some of them zero, with NaN between the rows.
std::vector<uint8_t> gradients(int64_t n, int64_t k, int64_t stride, DType t, bool broken, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> out(size_t(n * stride * dtype_bytes(t)), 0xff);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      float g = normal(rng) * std::exp2(float(rng() % 12) - 12.0f);
      if (rng() % 16 == 0) g = 0;
      if (broken && rng() % 8 == 0) {
        const float special[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e19f, 0x1p63f, 0x1.fffffep62f, -0.0f, 1e-42f, 1e-30f};
        g = special[rng() % 10];
      }
      store_float(out.data(), t, i * stride + j, g);
    }
  return out;
}

PackedUpdateParams numbers_of(UpdateRule rule, uint32_t variant) {
  PackedUpdateParams p;
  p.rule = rule;
  p.lr = variant % 3 == 0 ? 3e-2 : 1e-3;
  p.weight_decay = variant % 2 == 0 ? 0.1 : 0;
  p.seed = 0x123456789abcdefull * (variant + 1);
  p.offset = variant % 5 == 0 ? ~uint64_t(0) : variant;
  p.first_row = variant % 7 == 0 ? uint64_t(1) << 40 : variant % 3;
  p.maximize = variant % 4 == 1;
  if (rule == UpdateRule::kSgd) {
    p.momentum = 0.9;
    p.dampening = variant % 3 == 0 ? 0.1 : 0;
    p.nesterov = variant % 4 == 2;
    return p;
  }
  p.beta1 = 0.9;
  p.beta2 = rule == UpdateRule::kSign ? 0.99 : 0.999;
  p.threshold = rule == UpdateRule::kSign && variant % 3 == 1 ? 1e-3 : 0;
  if (rule == UpdateRule::kAdamW) {
    p.eps = variant % 6 == 5 ? 0 : 1e-8;
    p.bias_correction1 = 1 - std::pow(0.9, 1.0 + variant % 4);
    p.bias_correction2 = 1 - std::pow(0.999, 1.0 + variant % 4);
  }
  return p;
}

class PackedUpdateKernelTest : public ::testing::TestWithParam<size_t> {
 protected:
  const PackedUpdateKernel& kernel() const { return packed_update_kernels()[GetParam()]; }
  void SetUp() override {
    if (kernel().isa > detected_isa()) GTEST_SKIP() << kernel().name << " needs " << isa_name(kernel().isa);
  }
};
INSTANTIATE_TEST_SUITE_P(Table, PackedUpdateKernelTest, ::testing::Range(size_t(0), packed_update_kernels().size()),
                         [](const auto& row) { return std::string(packed_update_kernels()[row.param].name); });

constexpr DType kGradTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

TEST_P(PackedUpdateKernelTest, ThreeStepsOfEveryRuleShapeAndStateHaveTheBitsOfTheReferenceAndTouchNothingElse) {
  uint32_t i = 0;
  for (const MatrixShape& shape : testing::codec_shapes()) {
    ++i;
    const auto rule = UpdateRule(i % 3);
    RandomMatrix matrix(shape, i);
    const bool stateless = rule != UpdateRule::kAdamW && i % 5 == 0;
    const MomentType m_type = stateless ? MomentType::kNone : kMomentTypes[(i / 3) % 4];
    const MomentType v_type = rule == UpdateRule::kAdamW ? kMomentTypes[(i / 3 + i / 12) % 4] : MomentType::kNone;
    const int residual_bits = i % 4 == 1 ? 1 + int(i / 4 % 8) : 0;
    const DType t = kGradTypes[(i / 2) % 4];
    const int64_t stride = shape.k + int64_t(i % 3);
    State got(matrix, m_type, v_type, residual_bits), want(matrix, m_type, v_type, residual_bits);
    const std::string what = shape.name() + " grad " + dtype_name(t) + " rule " + std::to_string(int(rule)) + " m " +
                             std::to_string(int(m_type)) + " v " + std::to_string(int(v_type)) + " residual " +
                             std::to_string(residual_bits);
    for (uint32_t step = 0; step < 3; ++step) {
      const std::vector<uint8_t> grad = gradients(shape.n, shape.k, stride, t, i % 3 != 0, i * 7 + step);
      PackedUpdateParams p = numbers_of(rule, i + step);
      if (stateless) p.momentum = 0;
      p.w = matrix.w;
      p.grad = grad.data();
      p.grad_dtype = t;
      p.grad_stride = stride;
      const float factor = 0.37f;
      if (i % 3 == 2) p.grad_factor = &factor;
      want.into(p);
      reference::update_rows(p, 0, shape.n);
      got.into(p);
      kernel().update_rows(p, 0, shape.n);
      ASSERT_EQ(got.codes.copy(), want.codes.copy()) << what << " step " << step;
      ASSERT_EQ(got.residual.copy(), want.residual.copy()) << what << " step " << step;
      ASSERT_TRUE(got.m == want.m) << what << " step " << step;
      ASSERT_TRUE(got.v == want.v) << what << " step " << step;
      ASSERT_TRUE(got.intact() && want.intact()) << what;
    }
  }
}

// Rows that the kernels walk in whole blocks of 256 columns, with a tail, and with segments and gradients that stop them.
TEST_P(PackedUpdateKernelTest, WholeBlocksOfEveryPairOfMomentsAndEveryWidthHaveTheBitsOfTheReference) {
  uint32_t i = 0;
  const auto compare = [&](const MatrixShape& shape, UpdateRule rule, MomentType m_type, MomentType v_type, DType t,
                           int residual_bits) {
    ++i;
    RandomMatrix matrix(shape, i);
    State got(matrix, m_type, v_type, residual_bits), want(matrix, m_type, v_type, residual_bits);
    for (uint32_t step = 0; step < 3; ++step) {
      std::vector<uint8_t> grad = gradients(shape.n, shape.k, shape.k, t, false, i * 7 + step);
      // One row of each step has a gradient to skip, the last row one that is just usable.
      if (i % 2 == 0) store_float(grad.data(), t, step % shape.n * shape.k + 300, t == DType::kF16 ? INFINITY : -0x1p63f);
      if (t != DType::kF16) store_float(grad.data(), t, (shape.n - 1) * shape.k + 20, 0x1.fep62f);
      PackedUpdateParams p = numbers_of(rule, i + step);
      if (m_type == MomentType::kNone) p.momentum = 0;
      p.w = matrix.w;
      p.grad = grad.data();
      p.grad_dtype = t;
      p.grad_stride = shape.k;
      const float factor = 0.37f;
      if (i % 3 == 2) p.grad_factor = &factor;
      want.into(p);
      reference::update_rows(p, 0, shape.n);
      got.into(p);
      kernel().update_rows(p, 0, shape.n);
      const std::string what = shape.name() + " grad " + dtype_name(t) + " rule " + std::to_string(int(rule)) + " m " +
                               std::to_string(int(m_type)) + " v " + std::to_string(int(v_type)) + " residual " +
                               std::to_string(residual_bits) + " step " + std::to_string(step);
      ASSERT_EQ(got.codes.copy(), want.codes.copy()) << what;
      ASSERT_EQ(got.residual.copy(), want.residual.copy()) << what;
      ASSERT_TRUE(got.m == want.m) << what;
      ASSERT_TRUE(got.v == want.v) << what;
      ASSERT_TRUE(got.intact() && want.intact()) << what;
    }
  };
  const ZeroKind kinds[] = {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets};
  for (const MomentType m_type : kMomentTypes)
    for (const MomentType v_type : kMomentTypes)
      for (const DType t : kGradTypes)
        compare({"uint4", 3, 600, 64, kinds[i % 3], DType::kBF16, DType::kF32}, UpdateRule::kAdamW, m_type, v_type, t, 0);
  for (const UpdateRule rule : {UpdateRule::kSign, UpdateRule::kSgd})
    for (const MomentType m_type : {MomentType::kNone, MomentType::kF32, MomentType::kBF16, MomentType::kQ8, MomentType::kQ4})
      for (const DType t : {DType::kBF16, DType::kF32})
        compare({"uint8", 2, 512, 96, kinds[i % 3], DType::kF16, DType::kF16}, rule, m_type, MomentType::kNone, t, 0);
  for (const FormatInfo& info : kFormats)
    for (const int residual_bits : {0, 3, 4, 8})
      compare({info.name, 2, 1024, 256, kinds[i % 3], DType::kF32, DType::kF32}, UpdateRule::kAdamW, MomentType::kQ8,
              MomentType::kQ8, DType::kBF16, residual_bits);
  compare({"uint4*288+uint2*736", 3, 1024, 32}, UpdateRule::kAdamW, MomentType::kQ8, MomentType::kQ8, DType::kBF16, 0);
  compare({"uint4*512+sign*512", 3, 1024, 32}, UpdateRule::kAdamW, MomentType::kQ8, MomentType::kQ4, DType::kBF16, 2);
  compare({"uint5", 2, 3072, 32, ZeroKind::kZeros}, UpdateRule::kAdamW, MomentType::kQ8, MomentType::kQ8, DType::kBF16, 0);
}

TEST(PackedUpdate, TheTableHasOneRowAnInstructionSetAndSelectionTakesTheBest) {
  EXPECT_STREQ(select_packed_update_kernel(Isa::kScalar).name, "packed_update_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_packed_update_kernel(Isa::kAvx2).name, "packed_update_avx2");
  EXPECT_STREQ(select_packed_update_kernel(Isa::kAvx512).name, "packed_update_avx512");
  EXPECT_STREQ(select_packed_update_kernel(Isa::kAvx512Vnni).name, "packed_update_avx512");
#endif
  EXPECT_EQ(packed_update_kernels().back().isa, Isa::kScalar);
}

// A matrix [n, k] of one format with scale s everywhere, all codes `code`.
struct FlatMatrix {
  FlatMatrix(Format f, int64_t n, int64_t k, float s, uint32_t code) : scales(size_t(n), s), grad(size_t(n * k), 0.0f) {
    w.layout = row_layout(f, k);
    w.n = n;
    w.k = k;
    w.group_size = k;
    w.scales = scales.data();
    codes.assign(size_t(w.codes_bytes()), 0);
    fill(code);
  }
  void fill(uint32_t code) {
    for (int64_t n = 0; n < w.n; ++n)
      for (int64_t k = 0; k < w.k; ++k)
        set_code(codes.data() + n * w.layout.row_bytes, k, format_bits(w.layout.segments[0].format), code);
  }
  // As SGD without momentum: the step is lr * grad, so -delta codes with lr = scale.
  PackedUpdateParams sgd(double lr) {
    PackedUpdateParams p;
    p.rule = UpdateRule::kSgd;
    p.w = w;
    p.codes = codes.data();
    p.grad = grad.data();
    p.grad_stride = w.k;
    p.lr = lr;
    return p;
  }
  uint32_t code(int64_t n, int64_t k) {
    w.codes = codes.data();
    return packed_code(w, n, k);
  }
  double mean_code() {
    double sum = 0;
    for (int64_t n = 0; n < w.n; ++n)
      for (int64_t k = 0; k < w.k; ++k) sum += code(n, k);
    return sum / double(w.n * w.k);
  }

  std::vector<float> scales, grad;
  std::vector<uint8_t> codes;
  PackedMatrix w;
};

TEST(PackedUpdate, TheMeanOfRoundedStepsIsTheStepWithinSixStandardErrors) {
  constexpr int64_t kN = 64, kK = 1024;  // 2^16 counters
  for (const double step : {0.5, -0.5, 0.25, -0.001, 0.001, 1.5, -2.75, 3e-5}) {
    for (const uint32_t start : {4u, 7u}) {
      FlatMatrix m(Format::kUint4, kN, kK, 0.5f, start);
      std::fill(m.grad.begin(), m.grad.end(), float(-step));
      PackedUpdateParams p = m.sgd(0.5);
      p.seed = uint64_t(start) * 77 + 1;
      packed_update(p);
      const double fraction = std::fabs(step) - std::floor(std::fabs(step));
      const double error = std::sqrt(fraction * (1 - fraction) / double(kN * kK));
      EXPECT_NEAR(m.mean_code(), start + step, 6 * error) << step;
    }
  }
}

TEST(PackedUpdate, AtTheEndsOfTheRangeStepsInwardAreUnbiasedAndStepsOutwardStay) {
  constexpr int64_t kN = 64, kK = 1024;
  for (const FormatInfo& info : kFormats) {
    const Format f = format_from_name(info.name);
    const uint32_t top = uint32_t(info.levels - 1);
    for (const auto& [start, step, expected] : {std::tuple{0u, 0.3, 0.3},
                                                {0u, -0.3, 0.0},
                                                {0u, -900.0, 0.0},
                                                {top, -0.3, top - 0.3},
                                                {top, 0.3, double(top)},
                                                {top, 1e30, double(top)}}) {
      FlatMatrix m(f, kN, kK, 0.25f, start);
      std::fill(m.grad.begin(), m.grad.end(), float(-step));
      packed_update(m.sgd(0.25));
      EXPECT_NEAR(m.mean_code(), expected, expected == start ? 0 : 6 * std::sqrt(0.21 / double(kN * kK)))
          << info.name << " " << start << " " << step;
    }
  }
}

TEST(PackedUpdate, AStepOfZeroMovesNoCodeAndAZeroOrBrokenScaleKeepsTheGroup) {
  for (const FormatInfo& info : kFormats) {
    FlatMatrix m(format_from_name(info.name), 16, 300, 0.0173f, 1);
    const std::vector<uint8_t> before = m.codes;
    packed_update(m.sgd(1.0));
    EXPECT_EQ(m.codes, before) << info.name;
    std::fill(m.grad.begin(), m.grad.end(), 1.0f);
    for (const float scale : {0.0f, 1e-40f, float(INFINITY), float(NAN)}) {
      std::fill(m.scales.begin(), m.scales.end(), scale);
      packed_update(m.sgd(1.0));
      EXPECT_EQ(m.codes, before) << info.name << " scale " << scale;
    }
    std::fill(m.scales.begin(), m.scales.end(), -0.25f);  // a negative scale turns the direction
    packed_update(m.sgd(1e6));
    EXPECT_EQ(m.code(3, 7), uint32_t(info.levels - 1)) << info.name;
  }
}

TEST(PackedUpdate, AOneBitFormatFlipsWhereTheAverageExceedsTheThresholdAndAgreesWithTheWeight) {
  FlatMatrix m(Format::kSign, 1, 6, 2.0f, 0);
  for (const int64_t k : {1, 3, 5}) set_code(m.codes.data(), k, 1, 1);  // weights -1 +1 -1 +1 -1 +1
  m.grad = {5, 5, -5, -5, 0.5f, 0.5f};
  OwnedMoment average(MomentType::kF32, 1, 6);
  PackedUpdateParams p = m.sgd(2.0);
  p.rule = UpdateRule::kSign;
  p.m = average.view();
  p.beta1 = p.beta2 = 0.5;
  p.threshold = 1.0;
  packed_update(p);
  // Downhill: a positive average wants -1. Averages are 2.5 and 0.25.
  const uint32_t want[] = {0, 0, 1, 1, 0, 1};
  for (int64_t k = 0; k < 6; ++k) EXPECT_EQ(m.code(0, k), want[k]) << k;
}

TEST(PackedUpdate, BrokenGradientsAreSkippedAndTheirMomentsStay) {
  for (const MomentType type : kMomentTypes)
    for (const float bad : {float(NAN), float(INFINITY), float(-INFINITY), 1e30f}) {
      FlatMatrix m(Format::kUint8, 1, 600, 0.01f, 100);
      OwnedMoment first(type, 1, 600), second(type, 1, 600);
      PackedUpdateParams p = numbers_of(UpdateRule::kAdamW, 1);
      p.w = m.w;
      p.codes = m.codes.data();
      p.m = first.view();
      p.v = second.view();
      p.lr = 0.05;
      p.maximize = false;
      std::fill(m.grad.begin(), m.grad.end(), 1.0f);
      p.grad = m.grad.data();
      p.grad_stride = 600;
      packed_update(p);
      const uint32_t code = m.code(0, 17);
      std::vector<uint8_t> m_before = first.data.copy(), v_before = second.data.copy();
      m.grad[17] = bad;
      packed_update(p);
      EXPECT_EQ(m.code(0, 17), code);
      for (int64_t k = 0; k < 600; ++k) {
        EXPECT_LT(m.code(0, k), 100u) << k;
      }
      if (!is_blockwise(type)) {
        const auto t = type == MomentType::kF32 ? DType::kF32 : DType::kBF16;
        for (const auto& [now, before] : {std::pair{&first, &m_before}, {&second, &v_before}}) {
          EXPECT_EQ(load_float(now->data.data(), t, 17), load_float(before->data(), t, 17));
          EXPECT_NE(load_float(now->data.data(), t, 16), load_float(before->data(), t, 16));
        }
      } else {
        // The others grew, so the block's unit did: the code of the one that stayed is at most what it was.
        EXPECT_TRUE(std::isfinite(first.absmax[0]) && std::isfinite(second.absmax[0]));
        const auto at = [type](const OwnedMoment& x, int64_t k) {
          return type == MomentType::kQ8 ? uint32_t(x.data.data()[k]) : get_code(x.data.data(), k, 4);
        };
        EXPECT_LT(at(first, 17), at(first, 16));
        EXPECT_LT(at(second, 17), at(second, 16));
      }
    }
}

// The value of a blockwise code as a part of absmax by the written formula, in double; and that of a stored one.
double part_of(MomentType type, bool is_signed, uint32_t code) {
  const bool eight = type == MomentType::kQ8;
  const int per_octave = eight ? 8 : 1, octaves = is_signed ? (eight ? 15 : 7) : (eight ? 31 : 15);
  double sign = 1;
  if (is_signed) {
    const uint32_t half = eight ? 128 : 8;
    sign = code >= half ? -1 : 1;
    code %= half;
  }
  const double t = std::ldexp(1 + double(int(code) % per_octave) / per_octave, int(code) / per_octave);
  return sign * (t - 1) / (std::ldexp(1.0, octaves) - 1);
}
double moment_of(const OwnedMoment& x, int64_t k, bool is_signed) {
  const uint32_t code = x.type == MomentType::kQ8 ? x.data.data()[k] : get_code(x.data.data(), k, 4);
  return double(x.absmax.data()[k / kMomentBlock]) * part_of(x.type, is_signed, code);
}

TEST(PackedUpdate, BlockwiseMomentsAreUnbiasedInValueAndSmallPositiveOnesNeverBecomeZero) {
  constexpr int64_t kBlocks = 64, kK = kBlocks * kMomentBlock;
  for (const MomentType type : {MomentType::kQ8, MomentType::kQ4})
    for (const double part : {0.9, 0.5, 0.11, 0.013, 2.1e-3}) {
      FlatMatrix m(Format::kUint4, 1, kK, 0.01f, 4);
      OwnedMoment first(type, 1, kK), second(type, 1, kK);
      for (int64_t k = 0; k < kK; ++k) m.grad[size_t(k)] = k % kMomentBlock == 0 ? -4.0f : float(k % 2 ? part : -part) * 4;
      PackedUpdateParams p = numbers_of(UpdateRule::kAdamW, 3);
      p.w = m.w;
      p.codes = m.codes.data();
      p.m = first.view();
      p.v = second.view();
      p.grad = m.grad.data();
      p.grad_stride = kK;
      p.maximize = false;
      packed_update(p);
      double sum[2] = {};
      const double m_want = 0.1 * part * 4, v_want = 0.001 * part * part * 16;
      for (int64_t k = 0; k < kK; ++k) {
        if (k % kMomentBlock == 0) {
          EXPECT_NEAR(moment_of(first, k, true), -0.4, 1e-6);
          EXPECT_NEAR(moment_of(second, k, false), 0.016, 1e-8);
          continue;
        }
        const double a = moment_of(first, k, true) * (k % 2 ? 1 : -1) / m_want, b = moment_of(second, k, false) / v_want;
        EXPECT_GT(b, 0) << k;
        sum[0] += a;
        sum[1] += b;
      }
      const double count = double(kK - kBlocks);
      for (int i = 0; i < 2; ++i) {
        // Between the neighbours low and high the upper one has the probability of the fraction.
        const double value = i == 0 ? part : part * part;
        uint32_t code = i;  // v is held up to code 1
        while (part_of(type, i == 0, code + 1) <= value) ++code;
        const double low = part_of(type, i == 0, code), high = part_of(type, i == 0, code + 1);
        const double fraction = std::max(0.0, (value - low) / (high - low));
        const double error = (high - low) / value * std::sqrt(fraction * (1 - fraction) / count);
        EXPECT_NEAR(sum[i] / count, std::max(1.0, low / value), 6 * error + 1e-5)
            << (i ? "v " : "m ") << part << " " << int(type);
      }
    }
}

TEST(PackedUpdate, ASlowAverageInEightOrSixteenBitsIsNotStuck) {
  // beta2 = 0.999 from the second gradient on halves and doubles slowly: one step moves v by less than half a level.
  constexpr int64_t kK = 4096;
  for (const MomentType type : {MomentType::kBF16, MomentType::kQ8}) {
    FlatMatrix m(Format::kUint8, 1, kK, 1.0f, 128);
    OwnedMoment first(type, 1, kK), second(type, 1, kK);
    PackedUpdateParams p;
    p.rule = UpdateRule::kAdamW;
    p.w = m.w;
    p.codes = m.codes.data();
    p.m = first.view();
    p.v = second.view();
    p.grad = m.grad.data();
    p.grad_stride = kK;
    p.beta1 = 0.9;
    p.beta2 = 0.999;
    p.eps = 1e-8;
    for (int64_t k = 0; k < kK; ++k) m.grad[size_t(k)] = 1.0f;
    for (int step = 0; step < 400; ++step) {
      // One element a block holds absmax up; the others decay to a quarter.
      for (int64_t k = 0; k < kK; ++k) m.grad[size_t(k)] = k % kMomentBlock == 0 ? 31.6f : step == 0 ? 31.6f : 0.0f;
      p.offset = uint64_t(step);
      packed_update(p);
    }
    double sum = 0, absmax = 0;
    for (int64_t k = 0; k < kK; ++k) {
      const double value =
          type == MomentType::kQ8 ? moment_of(second, k, false) : load_float(second.data.data(), DType::kBF16, k);
      if (k % kMomentBlock == 0) absmax += value / double(kK / kMomentBlock);
      else sum += value;
    }
    const double want = 0.001 * 31.6 * 31.6 * std::pow(0.999, 399);
    EXPECT_NEAR(sum / double(kK - kK / kMomentBlock) / want, 1, 0.02) << int(type);
    EXPECT_NEAR(absmax / (31.6 * 31.6 * (1 - std::pow(0.999, 400))), 1, 0.05);
  }
}

// Chi-square of pairs of uniforms over a grid of cells, in standard deviations from its mean.
double unevenness(const std::vector<std::pair<uint32_t, uint32_t>>& pairs) {
  constexpr uint32_t kShift = 27, kCells = 1u << (32 - kShift);
  std::vector<int> cells(kCells * kCells);
  for (const auto& [a, b] : pairs) ++cells[(a >> kShift) * kCells + (b >> kShift)];
  double chi = 0;
  const double expected = double(pairs.size()) / double(cells.size());
  for (const int c : cells) chi += (c - expected) * (c - expected) / expected;
  const double freedom = double(cells.size() - 1);
  return (chi - freedom) / std::sqrt(2 * freedom);
}

TEST(PackedUpdate, WordsAreIndependentBetweenTheirThreeUsesColumnsBlocksSeedsAndSteps) {
  constexpr uint64_t kBlocks = 1 << 11;
  const uint64_t key = step_key(5, 6);
  const uint32_t mixes[] = {1, kMixM, kMixV};
  std::vector<std::vector<uint32_t>> words(kBlocks, std::vector<uint32_t>(size_t(kMomentBlock)));
  for (uint64_t i = 0; i < kBlocks; ++i)
    for (uint32_t j = 0; j < kMomentBlock; ++j) words[i][j] = random_word(block_key(key, i), j);
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  for (const auto& [a, b] : {std::pair{1u, kMixM}, {1u, kMixV}, {kMixM, kMixV}}) {
    pairs.clear();
    for (const auto& row : words)
      for (const uint32_t w : row) pairs.emplace_back(w * a, w * b);
    EXPECT_LT(std::fabs(unevenness(pairs)), 6) << a << " " << b;
  }
  for (const uint32_t mix : mixes)
    for (const size_t lag : {1, 2, 3, 4, 8, 16, 34, 64, 89, 128}) {
      pairs.clear();
      for (const auto& row : words)
        for (size_t j = 0; j + lag < row.size(); ++j) pairs.emplace_back(row[j] * mix, row[j + lag] * mix);
      EXPECT_LT(std::fabs(unevenness(pairs)), 6) << "columns " << mix << " " << lag;
    }
  for (const uint64_t step : {1u, 2u, 16u}) {
    pairs.clear();
    for (uint64_t i = 0; i + step < kBlocks; ++i)
      for (size_t j = 0; j < size_t(kMomentBlock); ++j) pairs.emplace_back(words[i][j], words[i + step][j]);
    EXPECT_LT(std::fabs(unevenness(pairs)), 6) << "blocks " << step;
  }
  for (const uint64_t other : {step_key(5, 7), step_key(6, 6), step_key(5, 6 + (uint64_t(1) << 40))}) {
    pairs.clear();
    for (uint64_t i = 0; i < kBlocks; ++i)
      for (uint32_t j = 0; j < kMomentBlock; ++j) pairs.emplace_back(words[i][j], random_word(block_key(other, i), j));
    EXPECT_LT(std::fabs(unevenness(pairs)), 6) << "keys";
  }
  // Sums of neighbours spread as those of independent uniforms do.
  for (const size_t run : {2, 8, 64, 256}) {
    double squares = 0;
    size_t count = 0;
    for (const auto& row : words)
      for (size_t j = 0; j < row.size(); j += run, ++count) {
        double sum = 0;
        for (size_t i = j; i < j + run; ++i) sum += double(row[i]) * 0x1p-32 - 0.5;
        squares += sum * sum;
      }
    EXPECT_NEAR(squares / double(count) * 12 / double(run), 1, 6 * std::sqrt(2.0 / double(count))) << run;
  }
}

TEST(PackedUpdate, ResidualPlanesKeepWhatOneLevelLosesAndTheirCodesAreTheTopBits) {
  // value = scale / 2^r (q - zero 2^r - (2^r - 1) / 2): the mean over q of a code's cells is the code's value.
  for (const ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets}) {
    RandomMatrix matrix({"uint2", 4, 100, 20, kind}, 3);
    State state(matrix, MomentType::kNone, MomentType::kNone, 6);
    std::vector<float> grad(400, 0.0f);
    PackedUpdateParams p;
    p.rule = UpdateRule::kSgd;
    p.w = matrix.w;
    p.grad = grad.data();
    p.grad_stride = 100;
    p.lr = 1;
    state.into(p);
    for (int64_t n = 0; n < 4; ++n)
      for (int64_t k = 0; k < 100; ++k)
        grad[size_t(n * 100 + k)] = -load_float(matrix.w.scales, DType::kF32, n * 5 + k / 20) / 64;
    std::vector<uint32_t> before;
    auto q_of = [&](int64_t n, int64_t k) {
      return get_code(state.codes.data() + n * matrix.w.layout.row_bytes, k, 2) << 6 |
             get_code(state.residual.data() + n * stream_bytes(100, 6), k, 6);
    };
    for (int64_t n = 0; n < 4; ++n)
      for (int64_t k = 0; k < 100; ++k) before.push_back(q_of(n, k));
    packed_update(p);
    for (int64_t n = 0; n < 4; ++n)
      for (int64_t k = 0; k < 100; ++k) {
        const float scale = load_float(matrix.w.scales, DType::kF32, n * 5 + k / 20);
        const uint32_t was = before[size_t(n * 100 + k)];
        // One fine level up, exactly, but for the rounding of 1/64 and the end of the range.
        const uint32_t want = scale == 0 || was == 255 ? was : was + 1;
        EXPECT_NEAR(double(q_of(n, k)), double(want), 1e-9) << n << " " << k << " " << was;
      }
  }
  // Weight decay pulls towards value 0 on the fine grid: q = 127 and 128 lie half a fine step beside it.
  FlatMatrix m(Format::kUint2, 64, 1024, 1.0f, 1);
  std::vector<float> zeros(64, 1.5f);
  m.w.zeros = zeros.data();
  m.w.zero_kind = ZeroKind::kZeros;
  std::vector<uint8_t> residual(64 * 1024 * 6 / 8, 0);
  PackedUpdateParams p = m.sgd(1.0);
  p.weight_decay = 0.25;
  p.residual = residual.data();
  p.residual_bits = 6;
  packed_update(p);
  double sum = 0;
  for (int64_t n = 0; n < 64; ++n)
    for (int64_t k = 0; k < 1024; ++k) sum += double(m.code(n, k) << 6 | get_code(residual.data() + n * 768, k, 6));
  EXPECT_NEAR(sum / 65536, 64 + 0.25 * (127.5 - 64), 6 * std::sqrt(0.25 / 65536));
}

struct Step {
  std::vector<uint8_t> codes, m, v;
  std::vector<float> m_absmax, v_absmax;
  bool operator==(const Step&) const = default;
};

Step step_of(const std::function<void(PackedUpdateParams&)>& change, int64_t first_row = 0, int64_t rows = 24) {
  RandomMatrix matrix({"uint3", 24, 700, 64, ZeroKind::kOffsets}, 9);
  State state(matrix, MomentType::kQ8, MomentType::kQ4, 0);
  const std::vector<uint8_t> grad = gradients(24, 700, 700, DType::kF32, false, 4);
  PackedUpdateParams p = numbers_of(UpdateRule::kAdamW, 3);
  p.first_row = 0;
  p.w = matrix.w;
  p.grad_stride = 700;
  state.into(p);
  p.grad = grad.data();
  const float* offsets = static_cast<const float*>(matrix.w.zeros);
  const float* scales = static_cast<const float*>(matrix.w.scales);
  for (int64_t row = first_row; row < 24; row += rows) {
    PackedUpdateParams q = p;
    q.w.n = min_i64(rows, 24 - row);
    q.first_row = uint64_t(row);
    q.codes += row * matrix.w.layout.row_bytes;
    q.w.scales = scales + row * 11;
    q.w.zeros = offsets + row * 11;
    q.grad = grad.data() + row * 700 * 4;
    q.m.data = state.m.data.data() + row * 700;
    q.m.absmax += row * 3;
    q.v.data = state.v.data.data() + row * 350;
    q.v.absmax += row * 3;
    change(q);
    packed_update(q);
  }
  return {state.codes.copy(), state.m.data.copy(), state.v.data.copy(), state.m.absmax.copy(), state.v.absmax.copy()};
}

TEST(PackedUpdate, BitsDoNotDependOnThreadsOrOnHowRowsAreSplitButOnSeedAndOffset) {
  const Step whole = step_of([](PackedUpdateParams&) {});
  const int threads = num_threads();
  for (const int t : {1, 2, 7}) {
    set_num_threads(t);
    EXPECT_EQ(step_of([](PackedUpdateParams&) {}), whole) << t;
  }
  set_num_threads(threads);
  EXPECT_EQ(step_of([](PackedUpdateParams&) {}, 0, 5), whole);
  EXPECT_NE(step_of([](PackedUpdateParams& p) { ++p.seed; }).codes, whole.codes);
  EXPECT_NE(step_of([](PackedUpdateParams& p) { ++p.offset; }).codes, whole.codes);
  EXPECT_NE(step_of([](PackedUpdateParams& p) { ++p.offset; }).m, whole.m);
}

TEST(PackedUpdate, NumbersInMemoryAndFactorsAreTheFieldsOfTheSameValue) {
  const float numbers[] = {0.03f, 0.19f, 0.002f};
  const int64_t counter = 41;
  const float half = 0.5f;
  const auto by_fields = [&](PackedUpdateParams& p) {
    p.lr = numbers[0];
    p.bias_correction1 = numbers[1];
    p.bias_correction2 = numbers[2];
    p.offset = 51;
  };
  const auto by_memory = [&](PackedUpdateParams& p) {
    p.numbers = numbers;
    p.counter = &counter;
    p.offset = 10;
  };
  EXPECT_EQ(step_of(by_fields), step_of(by_memory));
  const Step halved = step_of([&](PackedUpdateParams& p) { p.grad_factor = &half; });
  EXPECT_NE(halved.m_absmax, step_of([](PackedUpdateParams&) {}).m_absmax);
  std::vector<float> doubled = step_of([](PackedUpdateParams&) {}).m_absmax;
  for (float& v : doubled) v *= 0.5f;
  EXPECT_EQ(halved.m_absmax, doubled);
}

TEST(PackedUpdate, EmptyMatricesAndWrongArgumentsAreHandledAtTheEntry) {
  FlatMatrix m(Format::kUint4, 2, 8, 1.0f, 3);
  const auto refused = [&](const std::function<void(PackedUpdateParams&)>& change, const char* text) {
    PackedUpdateParams p = m.sgd(0.1);
    change(p);
    try {
      packed_update(p);
      ADD_FAILURE() << text;
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
    }
  };
  refused([](PackedUpdateParams& p) { p.lr = -1; }, "packed_sgd_: lr is -1");
  refused([](PackedUpdateParams& p) { p.lr = NAN; }, "lr is nan");
  refused([](PackedUpdateParams& p) { p.weight_decay = -1; }, "weight_decay is -1");
  refused([](PackedUpdateParams& p) { p.momentum = 0.9; }, "m is missing");
  refused([](PackedUpdateParams& p) { p.grad_stride = 7; }, "row stride 7 of grad is below K = 8");
  refused([](PackedUpdateParams& p) { p.grad = nullptr; }, "grad is missing");
  refused([](PackedUpdateParams& p) { p.residual_bits = 2; }, "residual_bits is 2 and the residual is missing");
  refused([](PackedUpdateParams& p) { p.residual_bits = 9; }, "residual_bits is 9");
  refused([](PackedUpdateParams& p) { p.rule = UpdateRule::kAdamW; }, "packed_adamw_: m is missing");
  refused([](PackedUpdateParams& p) { p.rule = UpdateRule::kSign, p.beta1 = 1; }, "packed_sign_: beta1 is 1");
  refused([](PackedUpdateParams& p) { p.rule = UpdateRule::kSign, p.threshold = -1; }, "threshold is -1");
  refused([](PackedUpdateParams& p) { p.rule = UpdateRule::kAdamW, p.bias_correction1 = 0; }, "bias corrections are 0");
  float data[16] = {};
  refused([&](PackedUpdateParams& p) { p.rule = UpdateRule::kSign, p.m = {MomentType::kQ8, data, nullptr}; }, "absmax of m");
  const int32_t perm[] = {0, 1, 2, 3, 4, 5, 6, 8};
  refused([&](PackedUpdateParams& p) { p.w.perm = perm; }, "perm[7] is 8");
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{0, 8}, {2, 0}}) {
    PackedUpdateParams p;
    p.rule = UpdateRule::kSgd;
    p.w.layout = row_layout(Format::kUint3, k);
    p.w.n = n;
    p.w.k = k;
    p.w.group_size = 4;
    EXPECT_NO_THROW(packed_update(p));
  }
}

}  // namespace
}  // namespace subbyte
