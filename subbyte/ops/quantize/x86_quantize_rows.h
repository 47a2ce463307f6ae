// choose and encode over a vector type V (x86_<isa>_vector.h). Included by x86_*.cc files only, which compile it for their
// instruction set; V is local to the file, so no instance of these templates leaves it.
#pragma once
#include <cstring>

#include "subbyte/ops/quantize/choose_rule.h"
#include "subbyte/ops/quantize/code_rule.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte {
namespace {

// A row passes through the first-level cache in pieces of this many columns. A multiple of 8, so that a piece of a segment
// starts on a byte.
constexpr int64_t kPiece = 512;

template <class V, DType T>
void load_piece_as(const void* row, const int32_t* perm, int64_t k, int64_t count, float* out) {
  if (perm != nullptr) {
    for (int64_t j = 0; j < count; ++j) out[j] = load_float(row, T, perm[k + j]);
    return;
  }
  int64_t j = 0;
  for (; j + V::kLanes <= count; j += V::kLanes) V::template store<DType::kF32>(out, j, V::template load<T>(row, k + j));
  for (; j < count; ++j) out[j] = load_float(row, T, k + j);
}

// Stored columns [k, k + count) of row n as float; out has room for kPiece + V::kLanes, the surplus of the last vector is 0.
template <class V>
void load_piece(const QuantizeParams& p, int64_t n, int64_t k, int64_t count, float* out) {
  const void* row = static_cast<const uint8_t*>(p.w) + n * p.w_stride * dtype_bytes(p.w_dtype);
  switch (p.w_dtype) {
    case DType::kF32: load_piece_as<V, DType::kF32>(row, p.out.perm, k, count, out); break;
    case DType::kF16: load_piece_as<V, DType::kF16>(row, p.out.perm, k, count, out); break;
    case DType::kBF16: load_piece_as<V, DType::kBF16>(row, p.out.perm, k, count, out); break;
    case DType::kF64: load_piece_as<V, DType::kF64>(row, p.out.perm, k, count, out); break;
  }
  V::template store<DType::kF32>(out, count, V::set(0.0f));
}

// Random words of blocks [first, first + count), written in steps of 2 * V::kBlocks blocks. Two chains hide the latency of the
// multiplications.
template <class V>
void philox_blocks(uint64_t seed, uint64_t offset, uint64_t first, int64_t count, uint32_t* out) {
  using I = typename V::I;
  const I m0 = V::set64(0xD2511F53u), m1 = V::set64(0xCD9E8D57u), w0 = V::set64(0x9E3779B9u), w1 = V::set64(0xBB67AE85u);
  for (; count > 0; count -= 2 * V::kBlocks, first += 2 * V::kBlocks, out += 8 * V::kBlocks) {
    I a0 = V::block_indices(first), a1 = V::high32(a0), a2 = V::set64(uint32_t(offset)), a3 = V::set64(offset >> 32);
    I b0 = V::block_indices(first + V::kBlocks), b1 = V::high32(b0), b2 = a2, b3 = a3;
    I k0 = V::set64(uint32_t(seed)), k1 = V::set64(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const I ap0 = V::mul32(m0, a0), ap1 = V::mul32(m1, a2), bp0 = V::mul32(m0, b0), bp1 = V::mul32(m1, b2);
      a0 = V::xor3(V::high32(ap1), a1, k0);
      a2 = V::xor3(V::high32(ap0), a3, k1);
      b0 = V::xor3(V::high32(bp1), b1, k0);
      b2 = V::xor3(V::high32(bp0), b3, k1);
      a1 = ap1;
      a3 = ap0;
      b1 = bp1;
      b3 = bp0;
      k0 = V::add64(k0, w0);
      k1 = V::add64(k1, w1);
    }
    V::store_blocks(out, a0, a1, a2, a3);
    V::store_blocks(out + 4 * V::kBlocks, b0, b1, b2, b3);
  }
}

// code_of for `count` values of one group. Whole vectors are read and written: the surplus is written again by the next group.
template <class V>
void encode_group(const float* v, const uint32_t* words, int64_t count, float scale_value, float zero, const QuantizeParams& p,
                  Format f, uint8_t* codes) {
  const float top_value = float(format_levels(f) - 1);
  const bool offsets = p.out.zero_kind == ZeroKind::kOffsets;
  if (scale_value == 0.0f) {
    const uint32_t code = code_of(0.0f, scale_value, zero, p.out.zero_kind, f, Rounding::kNearest, 0, 0, 0);
    std::memset(codes, int(code), size_t(count));
    return;
  }
  // t = (v - minus) / scale + plus serves both rules bit for bit: minus is 0 or plus is -0, which change no number.
  using F = typename V::F;
  const F scale = V::set(scale_value), minus = V::set(offsets ? zero : 0.0f), plus = V::set(offsets ? -0.0f : zero);
  const F bottom = V::set(0.0f), top = V::set(top_value);
  auto grid = [&](int64_t j) { return V::add(V::div(V::sub(V::template load<DType::kF32>(v, j), minus), scale), plus); };
  auto store = [&](int64_t j, F r) { V::store_codes(codes + j, V::min(V::max(r, bottom), top)); };
  if (p.rounding == Rounding::kStochastic) {
    for (int64_t j = 0; j < count; j += V::kLanes) {
      const F t = grid(j), low = V::floor(t);
      store(j, V::add(low, V::one_if_less(V::uniform(words + j), V::sub(t, low))));
    }
  } else if (f == Format::kSign && p.out.zero_kind == ZeroKind::kFixed) {
    for (int64_t j = 0; j < count; j += V::kLanes) store(j, V::one_if_not_less(grid(j), V::set(0.5f)));
  } else {
    for (int64_t j = 0; j < count; j += V::kLanes) store(j, V::rint(grid(j)));
  }
}

template <class V>
void encode_rows_with(const QuantizeParams& p, int64_t row_begin, int64_t row_end) {
  const PackedMatrix& o = p.out;
  const int64_t groups = o.groups();
  const bool stochastic = p.rounding == Rounding::kStochastic;
  alignas(64) float values[kPiece + V::kLanes];
  alignas(64) uint8_t codes[kPiece + V::kLanes] = {};
  // The piece starts up to 3 words into its first block; blocks come in steps.
  alignas(64) uint32_t words[kPiece + 8 * V::kBlocks + V::kLanes] = {};
  for (int64_t n = row_begin; n < row_end; ++n)
    for (int i = 0; i < o.layout.segment_count; ++i) {
      const Segment& s = o.layout.segments[i];
      const int bits = format_bits(s.format);
      const float fixed_zero = format_fixed_zero(s.format);
      for (int64_t k = 0; k < s.k_count; k += kPiece) {
        const int64_t count = min_i64(kPiece, s.k_count - k), stored = s.k_begin + k;
        load_piece<V>(p, n, stored, count, values);
        const uint64_t element = (p.first_row + uint64_t(n)) * uint64_t(o.k) + uint64_t(stored);
        const int64_t lead = int64_t(element % 4);
        if (stochastic) philox_blocks<V>(p.seed, p.offset, element / 4, ceil_div(lead + count, 4), words);
        for (int64_t j = 0; j < count;) {
          const int64_t g = (stored + j) / o.group_size, end = min_i64(count, (g + 1) * o.group_size - stored);
          const int64_t at = n * groups + g;
          const float zero = o.zero_kind == ZeroKind::kFixed ? fixed_zero : load_float(o.zeros, o.zero_dtype, at);
          encode_group<V>(values + j, words + lead + j, end - j, load_float(o.scales, o.scale_dtype, at), zero, p, s.format,
                          codes + j);
          j = end;
        }
        V::pack(codes, count, bits, p.codes + n * o.layout.row_bytes + s.byte_begin + k / 8 * bits);
      }
    }
}

template <class V>
bool choose_rows_with(const QuantizeParams& p, int64_t row_begin, int64_t row_end) {
  const PackedMatrix& o = p.out;
  const int64_t groups = o.groups();
  alignas(64) float values[kPiece + V::kLanes];
  bool finite = true;
  for (int64_t n = row_begin; n < row_end; ++n) {
    float lo = 0, hi = 0;
    double magnitude = 0;
    for (int64_t piece = 0; piece < o.k; piece += kPiece) {
      const int64_t count = min_i64(kPiece, o.k - piece);
      load_piece<V>(p, n, piece, count, values);
      for (int64_t j = 0; j < count;) {
        const int64_t g = (piece + j) / o.group_size, group_begin = g * o.group_size;
        const int64_t group_end = min_i64(group_begin + o.group_size, o.k), end = min_i64(count, group_end - piece);
        if (piece + j == group_begin) {
          lo = hi = values[j];
          magnitude = 0;
        }
        if (wants_magnitude(p.scheme)) {  // one sum in stored order: the order is part of the rule
          for (; j < end; ++j) magnitude += __builtin_fabs(double(values[j]));
        } else {
          typename V::F low = V::set(lo), high = V::set(hi);
          for (; j + V::kLanes <= end; j += V::kLanes) {
            const typename V::F v = V::template load<DType::kF32>(values, j);
            low = V::min(v, low);
            high = V::max(v, high);
          }
          lo = V::reduce_min(low);
          hi = V::reduce_max(high);
          for (; j < end; ++j) {
            lo = values[j] < lo ? values[j] : lo;
            hi = values[j] > hi ? values[j] : hi;
          }
        }
        if (piece + end < group_end) continue;  // the group goes on in the next piece
        const Format f = segment_of(o.layout, group_begin).format;
        const int64_t at = n * groups + g;
        store_float(p.scales, o.scale_dtype, at,
                    choose_scale(p.scheme, o.zero_kind, f, lo, hi, magnitude, group_end - group_begin, o.k));
        const float stored = load_float(p.scales, o.scale_dtype, at);
        finite = finite && __builtin_isfinite(stored);
        if (p.zeros == nullptr) continue;
        store_float(p.zeros, o.zero_dtype, at, choose_zero(p.scheme, o.zero_kind, f, lo, stored));
        finite = finite && __builtin_isfinite(load_float(p.zeros, o.zero_dtype, at));
      }
    }
  }
  return finite;
}

template <class V, DType T>
bool row_is_finite(const void* row, int64_t k) {
  typename V::I marks = V::zero();
  int64_t j = 0;
  for (; j + V::kLanes <= k; j += V::kLanes) marks = V::mark_not_finite(marks, V::template load<T>(row, j));
  bool finite = !V::any(marks);
  for (; j < k; ++j) finite = finite && __builtin_isfinite(load_float(row, T, j));
  return finite;
}

template <class V>
int64_t find_bad_row_with(const QuantizeParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    const void* row = static_cast<const uint8_t*>(p.w) + n * p.w_stride * dtype_bytes(p.w_dtype);
    bool finite = true;
    switch (p.w_dtype) {
      case DType::kF32: finite = row_is_finite<V, DType::kF32>(row, p.out.k); break;
      case DType::kF16: finite = row_is_finite<V, DType::kF16>(row, p.out.k); break;
      case DType::kBF16: finite = row_is_finite<V, DType::kBF16>(row, p.out.k); break;
      case DType::kF64: finite = row_is_finite<V, DType::kF64>(row, p.out.k); break;
    }
    if (!finite) return n;
  }
  return -1;
}

}  // namespace
}  // namespace subbyte
