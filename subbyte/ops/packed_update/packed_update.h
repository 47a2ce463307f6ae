// One optimizer step on a packed matrix, in place and in one pass: codes, gradient and moments are read, moments and codes are
// written. No dense copy of the weight exists at any time.
//
// Per element (row n, stored column k, group g = k / group_size), float32. fma(a, b, c) is rounded once; otherwise every
// operation is, in the order written.
//   G = grad[n, perm[k]] * factor            factor = *grad_factor, else 1; maximize: -factor
//   An element with |G| >= 2^63 (a NaN and an infinity are such) is skipped: its code and the values of its moments stay.
//   adamw   m <- fma(1 - beta1, G - m, m);   v <- fma(1 - beta2, fma(G, G, -v), v)
//           r = m / fma(sqrt(max(v, 2^-100)), 1 / sqrt(bias_correction2), max(eps, 2^-60));   rate = lr / bias_correction1;
//           decay = lr * weight_decay         (torch.optim.AdamW; Loshchilov and Hutter 2019)
//   sign    c = fma(1 - beta1, G - m, m);   m <- fma(1 - beta2, G - m, m);   r = sign(c) where |c| > threshold, else 0;
//           rate = lr;   decay = lr * weight_decay
//           beta1 = beta2: sign of momentum; otherwise Lion (Chen et al. 2023). Without m: c = G.
//           On the format "sign" a rate of one scale moves a code whenever r asks for it: flipping by a gradient average with a
//           threshold (Bop, Helwegen et al. 2019).
//   sgd     G <- fma(weight_decay * scale, q - zero, G);   m <- fma(momentum, m, (1 - dampening) G);
//           r = nesterov ? fma(momentum, m, G) : m;   rate = lr;   decay = 0
//           (torch.optim.SGD, whose first step passes dampening = 0). Without m: r = G.
//   d = fma(rate / scale, r, fma(decay, q, -(decay * zero)))         the step in units of codes; q the code
//   q <- clamp(q - rint(fma(float(int32(word)), 2^-32 (1 - 2^-22), d)), 0, levels - 1)
//   so that d is rounded to a neighbouring integer with the probability that makes it the mean, to within 2^-23 of a level (of
//   |d|, where that is above 1). The step is rounded, not the code: steps of both signs are treated alike whatever the code,
//   steps of 0 never move a code, steps of one level always do, steps below 2^-23 of a level are lost.
//   d counts as -2^17 at least, and as -2^17 where it is not a number; |rate / scale| and |zero| count as 2^100 at most, decay
//   as 2^20. zero: the code value that means 0, i.e. zeros, the fixed zero, or -offset / scale. A group whose |scale| is below
//   2^-120 or not below 2^120 keeps its codes.
// Random words: blocks are 256 stored columns of one row, number b = (first_row + n) * ceil(K / 256) + k / 256, j = k mod 256.
//   z is number b of the SplitMix64 sequence (Steele, Lea and Flood 2014) that starts at the first two words of
//   Philox(seed, offset, 0); x = low(z) + 0x9E3779B9 j;   x = (x ^ x >> 16) * 0x7FEB352D;
//   word = (x ^ x >> 15 ^ high(z)) * 0x846CA68B           (mod 2^32)
//   One word serves an element three times: itself for the code, word * 0x9E3779B1 for m, word * 0x85EBCA77 for v: the three
//   fill the cube evenly, and columns, blocks, seeds and offsets are independent in the tests' statistics.
// Residual plane (optional, r bits an element): the code is q = codes * 2^r + residual on a grid of scale / 2^r whose zero is
// zero * 2^r + (2^r - 1) / 2, so that codes alone are the midpoints of the fine cells: value = scale * (codes - zero) is what
// ops read, and steps below one level are kept in the residual.
//
// Moments, in stored column order, row after row without gaps:
//   kF32    float32 [N, K]
//   kBF16   bfloat16 [N, K], rounded stochastically: bits + (word' >> 16), cut off after 16 bits
//   kQ8     uint8 [N, K] and float32 absmax [N, ceil(K / 256)] of the blocks: 1 + 4/256 bytes a weight
//   kQ4     uint4 codes, a canonical stream of ceil(K / 2) bytes a row, and absmax as for kQ8: 0.5 + 4/256 bytes
//   A code is a magnitude c; of m also a sign in its highest bit. value = absmax * (t(c) - 1) / (2^R - 1), t(c) =
//   2^floor(c / S) (1 + (c mod S) / S), which is a float32 number of few bits; 1 is taken off so that 0 is a value:
//             S    R of m, of v    smallest m, v of the largest    width of a step, of the value
//      kQ8    8    15, 31          4e-6, 6e-11 (sqrt: 8e-6)        6 to 12 %
//      kQ4    1    7, 15           8e-3, 3e-5 (sqrt: 6e-3)         50 to 100 %
//   Rounded stochastically in value, so that a slow average is not stuck. v is not rounded below code 1, an absmax of 0 apart:
//   else m would be divided by eps. An absmax below 2^-120 is stored as 0, and so are the values then. Zeroed memory means 0.
//   The step itself uses the unrounded m and v. A skipped element of a block is stored again on the block's grid: same value up
//   to that rounding.
// Bytes a weight in training, 8-bit codes with groups of 64 and float16 scales: 1.03 + 2.03 with kQ8 moments; 4-bit codes with
// kQ4 moments 0.53 + 1.03; the gradient comes on top.
//
// codes [N, row_bytes], residual uint8 [N, stream_bytes(K, residual_bits)] (canonical stream, no segments).
// grad [N, K] float32, float16, bfloat16 or float64 (rounded to float32), row stride in elements.
// grad_factor: one float32 (host op: host memory, CUDA op: device memory), or null: clipping or unscaling without a look at it.
// numbers: three float32 (lr, bias_correction1, bias_correction2) in the same memory, or null; they replace the fields, so that
// a captured graph can go on counting. counter: one int64, added to offset, or null.
// N, K may be 0; K need not divide by anything. Any format, mixed width, zero kind, perm.
// Errors (std::invalid_argument): sizes, missing arrays, numbers out of range, perm entries outside [0, K).
// Threads: parallel over rows. Workspace: none. Whole blocks of one width with groups of multiples of 32 columns are the
// fastest. Same bits on every path, thread count and device.
#pragma once
#include <cstdint>

#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

enum class UpdateRule : uint8_t { kAdamW, kSign, kSgd };
enum class MomentType : uint8_t { kNone, kF32, kBF16, kQ8, kQ4 };

// Columns that share an absmax.
inline constexpr int64_t kMomentBlock = 256;

struct MomentView {
  MomentType type = MomentType::kNone;
  void* data = nullptr;
  float* absmax = nullptr;  // kQ8, kQ4
};

struct PackedUpdateParams {
  PackedMatrix w;  // w.codes is not looked at: the codes are `codes`
  uint8_t* codes = nullptr;
  uint8_t* residual = nullptr;
  int residual_bits = 0;  // 0: none
  const void* grad = nullptr;
  DType grad_dtype = DType::kF32;
  int64_t grad_stride = 0;
  const float* grad_factor = nullptr;
  const float* numbers = nullptr;
  const int64_t* counter = nullptr;
  UpdateRule rule = UpdateRule::kAdamW;
  MomentView m;  // adamw: needed; sign: may be none; sgd: none exactly when momentum is 0
  MomentView v;  // adamw alone
  double lr = 0, weight_decay = 0;
  double beta1 = 0, beta2 = 0;  // adamw, sign
  double eps = 0, bias_correction1 = 1, bias_correction2 = 1;
  double threshold = 0;
  double momentum = 0, dampening = 0;
  bool nesterov = false, maximize = false;
  uint64_t seed = 0, offset = 0, first_row = 0;
};

void packed_update(const PackedUpdateParams& p);
// The checks that need no content; shared by the CPU and CUDA entries. False when there is nothing to do.
bool check_packed_update(const PackedUpdateParams& p);

// "packed_adamw_", "packed_sign_", "packed_sgd_".
const char* update_rule_name(UpdateRule rule);
// Bytes of a row of a moment.
SB_HD constexpr int64_t moment_row_bytes(MomentType type, int64_t k) {
  switch (type) {
    case MomentType::kF32: return 4 * k;
    case MomentType::kBF16: return 2 * k;
    case MomentType::kQ8: return k;
    case MomentType::kQ4: return stream_bytes(k, 4);
    default: return 0;
  }
}
SB_HD constexpr bool is_blockwise(MomentType type) { return type == MomentType::kQ8 || type == MomentType::kQ4; }

namespace reference {
void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept;
}

}  // namespace subbyte
