// The format functions against vectors from an independent generator.
#include "subbyte/formats/golden_test.h"

#include <gtest/gtest.h>

namespace subbyte {
namespace {

using testing::GoldenCase;

// The values of docs/formats.md.
static_assert(affine_value(11, 0.25f, 8, ZeroKind::kZeros) == 0.75f);
static_assert(affine_value(11, 0.25f, -2, ZeroKind::kOffsets) == 0.75f);
static_assert(affine_value(0, 2, format_fixed_zero(Format::kSign), ZeroKind::kFixed) == -1);
static_assert(affine_value(1, 2, format_fixed_zero(Format::kSign), ZeroKind::kFixed) == 1);
static_assert(affine_value(0, 3, format_fixed_zero(Format::kTernary), ZeroKind::kFixed) == -3);
static_assert(affine_value(2, 3, format_fixed_zero(Format::kTernary), ZeroKind::kFixed) == 3);

TEST(Golden, EveryCaseHasThePartsItsSizesCallFor) {
  for (const GoldenCase& c : testing::read_packed_golden()) {
    SCOPED_TRACE(c.name);
    const int64_t groups = ceil_div(c.k, c.group_size);
    EXPECT_EQ(int64_t(c.codes.size()), c.n * c.k);
    EXPECT_EQ(int64_t(c.values.size()), c.n * c.k);
    EXPECT_EQ(int64_t(c.packed.size()), c.n * c.layout.row_bytes);
    EXPECT_EQ(int64_t(c.scales.size()), c.n * groups * dtype_bytes(c.scale_dtype));
    EXPECT_EQ(int64_t(c.zeros.size()), c.zero_kind == ZeroKind::kFixed ? 0 : c.n * groups * dtype_bytes(c.zero_dtype));
    EXPECT_NO_THROW(validate(c.view(), "golden"));
    EXPECT_NO_THROW(validate_perm(c.view(), "golden"));
  }
}

TEST(Golden, CodesAndValuesOfPackedBytesAreThoseOfTheGenerator) {
  int64_t compared = 0;
  for (const GoldenCase& c : testing::read_packed_golden()) {
    SCOPED_TRACE(c.name);
    const PackedMatrix w = c.view();
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t k = 0; k < c.k; ++k, ++compared) {
        ASSERT_EQ(packed_code(w, n, k), c.codes[size_t(n * c.k + k)]) << n << ", " << k;
        const int64_t column = c.perm.empty() ? k : c.perm[size_t(k)];
        ASSERT_EQ(std::bit_cast<uint32_t>(packed_value(w, n, k)), c.values[size_t(n * c.k + column)]) << n << ", " << k;
      }
  }
  EXPECT_GT(compared, 9 * 3 * 250);
}

TEST(Golden, WritingTheCodesGivesTheBytesOfTheGenerator) {
  for (const GoldenCase& c : testing::read_packed_golden()) {
    SCOPED_TRACE(c.name);
    std::vector<uint8_t> packed(c.packed.size(), 0);
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t k = c.k; k-- > 0;) {  // any order of writing gives the same bytes
        const Segment& s = segment_of(c.layout, k);
        set_code(packed.data() + n * c.layout.row_bytes + s.byte_begin, k - s.k_begin, format_bits(s.format),
                 c.codes[size_t(n * c.k + k)]);
      }
    EXPECT_EQ(packed, c.packed);
  }
}

}  // namespace
}  // namespace subbyte
