// Philox4x32-10 counter-based random bits. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11. A pure function of (seed, offset, index): the same bits on every machine, thread count and device.
#pragma once
#include <cstdint>

#include "subbyte/base/int_math.h"

namespace subbyte {

struct Philox4 {
  uint32_t v[4];
};

// key = seed (low word first), counter = (index low, index high, offset low, offset high).
SB_HD constexpr Philox4 philox4x32(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Random word of element e: lane e mod 4 of block e / 4.
SB_HD constexpr uint32_t philox_word(uint64_t seed, uint64_t offset, uint64_t e) {
  return philox4x32(seed, offset, e / 4).v[e % 4];
}

// Uniform in [0, 1) with 24 bits: exact in float32.
SB_HD constexpr float uniform24(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

// Known answers published with the Random123 library (philox4x32, 10 rounds).
static_assert(philox4x32(0, 0, 0).v[0] == 0x6627e8d5u && philox4x32(0, 0, 0).v[3] == 0x9b00dbd8u);
static_assert(philox4x32(~0ull, ~0ull, ~0ull).v[0] == 0x408f276du && philox4x32(~0ull, ~0ull, ~0ull).v[3] == 0x6d5451fdu);
static_assert(philox4x32(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull).v[0] == 0xd16cfe09u);

}  // namespace subbyte
