// Float matrix -> packed matrix. Two ops: quantize chooses scales and zeros and then encodes; encode keeps the ones it is
// given.
//
// choose (per row n and group g, over the values v of the group, float32; hi/lo = max/min of v, 2^b = levels of the format):
//   kMinMax   scale = (hi - lo) / (levels - 1);
//             kOffsets: offset = lo, and the scale rounded to float16 is taken instead where it too carries the top code to hi
//             exactly (scale * (levels - 1) + lo == hi in float32): weights that lie on a float16 grid, as those of a GGUF
//             file do, get that grid back bit for bit. kZeros: zero = clamp(rint(-lo / scale), 0, levels - 1) with lo, hi first
//             extended to contain 0, so that zero is a code (GPTQ's asymmetric grid). kFixed is refused.
//   kAbsMax   the smallest scale that clips nothing around the fixed zero z: max(hi / (levels - 1 - z), -lo / z). kFixed only.
//   kAbsMean  sign: 2 * mean|v|; ternary: mean|v| (BitNet b1.58, Ma et al. 2024); uint b: 2 * mean|v| / sqrt(2^(b-1) - 1)
//             (LSQ, Esser et al. 2020, section 2.1). kFixed only. The mean is formed in double.
//   kMidRise  scale = step(levels) * mean|v| around the middle of the levels, zero = (levels - 1) / 2: 0 lies between two codes
//             (for ternary on the middle one), and codes q and levels - 1 - q are opposite values. step(levels) is the best one
//             for a normal distribution (Max 1960, table II), whose deviation is sqrt(pi / 2) mean|v|.
//   kFanIn    the same grid reaching to R = c / sqrt(K), scale = 2 R / levels, whatever the values are: room for weights that
//             start as U(-1, 1) / sqrt(K), as those of torch.nn.Linear do, and are to be trained. c = 2, 3, 2, 2.5, 3, 3.25,
//             3.5, 3.75, 4 for sign, ternary, 2 .. 8 bits.
//             kMidRise and kFanIn: kZeros, or kFixed for formats whose fixed zero is (levels - 1) / 2, sign and ternary.
//   A scale, zero or offset that is zero is +0. The scale (and offset, zero) is rounded to its storage dtype first; codes are
//   chosen on the rounded grid. A group whose values are all equal gets scale 0 under kMinMax with offsets (the offset is
//   exact); an all-zero group gets scale 0 otherwise. Codes of a group of scale 0 are rint(zero), 0 with offsets.
// encode: t = (v - offset) / scale, or v / scale + zero, two float32 operations;
//   nearest     code = clamp(rint(t), 0, levels - 1)                              ties to even
//   stochastic  code = clamp(floor(t) + (u < t - floor(t)), 0, levels - 1)        u = uniform24(philox_word(seed, offset, e)),
//               e = (first_row + n) * K + k with k the *stored* column: unbiased inside the range, a function of its arguments
//               alone.
//   sign, fixed zero and nearest: code = 1 if t >= 1/2, so ties go up: sign(0) = +1.
//
// w [N, K] float32, float16, bfloat16 or float64 (rounded to float32), row stride in elements. perm as in PackedMatrix:
// stored column k is w[:, perm[k]]. Outputs: codes [N, row_bytes], scales and zeros [N, G], all written whole.
// N, K may be 0; K need not divide by group_size.
// Errors (std::invalid_argument): sizes, scheme and zero kind that do not go together, a NaN or infinite w (position named),
// a scale that overflows its dtype, perm entries outside [0, K).
// Threads: parallel over rows. Workspace: none. Same bits on every path, thread count and device.
#pragma once
#include <cstdint>

#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

enum class Scheme : uint8_t { kMinMax, kAbsMax, kAbsMean, kMidRise, kFanIn };
enum class Rounding : uint8_t { kNearest, kStochastic };

// "minmax", "absmax", "absmean", "midrise", "fan_in"; "nearest", "stochastic". Throw std::invalid_argument listing the names.
Scheme scheme_from_name(std::string_view name);
Rounding rounding_from_name(std::string_view name);
// Whether the scheme chooses scales for this kind of zero.
bool scheme_takes(Scheme scheme, ZeroKind kind, const RowLayout& layout);

struct QuantizeParams {
  const void* w = nullptr;
  DType w_dtype = DType::kF32;
  int64_t w_stride = 0;
  // Layout, sizes, group_size, perm, dtypes and kind of the result. quantize writes through codes, scales and zeros;
  // encode writes through codes and reads scales and zeros.
  PackedMatrix out;
  uint8_t* codes = nullptr;
  void* scales = nullptr;
  void* zeros = nullptr;
  Scheme scheme = Scheme::kMinMax;
  Rounding rounding = Rounding::kNearest;
  uint64_t seed = 0, offset = 0;
  // Row 0 of w is row first_row of the matrix that the random bits are counted over: a matrix encoded in blocks of rows, or
  // in shards, gets the bits of one call.
  uint64_t first_row = 0;
};
// out.codes/scales/zeros are ignored; the results go to codes, scales, zeros (null when out.zero_kind is kFixed).
void quantize(const QuantizeParams& p);
// scales and zeros of `out` are read; only `codes` is written.
void encode(const QuantizeParams& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_quantize_sizes(const QuantizeParams& p);
bool check_encode_sizes(const QuantizeParams& p);

namespace reference {
// Rows [row_begin, row_end). quantize: false when a scale overflows scale_dtype (the caller reports it).
bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
}  // namespace reference

}  // namespace subbyte
