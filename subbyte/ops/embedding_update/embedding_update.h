// Bits of the touched rows of a table of signs move against their gradient. r = rows[i], k < K, g = bit k of sign_bits row i
// (1: the gradient is >= 0), w = 2 bit - 1; only where bit k of mask row i is 1.
//
//   kDescent   bit := NOT g                     w <- -sign(A): a full step, every selected bit ends up against its gradient
//   kXor       bit := bit XOR g                 flips where the gradient is >= 0, as bitorch-engine documents its update; there
//   "change
//                                               only where the packed gradient is not 0" says the same once more, since XOR
//                                               with 0 changes nothing. It leaves w = +1 right and moves w = -1 uphill: kept
//                                               for comparison
//   kMomentum  s' = s + (1 - beta) (v - s)      v = lr (2 g - 1): a moving average of the gradient's signs, in float32
//              bit := s' > 0 ? 0 : s' < 0 ? 1 : bit        w <- -sign(s')
//              s = momentum[slots[i], k], which becomes s'. float32 as it is; int8 by stochastic rounding,
//              clamp(floor(s') + (u < s' - floor(s')), -127, 127), u = uniform24(philox_word(seed, offset, r K + k)), and the
//              sign is that of the stored value.
//   The rule is the embedding rule of DiodeMix (s += (1 - beta2)(v - s), bit := s >= 0) with the minus sign that descends, and
//   with a bit that stays where the average is undecided. A state that starts at -sign(w) start damps: a bit flips only when
//   gradients against it have outweighed the start, after about ln(1 + start / lr) / (1 - beta) steps of one sign.
//   lr is in the state's units: for int8 up to 127.
//
// codes      uint8 [N, ceil(K / 8)], format sign, changed in place; spare bits and rows that are not named stay
// rows       int64 [count], strictly increasing, in [0, N)
// sign_bits  uint8 [count, ceil(K / 8)] as of embedding_grad; spare bits are not looked at
// mask       the same shape, or null (all 1)
// momentum   float32 or int8 [momentum_rows, K], kMomentum only; slots int64 [count], distinct, in [0, momentum_rows)
//
// count and K may be 0. Errors: std::out_of_range for a row outside [0, N) (CPU); std::invalid_argument for sizes, missing
// arrays, rows that do not increase, slots out of range (CPU), beta outside [0, 1), lr that is negative or not finite.
// Threads: parallel over rows. Workspace: none. Same bits on every path, thread count and device.
// Source: Guo et al. 2024 (Diode); bitorch-engine 0.2.6 with the sign put right.
#pragma once
#include <cstdint>

#include "subbyte/base/int_math.h"

namespace subbyte {

enum class EmbeddingUpdateMode : uint8_t { kDescent, kXor, kMomentum };

struct EmbeddingUpdateParams {
  EmbeddingUpdateMode mode = EmbeddingUpdateMode::kDescent;
  uint8_t* codes = nullptr;
  int64_t n = 0, k = 0;
  const int64_t* rows = nullptr;
  int64_t count = 0;
  const uint8_t* sign_bits = nullptr;
  const uint8_t* mask = nullptr;
  void* momentum = nullptr;
  bool momentum_is_int8 = false;
  int64_t momentum_rows = 0;
  const int64_t* slots = nullptr;
  float lr = 1.0f;
  float one_minus_beta = 0.01f;
  uint64_t seed = 0, offset = 0;

  SB_MEMBER_HD int64_t row_bytes() const { return (k + 7) / 8; }
};
void embedding_update(const EmbeddingUpdateParams& p);
// The checks of the entry that need no content; shared by the CPU and CUDA entries. False when there is nothing to do.
bool check_sizes(const EmbeddingUpdateParams& p);

}  // namespace subbyte
