// Layouts in which other libraries store sign weights and 4-bit integers, and their conversion to and from our canonical rows.
//
// A matrix W [N, K] of codes; for convolution weights [O, C, kh, kw] N = O and K = C*kh*kw, row-major. One bit is 1 for +1 and
// 0 for -1. Where element (n, k) lies:
//
//   name            bytes                          place                                                       needs
//   sign            N * ceil(K/8)                  byte n*ceil(K/8) + k/8, bit k%8: canonical (formats/bits.h)
//   pack8           the same                       the same, by another name
//   cpp_col         ceil(K/8) * N                  byte (k/8)*N + n, bit k%8
//   bstc            4 * ceil(K/32) * R             byte 4*((k/32)*R + n) + k%32/8, bit 7 - k%8; R = N rounded up to 32
//   bstc_truncated  min(N*K/8, as bstc)            as bstc; what lies past the end is lost
//   btc             N*K/8                          byte ((n/8*(K/128) + k/128)*8 + n%8)*16 + k%128/8, bit 7 - k%8   N % 8 = K %
//   128 = 0 conv_cpp        ceil(N*K/8)                    bit n*K + k of one stream, bit 0 of byte 0 first conv_cutlass    the
//   same                       the same: its shape [O, kh, kw, C/8] is a label, the memory is [O, C, kh, kw] uint4           N
//   * ceil(K/2)                  canonical 4-bit rows; code = value + 8 q4              N * ceil(K/2)                  byte
//   n*ceil(K/2) + k/2, two's complement; even k in the high four bits q4_conv         ceil(N*K/2)                    element
//   n*K + k of one stream of q4 bytes; label [O, kh, kw, C/2]
//
// Spare bits are 0 when written, and are not read. Where `needs` does not hold the layout does not exist.
// Sources: bitorch-engine 0.2.6, whose files hold these layouts; golden example below.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "subbyte/base/int_math.h"

namespace subbyte {

enum class ForeignLayout : uint8_t {
  kSign,
  kPack8,
  kCppCol,
  kBstc,
  kBstcTruncated,
  kBtc,
  kConvCpp,
  kConvCutlass,
  kUint4,
  kQ4,
  kQ4Conv
};

// Where a code begins: its lowest bit is bit `bit` of byte `byte`.
struct CodePlace {
  int64_t byte;
  int bit;
};

// 1 or 4.
constexpr int foreign_layout_bits(ForeignLayout layout) { return layout >= ForeignLayout::kUint4 ? 4 : 1; }

constexpr int64_t foreign_layout_bytes(ForeignLayout layout, int64_t n, int64_t k) {
  const int64_t bstc = 4 * ceil_div(k, 32) * round_up(n, 32);
  switch (layout) {
    case ForeignLayout::kSign:
    case ForeignLayout::kPack8:
    case ForeignLayout::kCppCol: return n * ceil_div(k, 8);
    case ForeignLayout::kBstc: return bstc;
    case ForeignLayout::kBstcTruncated: return min_i64(n * k / 8, bstc);
    case ForeignLayout::kBtc: return n * k / 8;
    case ForeignLayout::kConvCpp:
    case ForeignLayout::kConvCutlass: return ceil_div(n * k, 8);
    case ForeignLayout::kUint4:
    case ForeignLayout::kQ4: return n * ceil_div(k, 2);
    default: return ceil_div(n * k, 2);
  }
}

// rows, columns: N and K of the matrix; n, k: the element.
constexpr CodePlace foreign_layout_place(ForeignLayout layout, int64_t rows, int64_t columns, int64_t n, int64_t k) {
  switch (layout) {
    case ForeignLayout::kSign:
    case ForeignLayout::kPack8: return {n * ceil_div(columns, 8) + k / 8, int(k % 8)};
    case ForeignLayout::kCppCol: return {k / 8 * rows + n, int(k % 8)};
    case ForeignLayout::kBstc:
    case ForeignLayout::kBstcTruncated: return {4 * (k / 32 * round_up(rows, 32) + n) + k % 32 / 8, int(7 - k % 8)};
    case ForeignLayout::kBtc: return {((n / 8 * (columns / 128) + k / 128) * 8 + n % 8) * 16 + k % 128 / 8, int(7 - k % 8)};
    case ForeignLayout::kConvCpp:
    case ForeignLayout::kConvCutlass: return {(n * columns + k) / 8, int((n * columns + k) % 8)};
    case ForeignLayout::kUint4: return {n * ceil_div(columns, 2) + k / 2, int(k % 2) * 4};
    case ForeignLayout::kQ4: return {n * ceil_div(columns, 2) + k / 2, 4 - int(k % 2) * 4};
    default: return {(n * columns + k) / 2, 4 - int((n * columns + k) % 2) * 4};
  }
}

// Throws std::invalid_argument for an unknown name.
ForeignLayout foreign_layout_of(std::string_view name);
const char* foreign_layout_name(ForeignLayout layout);

// How many elements of the matrix a layout does not hold: 0 except for bstc_truncated.
int64_t foreign_layout_missing(ForeignLayout layout, int64_t n, int64_t k);

// Rewrites a matrix from one layout to another of the same code width. `missing` stands for elements that `from` does not hold:
// 0 (-1) or 1 (+1). Everything is checked before anything is written.
// Errors: std::invalid_argument for sizes, widths that differ, what a layout needs, missing elements without `missing`.
// May be called from any thread; works on one.
struct RelayoutParams {
  ForeignLayout from = ForeignLayout::kSign;
  ForeignLayout to = ForeignLayout::kSign;
  const uint8_t* in = nullptr;  // foreign_layout_bytes(from, n, k)
  int64_t in_bytes = 0;
  uint8_t* out = nullptr;  // foreign_layout_bytes(to, n, k)
  int64_t out_bytes = 0;
  int64_t n = 0, k = 0;
  std::optional<int> missing;
};
void relayout(const RelayoutParams& p);

namespace detail {
constexpr bool golden_place(ForeignLayout layout, int64_t byte, int bit, int64_t rows, int64_t columns, int64_t n, int64_t k) {
  const CodePlace at = foreign_layout_place(layout, rows, columns, n, k);
  return at.byte == byte && at.bit == bit;
}
// Element (9, 141) of a matrix [16, 256], worked out by hand from the table.
static_assert(golden_place(ForeignLayout::kPack8, 9 * 32 + 17, 5, 16, 256, 9, 141));
static_assert(golden_place(ForeignLayout::kCppCol, 17 * 16 + 9, 5, 16, 256, 9, 141));
static_assert(golden_place(ForeignLayout::kBstc, 4 * (4 * 32 + 9) + 1, 2, 16, 256, 9, 141));
static_assert(golden_place(ForeignLayout::kBtc, ((1 * 2 + 1) * 8 + 1) * 16 + 1, 2, 16, 256, 9, 141));
static_assert(golden_place(ForeignLayout::kQ4, 9 * 128 + 70, 0, 16, 256, 9, 141));
}  // namespace detail

}  // namespace subbyte
