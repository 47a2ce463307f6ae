#include "subbyte/ops/column_words/column_words.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {
namespace {

using testing::GuardedBuffer;

// The published layout by another road: one bit at a time.
std::vector<uint32_t> words_by_bits(const RowLayout& layout, int64_t n_count, const std::vector<uint8_t>& plain) {
  std::vector<uint32_t> words(size_t(column_word_count(layout) * n_count));
  for (int64_t n = 0; n < n_count; ++n) {
    int64_t first_word = 0;
    for (int i = 0; i < layout.segment_count; ++i) {
      const Segment& s = layout.segments[i];
      const int bits = format_bits(s.format);
      for (int64_t k = 0; k < s.k_count; ++k)
        for (int b = 0; b < bits; ++b) {
          const int64_t bit = k * bits + b;
          const uint32_t value = plain[size_t(n * layout.k + s.k_begin + k)] >> b & 1;
          words[size_t((first_word + bit / 32) * n_count + n)] |= value << (bit % 32);
        }
      first_word += (s.k_count * bits + 31) / 32;
    }
  }
  return words;
}

struct Case {
  std::string format;
  int64_t n, k;
};

std::vector<Case> cases() {
  std::vector<Case> out;
  for (int bits = 1; bits <= 8; ++bits)
    for (const int64_t k : {1, 7, 8, 31, 32, 33, 64, 95, 160})
      for (const int64_t n : {1, 5, 16, 17, 40}) out.push_back({bits == 1 ? "sign" : "uint" + std::to_string(bits), n, k});
  out.push_back({"uint8*32+uint6*32+uint5*64+uint4*32+uint3*96+uint2*32", 19, 288});
  out.push_back({"uint8*5+uint3*41+sign*3", 18, 49});
  return out;
}

TEST(ColumnWords, GoldenGptqWords) {
  // 3 bits: codes 0-9 in bits 0-29 of word 0, code 10 split 2 + 1, code 21 split 1 + 2, codes 22-31 from bit 2 of word 2.
  uint32_t words[3] = {};
  uint8_t plain[32];
  for (int k = 0; k < 32; ++k) plain[k] = uint8_t((k * 5 + 3) % 8);
  for (int k = 0; k < 10; ++k) words[0] |= uint32_t(plain[k]) << (3 * k);
  words[0] |= uint32_t(plain[10] & 3) << 30;
  words[1] |= plain[10] >> 2;
  for (int k = 11; k < 21; ++k) words[1] |= uint32_t(plain[k]) << (3 * (k - 11) + 1);
  words[1] |= uint32_t(plain[21] & 1) << 31;
  words[2] |= plain[21] >> 1;
  for (int k = 22; k < 32; ++k) words[2] |= uint32_t(plain[k]) << (3 * (k - 22) + 2);
  uint8_t codes[12];
  ColumnsToCodesParams p;
  p.layout = row_layout(Format::kUint3, 32);
  p.n = 1;
  p.words = words;
  p.codes = codes;
  columns_to_codes(p);
  for (int k = 0; k < 32; ++k) EXPECT_EQ(get_code(codes, k, 3), plain[k]) << k;
}

TEST(ColumnWords, BothDirectionsMoveEveryBitAtEverySizeAndTouchNothingElse) {
  std::mt19937 rng(3);
  for (const Case& c : cases())
    for (const bool ordered : {false, true}) {
      const RowLayout layout = row_layout(c.format, c.k);
      if (ordered && !layout.uniform()) continue;
      std::vector<uint8_t> plain(size_t(c.n * c.k));
      for (int64_t n = 0; n < c.n; ++n)
        for (int64_t k = 0; k < c.k; ++k)
          plain[size_t(n * c.k + k)] = uint8_t(rng() & ((1u << format_bits(segment_of(layout, k).format)) - 1u));
      const std::vector<uint32_t> want = words_by_bits(layout, c.n, plain);
      std::vector<int32_t> order(size_t(c.k)), inverse(size_t(c.k));
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), rng);
      for (int64_t k = 0; k < c.k; ++k) inverse[size_t(order[size_t(k)])] = int32_t(k);

      // Spare bits of the last word are set: they must not arrive.
      std::vector<uint32_t> words = want;
      const Segment& last = layout.segments[layout.segment_count - 1];
      const int64_t used = last.k_count * format_bits(last.format) % 32;
      if (used != 0)
        for (int64_t n = 0; n < c.n; ++n) words[words.size() - size_t(c.n) + size_t(n)] |= ~0u << used;
      GuardedBuffer<uint8_t> codes(c.n * layout.row_bytes);
      ColumnsToCodesParams in;
      in.layout = layout;
      in.n = c.n;
      in.words = words.data();
      in.order = ordered ? order.data() : nullptr;
      in.codes = codes.data();
      columns_to_codes(in);
      ASSERT_TRUE(codes.intact()) << c.format << " " << c.n << " " << c.k;
      std::vector<uint8_t> canonical(size_t(c.n * layout.row_bytes));
      for (int64_t n = 0; n < c.n; ++n)
        for (int64_t k = 0; k < c.k; ++k) {
          const Segment& s = segment_of(layout, k);
          set_code(canonical.data() + n * layout.row_bytes + s.byte_begin, k - s.k_begin, format_bits(s.format),
                   plain[size_t(n * c.k + (ordered ? order[size_t(k)] : k))]);
        }
      ASSERT_EQ(codes.copy(), canonical) << c.format << " " << c.n << " " << c.k << " " << ordered;

      if (const int spare = int(last.k_count * format_bits(last.format) % 8); spare != 0)
        for (int64_t n = 0; n < c.n; ++n) codes[(n + 1) * layout.row_bytes - 1] |= uint8_t(0xff << spare);
      GuardedBuffer<uint32_t> back(int64_t(want.size()));
      CodesToColumnsParams out;
      out.layout = layout;
      out.n = c.n;
      out.codes = codes.data();
      out.order = ordered ? inverse.data() : nullptr;
      out.words = back.data();
      codes_to_columns(out);
      ASSERT_TRUE(back.intact()) << c.format << " " << c.n << " " << c.k;
      ASSERT_EQ(back.copy(), want) << c.format << " " << c.n << " " << c.k << " " << ordered;
    }
}

TEST(ColumnWords, AnOrderOutsideTheColumnsOrWithMixedWidthIsRefused) {
  uint32_t words[8] = {};
  uint8_t codes[32] = {};
  std::vector<int32_t> order(16, 0);
  order[3] = 16;
  ColumnsToCodesParams p;
  p.layout = row_layout(Format::kUint4, 16);
  p.n = 1;
  p.words = words;
  p.codes = codes;
  p.order = order.data();
  EXPECT_THROW(columns_to_codes(p), std::invalid_argument);
  order[3] = -1;
  EXPECT_THROW(columns_to_codes(p), std::invalid_argument);
  order[3] = 15;
  EXPECT_NO_THROW(columns_to_codes(p));
  p.layout = row_layout("uint8*8+uint4*8", 16);
  EXPECT_THROW(columns_to_codes(p), std::invalid_argument);
  p.order = nullptr;
  p.words = nullptr;
  EXPECT_THROW(columns_to_codes(p), std::invalid_argument);
  p.n = 0;
  EXPECT_NO_THROW(columns_to_codes(p));
}

}  // namespace
}  // namespace subbyte
