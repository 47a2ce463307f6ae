#include "subbyte/base/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace subbyte {
namespace {

constexpr int64_t kCount = 1 << 16;

TEST(Philox, WordsOfAllFourLanesAreThePublishedOnes) {
  const Philox4 zero = philox4x32(0, 0, 0), ones = philox4x32(~0ull, ~0ull, ~0ull),
                pi = philox4x32(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull);
  const uint32_t want[3][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                               {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(zero.v[i], want[0][i]);
    EXPECT_EQ(ones.v[i], want[1][i]);
    EXPECT_EQ(pi.v[i], want[2][i]);
  }
}

TEST(Philox, WordOfAnElementIsItsLaneOfItsBlock) {
  for (uint64_t e : {uint64_t(0), uint64_t(5), uint64_t(4095), (uint64_t(1) << 35) + 3})
    EXPECT_EQ(philox_word(7, 9, e), philox4x32(7, 9, e / 4).v[e % 4]);
}

TEST(Philox, UniformsLieInTheirIntervalAndHaveMeanAndVarianceWithinSixStandardErrors) {
  for (uint64_t seed : {0ull, 1ull, 0x123456789abcdefull}) {
    double sum = 0, squares = 0, lag = 0, last = 0;
    for (int64_t e = 0; e < kCount; ++e) {
      const float u = uniform24(philox_word(seed, 3, uint64_t(e)));
      ASSERT_TRUE(u >= 0.0f && u < 1.0f);
      sum += u;
      squares += (u - 0.5) * (u - 0.5);
      if (e != 0) lag += (u - 0.5) * (last - 0.5);
      last = u;
    }
    EXPECT_NEAR(sum / kCount, 0.5, 6 * std::sqrt(1.0 / 12 / kCount)) << seed;
    EXPECT_NEAR(squares / kCount, 1.0 / 12, 6 * std::sqrt(1.0 / 180 / kCount)) << seed;  // var (u - 1/2)^2 = 1/180
    EXPECT_NEAR(lag / kCount, 0, 6 * std::sqrt(1.0 / 144 / kCount)) << seed;
  }
}

TEST(Philox, EveryBitIsSetHalfOfTheTime) {
  for (int bit = 0; bit < 32; ++bit) {
    int64_t set = 0;
    for (int64_t e = 0; e < kCount; ++e) set += philox_word(11, 0, uint64_t(e)) >> bit & 1;
    EXPECT_NEAR(double(set) / kCount, 0.5, 6 * 0.5 / std::sqrt(double(kCount))) << "bit " << bit;
  }
}

TEST(Philox, BytesPassAChiSquareTest) {
  int64_t seen[256] = {};
  for (int64_t e = 0; e < kCount; ++e) ++seen[philox_word(5, 5, uint64_t(e)) >> 24];
  double chi2 = 0;
  for (int64_t s : seen) chi2 += (double(s) - kCount / 256.0) * (double(s) - kCount / 256.0) / (kCount / 256.0);
  EXPECT_NEAR(chi2, 255, 6 * std::sqrt(2 * 255.0));
}

TEST(Philox, SeedsAndOffsetsGiveDifferentStreams) {
  std::set<uint32_t> words;
  int64_t count = 0;
  for (uint64_t seed : {0ull, 1ull, 1ull << 32})
    for (uint64_t offset : {0ull, 1ull, 1ull << 32})
      for (uint64_t index : {0ull, 1ull, 1ull << 32}) words.insert(philox4x32(seed, offset, index).v[0]), ++count;
  EXPECT_EQ(int64_t(words.size()), count);
}

}  // namespace
}  // namespace subbyte
