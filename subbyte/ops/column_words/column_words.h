// Codes in columns of 32-bit words (GPTQ, EXL2) <-> canonical rows (formats/bits.h). Bits are moved, no value is formed.
//
//   words  u32 [W, N]                column n holds the codes of output feature n: for each segment of `layout` in turn,
//                                    ceil(count * bits / 32) words with the codes least significant bit first, laid end to
//                                    end; a code may straddle two words. GPTQ is one segment, EXL2 one for each width.
//   codes  u8 [N, layout.row_bytes]  canonical
//   order  i32 [K] or null           code k of the result is code order[k] of the source; one segment only (act-order)
//
// columns_to_codes reads words and writes codes, codes_to_columns the reverse; spare bits are not read and written as zero.
// With order null both are inverses of each other; with an order, of each other under the inverse permutation. `order` need not
// be a permutation. W = column_word_count(layout). N and K may be 0; K need not divide anything.
// Errors: std::invalid_argument for a missing array of a non-empty matrix, sizes below 0, a layout for another K, an order with
// a mixed layout or (host memory: CPU entries only) with an entry outside [0, K).
// Threads: parallel over rows. Workspace: none. Same bits on every path.
// Source: the GPTQ and ExLlamaV2 file layouts; where 32 codes do not fill their words (odd K), the last word is padded.
#pragma once
#include <cstdint>

#include "subbyte/formats/format.h"

namespace subbyte {

struct ColumnsToCodesParams {
  RowLayout layout;
  int64_t n = 0;
  const uint32_t* words = nullptr;
  const int32_t* order = nullptr;
  uint8_t* codes = nullptr;
};
void columns_to_codes(const ColumnsToCodesParams& p);

struct CodesToColumnsParams {
  RowLayout layout;
  int64_t n = 0;
  const uint8_t* codes = nullptr;
  const int32_t* order = nullptr;
  uint32_t* words = nullptr;
};
void codes_to_columns(const CodesToColumnsParams& p);

// Words of a column whose segment holds `count` codes of `bits` bits.
SB_HD constexpr int64_t stream_words(int64_t count, int bits) { return (stream_bytes(count, bits) + 3) / 4; }
// W: words of a whole column.
SB_HD int64_t column_word_count(const RowLayout& layout) {
  int64_t words = 0;
  for (int i = 0; i < layout.segment_count; ++i)
    words += stream_words(layout.segments[i].k_count, format_bits(layout.segments[i].format));
  return words;
}

// Code k of the column that starts at `words`; consecutive words of a column lie `stride` apart.
SB_HD uint32_t column_code(const uint32_t* words, int64_t stride, int64_t k, int bits) {
  const int in_block = int(k % 32) * bits, shift = in_block % 32;
  const uint32_t* p = words + (k / 32 * bits + in_block / 32) * stride;
  uint32_t v = p[0] >> shift;
  if (shift + bits > 32) v |= p[stride] << (32 - shift);
  return v & ((1u << bits) - 1u);
}

// The checks of the entries that need no content. False when the result is empty.
bool check_sizes(const ColumnsToCodesParams& p);
bool check_sizes(const CodesToColumnsParams& p);

}  // namespace subbyte
