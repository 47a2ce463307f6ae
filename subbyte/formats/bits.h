// Canonical code stream, version 1: element k of a row occupies bits [k*bits, (k+1)*bits) of that row, counted from bit 0
// (least significant) of byte 0. Rows start on a byte; spare high bits of the last byte are zero. A code of 3, 5, 6 or 7 bits
// may straddle two bytes, never three.
//
// Golden example (3 bits, codes 1 2 3 4 5 6 7 0): the stream is 1 + 2*8 + 3*64 + 4*512 + ... = 0x1F58D1, bytes d1 58 1f.
#pragma once
#include <cstdint>

#include "subbyte/base/int_math.h"

namespace subbyte {

// Bytes of `count` codes of `bits` bits; exact for any count below 2^60.
SB_HD constexpr int64_t stream_bytes(int64_t count, int bits) { return count / 8 * bits + (count % 8 * bits + 7) / 8; }

// Code k of the stream that starts at `row`. Reads one byte, or two when the code straddles; never past the stream's end.
SB_HD constexpr uint32_t get_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t block = k / 8 * bits;  // bytes before this run of 8 codes; no product of k and bits can overflow
  const int in_block = int(k % 8) * bits, byte = in_block / 8, shift = in_block % 8;
  uint32_t v = row[block + byte];
  if (shift + bits > 8) v |= uint32_t(row[block + byte + 1]) << 8;
  return (v >> shift) & ((1u << bits) - 1u);
}

// Writes code k; leaves every other bit alone. `code` must be below 2^bits.
SB_HD constexpr void set_code(uint8_t* row, int64_t k, int bits, uint32_t code) {
  const int64_t block = k / 8 * bits;
  const int in_block = int(k % 8) * bits, byte = in_block / 8, shift = in_block % 8;
  const uint32_t mask = ((1u << bits) - 1u) << shift, v = code << shift;
  uint8_t* p = row + block + byte;
  p[0] = uint8_t((p[0] & ~mask) | v);
  if (shift + bits > 8) p[1] = uint8_t((p[1] & ~(mask >> 8)) | (v >> 8));
}

namespace detail {
constexpr bool golden_stream_holds() {
  uint8_t b[3] = {};
  for (int k = 0; k < 8; ++k) set_code(b, k, 3, uint32_t((k + 1) % 8));
  for (int k = 0; k < 8; ++k)
    if (get_code(b, k, 3) != uint32_t((k + 1) % 8)) return false;
  return b[0] == 0xd1 && b[1] == 0x58 && b[2] == 0x1f;
}
static_assert(golden_stream_holds());
static_assert(stream_bytes(0, 3) == 0 && stream_bytes(1, 1) == 1 && stream_bytes(9, 7) == 8);
static_assert(stream_bytes((int64_t(1) << 40) + 1, 3) == (int64_t(3) << 37) + 1);
}  // namespace detail

}  // namespace subbyte
