#include "subbyte/io/foreign_layout.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <vector>

namespace subbyte {
namespace {

constexpr ForeignLayout kOneBit[] = {ForeignLayout::kSign,       ForeignLayout::kPack8, ForeignLayout::kCppCol,
                                     ForeignLayout::kBstc,       ForeignLayout::kBtc,   ForeignLayout::kConvCpp,
                                     ForeignLayout::kConvCutlass};
constexpr ForeignLayout kFourBit[] = {ForeignLayout::kUint4, ForeignLayout::kQ4, ForeignLayout::kQ4Conv};

std::vector<uint8_t> converted(const std::vector<uint8_t>& in, ForeignLayout from, ForeignLayout to, int64_t n, int64_t k,
                               std::optional<int> missing = std::nullopt) {
  std::vector<uint8_t> out(size_t(foreign_layout_bytes(to, n, k)) + 16, 0xee);
  RelayoutParams p;
  p.from = from;
  p.to = to;
  p.in = in.data();
  p.in_bytes = int64_t(in.size());
  p.out = out.data();
  p.out_bytes = int64_t(out.size()) - 16;
  p.n = n;
  p.k = k;
  p.missing = missing;
  relayout(p);
  for (size_t i = out.size() - 16; i < out.size(); ++i) EXPECT_EQ(out[i], 0xee) << "wrote past the end";
  out.resize(out.size() - 16);
  return out;
}

// Canonical rows with clean spare bits.
std::vector<uint8_t> canonical(ForeignLayout layout, int64_t n, int64_t k, unsigned seed) {
  const int bits = foreign_layout_bits(layout);
  std::mt19937 r(seed);
  std::vector<uint8_t> out(size_t(foreign_layout_bytes(layout, n, k)), 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const CodePlace at = foreign_layout_place(layout, n, k, i, j);
      out[size_t(at.byte)] = uint8_t(out[size_t(at.byte)] | ((r() & ((1u << bits) - 1u)) << at.bit));
    }
  return out;
}

TEST(ForeignLayout, EveryLayoutGivesBackWhatItWasGiven) {
  int tried = 0;
  for (const auto& [n, k] : {std::pair<int, int>{8, 128}, {32, 256}, {5, 9}, {33, 40}, {1, 1}, {0, 8}, {8, 0}, {40, 100}}) {
    const std::vector<uint8_t> rows = canonical(ForeignLayout::kSign, n, k, unsigned(n + k));
    for (ForeignLayout layout : kOneBit) {
      if (layout == ForeignLayout::kBtc && (n % 8 != 0 || k % 128 != 0)) continue;
      const std::vector<uint8_t> there = converted(rows, ForeignLayout::kSign, layout, n, k);
      EXPECT_EQ(converted(there, layout, ForeignLayout::kSign, n, k), rows) << foreign_layout_name(layout) << n << "x" << k;
      ++tried;
    }
    const std::vector<uint8_t> four = canonical(ForeignLayout::kUint4, n, k, unsigned(n * k));
    for (ForeignLayout layout : kFourBit)
      EXPECT_EQ(converted(converted(four, ForeignLayout::kUint4, layout, n, k), layout, ForeignLayout::kUint4, n, k), four);
  }
  EXPECT_GE(tried, 50);
}

TEST(ForeignLayout, NoTwoElementsShareABit) {
  for (const auto& [n, k] : {std::pair<int, int>{16, 256}, {33, 72}, {5, 9}})
    for (ForeignLayout layout : kOneBit) {
      if (layout == ForeignLayout::kBtc && (n % 8 != 0 || k % 128 != 0)) continue;
      std::vector<bool> seen(size_t(foreign_layout_bytes(layout, n, k)) * 8, false);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
          const CodePlace at = foreign_layout_place(layout, n, k, i, j);
          const size_t bit = size_t(at.byte * 8 + at.bit);
          ASSERT_LT(bit, seen.size());
          EXPECT_FALSE(seen[bit]);
          seen[bit] = true;
        }
    }
}

TEST(ForeignLayout, BstcWordsHoldTheFirstRowInTheirHighestBitAndAreBigEndian) {
  // W [1, 32] with +1 at k = 0 and k = 31: the word of column 0 is 0x80000001.
  std::vector<uint8_t> rows = {0x01, 0x00, 0x00, 0x80};
  const std::vector<uint8_t> words = converted(rows, ForeignLayout::kSign, ForeignLayout::kBstc, 1, 32);
  ASSERT_EQ(words.size(), 128u);
  EXPECT_EQ(std::vector<uint8_t>(words.begin(), words.begin() + 4), (std::vector<uint8_t>{0x80, 0x00, 0x00, 0x01}));
}

TEST(ForeignLayout, Q4PutsTheEvenElementIntoTheHighNibble) {
  // Values 7, -8, -1 of one row: canonical codes 15, 0, 7; nibbles 7, 8, f.
  EXPECT_EQ(converted({0x0f, 0x07}, ForeignLayout::kUint4, ForeignLayout::kQ4, 1, 3), (std::vector<uint8_t>{0x78, 0xf0}));
}

TEST(ForeignLayout, ATruncatedBstcBufferLosesWeightsAndSaysHowMany) {
  // K = 64, N = 40: 4*2*64 = 512 bytes in full, 320 in the original. Words 80 .. 103 of the second block of rows are cut.
  EXPECT_EQ(foreign_layout_bytes(ForeignLayout::kBstc, 40, 64), 512);
  EXPECT_EQ(foreign_layout_bytes(ForeignLayout::kBstcTruncated, 40, 64), 320);
  EXPECT_EQ(foreign_layout_missing(ForeignLayout::kBstcTruncated, 40, 64), 24 * 32);
  const std::vector<uint8_t> rows(size_t(40 * 8), 0xff);
  const std::vector<uint8_t> cut = converted(rows, ForeignLayout::kSign, ForeignLayout::kBstcTruncated, 40, 64);
  EXPECT_THROW(converted(cut, ForeignLayout::kBstcTruncated, ForeignLayout::kSign, 40, 64), std::invalid_argument);
  EXPECT_EQ(converted(cut, ForeignLayout::kBstcTruncated, ForeignLayout::kSign, 40, 64, 1), rows);
  const std::vector<uint8_t> zeros = converted(cut, ForeignLayout::kBstcTruncated, ForeignLayout::kSign, 40, 64, 0);
  EXPECT_EQ(zeros[size_t(15 * 8 + 7)], 0xff);  // row 15 is the last whole one
  EXPECT_EQ(zeros[size_t(16 * 8 + 3)], 0xff);
  EXPECT_EQ(zeros[size_t(16 * 8 + 4)], 0x00);
  // A single block of rows loses nothing but padding.
  EXPECT_EQ(foreign_layout_missing(ForeignLayout::kBstcTruncated, 40, 32), 0);
}

TEST(ForeignLayout, RefusesWhatALayoutCannotSay) {
  EXPECT_THROW(converted(std::vector<uint8_t>(9), ForeignLayout::kSign, ForeignLayout::kBtc, 9, 8), std::invalid_argument);
  EXPECT_THROW(converted(std::vector<uint8_t>(8), ForeignLayout::kSign, ForeignLayout::kUint4, 8, 8), std::invalid_argument);
  EXPECT_THROW(converted(std::vector<uint8_t>(7), ForeignLayout::kSign, ForeignLayout::kCppCol, 8, 8), std::invalid_argument);
  EXPECT_THROW(foreign_layout_of("csr"), std::invalid_argument);
  EXPECT_EQ(foreign_layout_of("conv_cutlass"), ForeignLayout::kConvCutlass);
}

}  // namespace
}  // namespace subbyte
