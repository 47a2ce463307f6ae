#include "subbyte/ops/dequantize/dequantize.h"

#include <gtest/gtest.h>

#include <cmath>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/golden_test.h"
#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte {
namespace {

using testing::GoldenCase;
using testing::GuardedBuffer;
using testing::MatrixShape;
using testing::RandomMatrix;

constexpr DType kOutTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};

// Same bits, except that one NaN is as good as another.
::testing::AssertionResult same_numbers(const void* a, const void* b, DType t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = load_double(a, t, i), y = load_double(b, t, i);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (x != y || std::signbit(x) != std::signbit(y))
      return ::testing::AssertionFailure() << "element " << i << " is " << x << ", expected " << y;
  }
  return ::testing::AssertionSuccess();
}

class DecodeKernelTest : public ::testing::TestWithParam<size_t> {
 protected:
  const DecodeKernel& kernel() const { return decode_kernels()[GetParam()]; }
  void SetUp() override {
    if (kernel().isa > detected_isa()) GTEST_SKIP() << kernel().name << " needs " << isa_name(kernel().isa);
  }
};
INSTANTIATE_TEST_SUITE_P(Table, DecodeKernelTest, ::testing::Range(size_t(0), decode_kernels().size()),
                         [](const auto& row) { return std::string(decode_kernels()[row.param].name); });

TEST_P(DecodeKernelTest, GivesTheBitsOfTheReferenceForEveryShapeAndTypeAndTouchesNothingElse) {
  uint32_t seed = 0;
  for (const MatrixShape& shape : testing::codec_shapes()) {
    RandomMatrix m(shape, ++seed);
    // The codes lie at the end of a guarded copy: reading on shows under AddressSanitizer, writing on shows here.
    const std::vector<uint8_t> tight(m.codes);
    m.w.codes = tight.data();
    for (DType t : kOutTypes)
      for (int64_t n = 0; n < shape.n; ++n) {
        GuardedBuffer<uint8_t> out(shape.k * dtype_bytes(t)), want(shape.k * dtype_bytes(t));
        reference::decode_row(m.w, n, want.data(), t);
        kernel().decode_row(m.w, n, out.data(), t);
        ASSERT_EQ(out.copy(), want.copy()) << shape.name() << ", row " << n << " as " << dtype_name(t);
        ASSERT_TRUE(out.intact()) << shape.name();
      }
  }
}

TEST_P(DecodeKernelTest, InfinitiesNansAndZerosOfBothSignsComeOutAsInTheReference) {
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e38f, -1e38f, 1e-40f, 65504.0f, 1.0f};
  for (ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
    for (const FormatInfo& f : kFormats) {
      RandomMatrix m({f.name, 1, 100 * 20, 20, kind}, 5);
      auto* scales = reinterpret_cast<float*>(m.scales.data());
      auto* zeros = reinterpret_cast<float*>(m.zeros.data());
      for (int i = 0; i < 100; ++i) {
        scales[i] = special[i % 10];
        if (kind != ZeroKind::kFixed) zeros[i] = special[i / 10];
      }
      for (DType t : kOutTypes) {
        GuardedBuffer<uint8_t> out(m.w.k * dtype_bytes(t)), want(m.w.k * dtype_bytes(t));
        reference::decode_row(m.w, 0, want.data(), t);
        kernel().decode_row(m.w, 0, out.data(), t);
        ASSERT_TRUE(same_numbers(out.data(), want.data(), t, m.w.k)) << f.name << " as " << dtype_name(t);
      }
    }
}

TEST(Dequantize, TheTableHasOneRowAnInstructionSetAndSelectionTakesTheBest) {
  EXPECT_STREQ(select_decode_kernel(Isa::kScalar).name, "decode_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_decode_kernel(Isa::kAvx2).name, "decode_avx2");
  EXPECT_STREQ(select_decode_kernel(Isa::kAvx512).name, "decode_avx512");
  EXPECT_STREQ(select_decode_kernel(Isa::kAvx512Vnni).name, "decode_avx512");
#endif
  EXPECT_EQ(decode_kernels().back().isa, Isa::kScalar);
}

TEST(Dequantize, GoldenValuesComeOutBitForBitOnEveryInstructionSet) {
  const std::vector<GoldenCase> cases = testing::read_packed_golden();
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const GoldenCase& c : cases) {
      SCOPED_TRACE(c.name + " on " + isa_name(Isa(isa)));
      GuardedBuffer<uint32_t> out(c.n * c.k);
      dequantize({c.view(), out.data(), DType::kF32, c.k});
      EXPECT_EQ(out.copy(), c.values);
      EXPECT_TRUE(out.intact());
    }
  }
}

TEST(Dequantize, NarrowTypesAreTheFloat32ValueRoundedOnceAndDoubleIsThatValue) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    RandomMatrix m({"uint5", 7, 143, 32, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 9);
    std::vector<float> f32(7 * 143);
    dequantize({m.w, f32.data(), DType::kF32, 143});
    for (DType t : kOutTypes) {
      std::vector<uint8_t> out(size_t(7 * 150 * dtype_bytes(t)), 0x77), want(out);
      dequantize({m.w, out.data(), t, 150});
      for (int64_t i = 0; i < 7 * 143; ++i) store_float(want.data(), t, i / 143 * 150 + i % 143, f32[size_t(i)]);
      EXPECT_EQ(out, want) << dtype_name(t) << " on " << isa_name(Isa(isa));  // the gap between rows too
    }
  }
}

TEST(Dequantize, TheNumberOfThreadsDoesNotShow) {
  RandomMatrix m({"uint3", 333, 257, 64, ZeroKind::kZeros, DType::kF16, DType::kF16, true}, 4);
  const int before = num_threads();
  std::vector<float> first;
  for (int threads : {1, 2, 7}) {
    set_num_threads(threads);
    std::vector<float> out(333 * 257, NAN);
    dequantize({m.w, out.data(), DType::kF32, 257});
    if (first.empty()) first = out;
    EXPECT_EQ(out, first);
  }
  set_num_threads(before);
}

TEST(Dequantize, WhatCannotBeMeantIsRefusedBeforeAnythingIsWritten) {
  RandomMatrix m({"uint4", 2, 20, 8, ZeroKind::kZeros, DType::kF32, DType::kF32, true}, 1);
  std::vector<float> out(40, 5.0f);
  auto refused = [&](auto&& change, const char* part) {
    PackedMatrix w = m.w;
    int64_t stride = 20;
    change(w, stride);
    try {
      dequantize({w, out.data(), DType::kF32, stride});
      ADD_FAILURE() << "taken, expected: " << part;
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  refused([](PackedMatrix& w, int64_t&) { w.group_size = 0; }, "group_size is 0");
  refused([](PackedMatrix& w, int64_t&) { w.k = 21; }, "the format describes 20 columns");
  refused([](PackedMatrix& w, int64_t&) { w.scales = nullptr; }, "scales are missing");
  refused([](PackedMatrix& w, int64_t&) { w.zeros = nullptr; }, "zeros are missing");
  refused([](PackedMatrix& w, int64_t&) { w.scale_dtype = DType::kF64; }, "float64");
  refused([](PackedMatrix& w, int64_t&) { w.layout = row_layout("uint4*4+uint8*16", 20); },
          "expected a multiple of group_size = 8");
  refused([](PackedMatrix&, int64_t& stride) { stride = 19; }, "row stride 19");
  m.perm[3] = 20;
  refused([](PackedMatrix&, int64_t&) {}, "perm[3] is 20");
  m.perm[3] = -1;
  refused([](PackedMatrix&, int64_t&) {}, "perm[3] is -1");
  EXPECT_EQ(out, std::vector<float>(40, 5.0f));
}

}  // namespace
}  // namespace subbyte
