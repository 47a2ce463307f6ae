#include "subbyte/ops/column_words/column_words.h"

#include <cstring>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"

namespace subbyte {
namespace {

// Columns walked side by side: 16 words are one cache line of the word matrix.
constexpr int64_t kColumns = 16;

bool check_sizes(const char* op, const RowLayout& layout, int64_t n, const void* words, const void* codes,
                 const int32_t* order) {
  check_arg(n >= 0 && layout.k >= 0, op, ": the codes are [", n, ", ", layout.k, "], expected sizes of at least 0");
  check_arg(order == nullptr || layout.uniform(), op, ": order is given with the mixed format ", layout.name(),
            ", expected one width");
  if (n == 0 || layout.k == 0) return false;
  check_arg(words != nullptr && codes != nullptr, op, ": words or codes are missing");
  return true;
}

void check_order(const char* op, const int32_t* order, int64_t k) {
  if (order == nullptr) return;
  for (int64_t i = 0; i < k; ++i)
    check_arg(order[i] >= 0 && order[i] < k, op, ": order[", i, "] is ", order[i], ", expected 0 <= order < K = ", k);
}

// f(segment, its first word row).
template <class F>
void for_each_segment(const RowLayout& layout, F&& f) {
  int64_t word = 0;
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    f(s, word);
    word += stream_words(s.k_count, format_bits(s.format));
  }
}

uint32_t load_tail(const uint8_t* p, int64_t bytes) {
  uint32_t v = 0;
  for (int64_t i = 0; i < bytes; ++i) v |= uint32_t(p[i]) << (8 * i);
  return v;
}

}  // namespace

bool check_sizes(const ColumnsToCodesParams& p) {
  return check_sizes("columns_to_codes", p.layout, p.n, p.words, p.codes, p.order);
}

bool check_sizes(const CodesToColumnsParams& p) {
  return check_sizes("codes_to_columns", p.layout, p.n, p.words, p.codes, p.order);
}

void columns_to_codes(const ColumnsToCodesParams& p) {
  if (!check_sizes(p)) return;
  check_order("columns_to_codes", p.order, p.layout.k);
  const int64_t row_bytes = p.layout.row_bytes;
  if (p.order != nullptr) {
    const int bits = format_bits(p.layout.segments[0].format);
    parallel_for(p.n, kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        uint8_t* row = p.codes + n * row_bytes;
        std::memset(row, 0, size_t(row_bytes));
        for (int64_t k = 0; k < p.layout.k; ++k) set_code(row, k, bits, column_code(p.words + n, p.n, p.order[k], bits));
      }
    });
    return;
  }
  // Without an order the bytes of a segment's words are the bytes of its canonical stream: a transposition of words.
  parallel_for(ceil_div(p.n, kColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for_each_segment(p.layout, [&](const Segment& s, int64_t first_word) {
        const int bits = format_bits(s.format), spare = int(s.k_count % 8) * bits % 8;
        const int64_t bytes = stream_bytes(s.k_count, bits), first = block * kColumns, last = min_i64(p.n, first + kColumns);
        for (int64_t w = 0; w * 4 < bytes; ++w)
          for (int64_t n = first; n < last; ++n) {
            const uint32_t v = p.words[(first_word + w) * p.n + n];
            uint8_t* to = p.codes + n * row_bytes + s.byte_begin + w * 4;
            for (int64_t i = 0; i < min_i64(4, bytes - w * 4); ++i) to[i] = uint8_t(v >> (8 * i));
          }
        for (int64_t n = first; spare != 0 && n < last; ++n)
          p.codes[n * row_bytes + s.byte_begin + bytes - 1] &= uint8_t((1u << spare) - 1u);
      });
  });
}

void codes_to_columns(const CodesToColumnsParams& p) {
  if (!check_sizes(p)) return;
  check_order("codes_to_columns", p.order, p.layout.k);
  const int64_t row_bytes = p.layout.row_bytes;
  parallel_for(ceil_div(p.n, kColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for_each_segment(p.layout, [&](const Segment& s, int64_t first_word) {
        const int bits = format_bits(s.format), spare = int(s.k_count % 8) * bits % 8;
        const int64_t bytes = stream_bytes(s.k_count, bits), first = block * kColumns, last = min_i64(p.n, first + kColumns);
        for (int64_t w = 0; w * 4 < bytes; ++w)
          for (int64_t n = first; n < last; ++n) {
            uint32_t v = 0;
            const uint8_t* row = p.codes + n * row_bytes + s.byte_begin;
            if (p.order == nullptr) {
              const int64_t count = min_i64(4, bytes - w * 4);
              v = load_tail(row + w * 4, count);
              if (spare != 0 && w * 4 + count == bytes) v &= (1u << (8 * (count - 1) + spare)) - 1u;
            } else {
              // Every code that has a bit in this word.
              for (int64_t k = w * 32 / bits; k < s.k_count && k * bits < (w + 1) * 32; ++k) {
                const int64_t shift = k * bits - w * 32;
                const uint32_t code = get_code(row, p.order[k], bits);
                v |= shift >= 0 ? code << shift : code >> -shift;
              }
            }
            p.words[(first_word + w) * p.n + n] = v;
          }
      });
  });
}

}  // namespace subbyte
