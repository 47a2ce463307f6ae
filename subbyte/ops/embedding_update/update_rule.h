// The rule of embedding_update for one byte of a row: shared text of the CPU and CUDA code, so that both give the same bits.
#pragma once
#include <cmath>

#include "subbyte/base/philox.h"
#include "subbyte/ops/embedding_update/embedding_update.h"

namespace subbyte {

SB_HD float next_momentum(float s, float v, float one_minus_beta) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(s, __fmul_rn(one_minus_beta, __fsub_rn(v, s)));
#else
  const float towards = v - s;
  const float step = one_minus_beta * towards;
  return s + step;
#endif
}

// Stored value of an int8 average: unbiased inside [-127, 127].
SB_HD float rounded_momentum(float s, uint32_t word) {
  const float low = floorf(s), r = low + (uniform24(word) < s - low ? 1.0f : 0.0f);
  return fminf(fmaxf(r, -127.0f), 127.0f);
}

// Byte `byte` of row rows[i]: the new code byte. Bits at and beyond K keep their value.
SB_HD uint8_t updated_byte(const EmbeddingUpdateParams& p, int64_t i, int64_t row, int64_t slot, int64_t byte) {
  const int64_t at = i * p.row_bytes() + byte, left = p.k - byte * 8;
  uint32_t allowed = left >= 8 ? 0xffu : (1u << left) - 1u;
  if (p.mask != nullptr) allowed &= p.mask[at];
  const uint32_t g = p.sign_bits[at], old = p.codes[row * p.row_bytes() + byte];
  if (p.mode == EmbeddingUpdateMode::kDescent) return uint8_t((old & ~allowed) | (~g & allowed));
  if (p.mode == EmbeddingUpdateMode::kXor) return uint8_t(old ^ (g & allowed));
  uint32_t bits = old;
  Philox4 words{};
  int64_t block = -1;
  for (int b = 0; b < 8; ++b) {
    if ((allowed >> b & 1u) == 0) continue;
    const float v = (g >> b & 1u) != 0 ? p.lr : -p.lr;
    const int64_t m = slot * p.k + byte * 8 + b;
    float s;
    if (p.momentum_is_int8) {
      int8_t* momentum = static_cast<int8_t*>(p.momentum);
      const uint64_t e = uint64_t(row * p.k + byte * 8 + b);
      if (int64_t(e / 4) != block) {
        block = int64_t(e / 4);
        words = philox4x32(p.seed, p.offset, e / 4);
      }
      s = rounded_momentum(next_momentum(float(momentum[m]), v, p.one_minus_beta), words.v[e % 4]);
      momentum[m] = int8_t(s);
    } else {
      float* momentum = static_cast<float*>(p.momentum);
      s = next_momentum(momentum[m], v, p.one_minus_beta);
      momentum[m] = s;
    }
    if (s > 0.0f) bits &= ~(1u << b);
    if (s < 0.0f) bits |= 1u << b;
  }
  return uint8_t(bits);
}

}  // namespace subbyte
