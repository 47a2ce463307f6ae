#include "subbyte/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace subbyte {
namespace {

// The value of a 16-bit pattern by the definition of the type, in double, where every step is exact.
double value_by_definition(uint16_t h, int exponent_bits, int mantissa_bits) {
  const int exponent = h >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = h >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

struct Narrow {
  const char* name;
  int exponent_bits, mantissa_bits;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
  uint16_t infinity() const { return uint16_t(((1 << exponent_bits) - 1) << mantissa_bits); }
};
const Narrow kNarrow[] = {
    {"float16", 5, 10, [](uint16_t h) { return f16_to_float(h); }, [](float f) { return float_to_f16(f); }},
    {"bfloat16", 8, 7, [](uint16_t h) { return bf16_to_float(h); }, [](float f) { return float_to_bf16(f); }}};

TEST(DType, All65536PatternsWidenToTheValueOfTheirDefinition) {
  for (const Narrow& t : kNarrow)
    for (int h = 0; h < 65536; ++h) {
      const double want = value_by_definition(uint16_t(h), t.exponent_bits, t.mantissa_bits);
      const float got = t.widen(uint16_t(h));
      if (std::isnan(want)) ASSERT_TRUE(std::isnan(got)) << t.name << " " << h;
      else ASSERT_TRUE(double(got) == want && std::signbit(got) == std::signbit(want)) << t.name << " " << h;
    }
}

TEST(DType, All65536PatternsSurviveTheWayToFloatAndBack) {
  for (const Narrow& t : kNarrow)
    for (int h = 0; h < 65536; ++h) {
      const uint16_t back = t.narrow(t.widen(uint16_t(h)));
      if (std::isnan(t.widen(uint16_t(h)))) ASSERT_TRUE(std::isnan(t.widen(back))) << t.name << " " << h;
      else ASSERT_EQ(back, h) << t.name;
    }
}

// Between every two neighbours: the midpoint goes to the even pattern, and the floats beside it to the nearer one.
TEST(DType, TiesGoToEvenBetweenAllNeighboursAndTheirSidesToTheNearerOne) {
  for (const Narrow& t : kNarrow)
    for (int sign : {0, 0x8000})
      for (int h = 0; h < t.infinity(); ++h) {
        const uint16_t a = uint16_t(sign | h), b = uint16_t(a + 1);
        // Above the largest number the "next" is what the exponent would give if it went on.
        const double next =
            h + 1 == t.infinity() ? (sign ? -1 : 1) * std::ldexp(1.0, (1 << (t.exponent_bits - 1))) : double(t.widen(b));
        const double middle = (double(t.widen(a)) + next) / 2;
        const float m = float(middle);
        ASSERT_EQ(double(m), middle) << t.name << " " << h;
        ASSERT_EQ(t.narrow(m), h % 2 == 0 ? a : b) << t.name << " " << h;
        ASSERT_EQ(t.narrow(std::nextafterf(m, 0.0f)), a) << t.name << " " << h;
        ASSERT_EQ(t.narrow(std::nextafterf(m, sign ? -INFINITY : INFINITY)), b) << t.name << " " << h;
      }
}

TEST(DType, NanOfAnyPayloadStaysNanAndInfinityStaysInfinity) {
  for (const Narrow& t : kNarrow) {
    for (uint32_t payload : {0x1u, 0x1000u, 0x1fffu, 0x2000u, 0xffffu, 0x10000u, 0x400000u, 0x7fffffu})
      for (uint32_t sign : {0u, 0x80000000u})
        EXPECT_TRUE(std::isnan(t.widen(t.narrow(std::bit_cast<float>(sign | 0x7f800000u | payload))))) << t.name << payload;
    EXPECT_EQ(t.narrow(INFINITY), t.infinity());
    EXPECT_EQ(t.narrow(-INFINITY), 0x8000 | t.infinity());
    EXPECT_EQ(t.narrow(std::numeric_limits<float>::max()), t.infinity());
    EXPECT_EQ(t.narrow(std::numeric_limits<float>::denorm_min()), 0);
    EXPECT_EQ(t.narrow(-0.0f), 0x8000);
  }
}

TEST(DType, LoadAndStoreGoThroughTheSameConversions) {
  for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    std::vector<uint8_t> bytes(size_t(4 * dtype_bytes(t)), 0);
    store_float(bytes.data(), t, 2, 0.3f);
    const float want = t == DType::kF16    ? f16_to_float(float_to_f16(0.3f))
                       : t == DType::kBF16 ? bf16_to_float(float_to_bf16(0.3f))
                                           : 0.3f;
    EXPECT_EQ(load_float(bytes.data(), t, 2), want) << dtype_name(t);
    EXPECT_EQ(load_double(bytes.data(), t, 2), double(want)) << dtype_name(t);
    EXPECT_EQ(load_float(bytes.data(), t, 1), 0.0f) << dtype_name(t);
    EXPECT_EQ(load_float(bytes.data(), t, 3), 0.0f) << dtype_name(t);
    store_double(bytes.data(), t, 2, 0.1);
    if (t == DType::kF64) {
      EXPECT_EQ(load_double(bytes.data(), t, 2), 0.1);
    }
  }
}

TEST(DType, EpsilonIsHalfTheDistanceFromOneToTheNextNumber) {
  EXPECT_EQ(dtype_epsilon(DType::kF32), std::numeric_limits<float>::epsilon() / 2);
  EXPECT_EQ(dtype_epsilon(DType::kF64), std::numeric_limits<double>::epsilon() / 2);
  EXPECT_EQ(1 + 2 * dtype_epsilon(DType::kF16), f16_to_float(0x3c01));
  EXPECT_EQ(1 + 2 * dtype_epsilon(DType::kBF16), bf16_to_float(0x3f81));
}

}  // namespace
}  // namespace subbyte
