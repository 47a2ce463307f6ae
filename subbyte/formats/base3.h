// Base-3 storage of ternary values, 1.6 bits each: five trits a byte, for files and interchange (computing uses the 2-bit
// "ternary" format, which needs no division to decode).
//
// Trit t in {-1, 0, 1} has digit t + 1. Byte j holds elements 5j .. 5j+4 of the row-major flat array:
//   byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4        d0 the first element; at most 242
// A missing element at the end counts as trit 0 (digit 1), so equal arrays have equal bytes.
//
// Golden example: trits -1 0 1 1 -1 have digits 0 1 2 2 0: 0 + 3 + 18 + 54 + 0 = 75 = 0x4b.
#pragma once
#include <cstdint>

#include "subbyte/base/int_math.h"

namespace subbyte {

inline constexpr int kTritsPerByte = 5;
inline constexpr int kBase3Levels = 243;  // 3^5: bytes 243 .. 255 do not occur

SB_HD constexpr int64_t base3_bytes(int64_t count) { return ceil_div(count, kTritsPerByte); }

// The byte of `count` (1 .. 5) trits, each -1, 0 or 1.
SB_HD constexpr uint8_t base3_encode(const int8_t* trits, int64_t count) {
  int byte = 0;
  for (int i = kTritsPerByte - 1; i >= 0; --i) byte = byte * 3 + (i < count ? trits[i] + 1 : 1);
  return uint8_t(byte);
}

// The first `count` (1 .. 5) trits of a byte below kBase3Levels.
SB_HD constexpr void base3_decode(uint8_t byte, int8_t* trits, int64_t count) {
  int rest = byte;
  for (int i = 0; i < count; ++i) {
    trits[i] = int8_t(rest % 3 - 1);
    rest /= 3;
  }
}

namespace detail {
constexpr bool golden_base3_holds() {
  const int8_t trits[5] = {-1, 0, 1, 1, -1};
  int8_t back[5] = {};
  base3_decode(0x4b, back, 5);
  for (int i = 0; i < 5; ++i)
    if (back[i] != trits[i]) return false;
  return base3_encode(trits, 5) == 0x4b && base3_encode(trits, 1) == 0 + 3 + 9 + 27 + 81;
}
static_assert(golden_base3_holds());
}  // namespace detail

}  // namespace subbyte
