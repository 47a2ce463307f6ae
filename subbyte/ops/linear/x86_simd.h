// The vector unit that the float kernels are written for: one struct `Simd`, AVX-512 where the file is compiled for it, else
// AVX2. Included by ISA files only; everything has internal linkage, so no copy can reach baseline callers.
//
// Decoding: the field at bit p of a 32-bit lane is or-ed, where it lies, into the mantissa of 2^(23-p), which makes the lane
// the float 2^(23-p) + q; subtracting 2^(23-p) + c gives q - c exactly. Two logic operations (one on AVX-512) and one
// subtraction, no shift and no conversion. Fields that would reach beyond bit 22 are taken from one copy shifted right.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 on its own AVX-512 header: _mm512_undefined
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "subbyte/base/dtype.h"
#include "subbyte/formats/format.h"
#include "subbyte/ops/linear/weight_segment.h"

#define SB_INLINE [[gnu::always_inline]] static inline

namespace subbyte {
namespace {

#if defined(__AVX512F__)

struct ByteIndex {
  uint8_t b[64];
};
// Lane i takes 4 bytes: from byte 3 i (odd == 0), or pairs of lanes from byte pair * i / 2, the odd one `odd` bytes further.
constexpr ByteIndex byte_index(int pair, int odd) {
  ByteIndex out{};
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) out.b[4 * i + j] = uint8_t(((odd == 0 ? pair * i : pair * (i / 2) + (i % 2) * odd) + j) & 63);
  return out;
}

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 14;     // 14x32: 28 sums, 2 vectors of weights, 1 broadcast of 32 registers
  static constexpr int kPanelDepth = 256;  // 32 KiB: two thirds of L1
  static constexpr int kRowBlock = 544;    // 544 KiB of x in L2 (1 MiB on Zen 4, 2 on Sapphire Rapids): 512 rows are one block
  using Float = __m512;
  using Int = __m512i;

  SB_INLINE Float zero() { return _mm512_setzero_ps(); }
  SB_INLINE Float set1(float v) { return _mm512_set1_ps(v); }
  SB_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  SB_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  SB_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  SB_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  SB_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  SB_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  SB_INLINE float sum(Float v) { return _mm512_reduce_add_ps(v); }
  SB_INLINE Float load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  SB_INLINE Float load_bf16(const void* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  SB_INLINE Float first_lanes(Float v, int64_t count) { return _mm512_maskz_mov_ps(__mmask16((1u << count) - 1u), v); }
  // Lane i becomes lane index[i] - base of v.
  SB_INLINE Float permute(Float v, const int32_t* index, int32_t base) {
    return _mm512_permutexvar_ps(_mm512_sub_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(base)), v);
  }
  SB_INLINE Float gather(const float* p, const int32_t* index) { return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4); }
  SB_INLINE Int zero_int() { return _mm512_setzero_si512(); }
  SB_INLINE Int as_int(Float v) { return _mm512_castps_si512(v); }
  SB_INLINE Float as_float(Int v) { return _mm512_castsi512_ps(v); }
  SB_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
  // 16 bytes at p, of which each lane picks its own and shifts them down.
  static constexpr int kSpreadBytes = 16;
  SB_INLINE Int spread(const uint8_t* p, Int index, Int shift) {
    const Int v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(v, index), shift);
  }
  template <int kShift>
  SB_INLINE Int shift_right(Int v) {
    return _mm512_srli_epi32(v, kShift);
  }
  SB_INLINE Float field(Int v, uint32_t mask, uint32_t magic, float bias) {
    const Int f = _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(int(mask)), _mm512_set1_epi32(int(magic)), 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(f), _mm512_set1_ps(bias));
  }

  template <int kBits>
  SB_INLINE Int load_block(const uint8_t* p) {
    if constexpr (kBits == 1 || kBits == 2 || kBits == 4 || kBits == 8) {
      return _mm512_loadu_si512(p);
    } else {
      constexpr __mmask64 kRead = (uint64_t(1) << (16 * lane_codes(kBits) * kBits / 8)) - 1;
      const Int v = _mm512_maskz_loadu_epi8(kRead, p);
      if constexpr (kBits == 3 || kBits == 6) {
        alignas(64) static constexpr ByteIndex kIndex = byte_index(3, 0);
        return _mm512_maskz_permutexvar_epi8(0x7777777777777777u, _mm512_load_si512(kIndex.b), v);
      } else {
        alignas(64) static constexpr ByteIndex kIndex = byte_index(kBits, kBits / 2);
        const Int even_odd = _mm512_set1_epi64(int64_t(4) << 32);
        return _mm512_srlv_epi32(_mm512_permutexvar_epi8(_mm512_load_si512(kIndex.b), v), even_odd);
      }
    }
  }

  SB_INLINE void transpose(Int (&v)[16]) {
    Int a[16], b[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const Int lo02 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), lo13 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
      const Int hi02 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), hi13 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
      v[i] = _mm512_shuffle_i32x4(lo02, hi02, 0x88);
      v[i + 8] = _mm512_shuffle_i32x4(lo02, hi02, 0xdd);
      v[i + 4] = _mm512_shuffle_i32x4(lo13, hi13, 0x88);
      v[i + 12] = _mm512_shuffle_i32x4(lo13, hi13, 0xdd);
    }
  }
};

#else

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;      // 6x16: 12 sums, 2 vectors of weights, 1 broadcast of 16 registers
  static constexpr int kPanelDepth = 256;  // 16 KiB: half of L1
  static constexpr int kRowBlock = 192;    // 192 KiB of x, less than half of L2 on Zen 3
  using Float = __m256;
  using Int = __m256i;

  SB_INLINE Float zero() { return _mm256_setzero_ps(); }
  SB_INLINE Float set1(float v) { return _mm256_set1_ps(v); }
  SB_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  SB_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  SB_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  SB_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  SB_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  SB_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  SB_INLINE float sum(Float v) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  SB_INLINE Float load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  SB_INLINE Float load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
  }
  SB_INLINE Float first_lanes(Float v, int64_t count) {
    const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane)));
  }
  SB_INLINE Float permute(Float v, const int32_t* index, int32_t base) {
    const Int i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return _mm256_permutevar8x32_ps(v, _mm256_sub_epi32(i, _mm256_set1_epi32(base)));
  }
  SB_INLINE Float gather(const float* p, const int32_t* index) {
    return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
  }
  SB_INLINE Int zero_int() { return _mm256_setzero_si256(); }
  SB_INLINE Int as_int(Float v) { return _mm256_castps_si256(v); }
  SB_INLINE Float as_float(Int v) { return _mm256_castsi256_ps(v); }
  SB_INLINE Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // 8 bytes at p, of which each lane picks its own and shifts them down.
  static constexpr int kSpreadBytes = 8;
  SB_INLINE Int spread(const uint8_t* p, Int index, Int shift) {
    int64_t bytes;
    std::memcpy(&bytes, p, 8);
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), index), shift);
  }
  template <int kShift>
  SB_INLINE Int shift_right(Int v) {
    return _mm256_srli_epi32(v, kShift);
  }
  SB_INLINE Float field(Int v, uint32_t mask, uint32_t magic, float bias) {
    const Int f = _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi32(int(mask))), _mm256_set1_epi32(int(magic)));
    return _mm256_sub_ps(_mm256_castsi256_ps(f), _mm256_set1_ps(bias));
  }

  // The second half is loaded so that it ends with the block: nothing beyond the block is read.
  template <int kBits>
  SB_INLINE Int load_block(const uint8_t* p) {
    if constexpr (kBits == 1 || kBits == 2 || kBits == 4 || kBits == 8) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else {
      constexpr int kBytes = lane_codes(kBits) * kBits;
      const Int v = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kBytes - 16)), 1);
      if constexpr (kBits == 3 || kBits == 6) {
        return _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                                       4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1));
      } else {
        const Int index = kBits == 5 ? _mm256_setr_epi8(0, 1, 2, -1, 2, 3, 4, -1, 5, 6, 7, -1, 7, 8, 9, -1,  //
                                                        6, 7, 8, -1, 8, 9, 10, -1, 11, 12, 13, -1, 13, 14, 15, -1)
                                     : _mm256_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13,  //
                                                        2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15);
        return _mm256_srlv_epi32(_mm256_shuffle_epi8(v, index), _mm256_set1_epi64x(int64_t(4) << 32));
      }
    }
  }

  SB_INLINE void transpose(Int (&v)[8]) {
    Int a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
      v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
  }
};

#endif

// The first `bytes` bytes at p, then zeros. The barrier keeps it a loop: no call of memcpy for a few bytes.
SB_INLINE void copy_start(uint8_t (&to)[64], const uint8_t* p, int64_t bytes) {
  std::memset(to, 0, 64);
  for (int64_t i = 0; i < bytes; ++i) {
    to[i] = p[i];
    __asm__("" ::: "memory");
  }
}

// A block of codes in registers, and its fields.
template <Format kFormat>
struct Block {
  static constexpr int kBits = format_bits(kFormat);
  static constexpr int kCentre = format_centre(kFormat);
  static constexpr int kFields = lane_codes(kBits);
  static constexpr int kCodes = Simd::kLanes * kFields;
  static constexpr int kBytes = kCodes / 8 * kBits;
  static constexpr int kDirect = kFields * kBits <= 23 ? kFields : 23 / kBits;  // fields that end at or below bit 22

  Simd::Int low, high;

  // The block at p. `available` bytes belong to the matrix from there on; what is missing reads as zeros.
  SB_INLINE Block load(const uint8_t* p, int64_t available) {
    if (available >= kBytes) [[likely]]
      return whole(p);
    alignas(64) uint8_t copy[64];
    copy_start(copy, p, available);
    return whole(copy);
  }
  SB_INLINE Block whole(const uint8_t* p) { return of(Simd::load_block<kBits>(p)); }
  SB_INLINE Block of(Simd::Int v) {
    if constexpr (kDirect < kFields) return Block{v, Simd::shift_right<kDirect * kBits>(v)};
    else return Block{v, v};
  }
  // Where field j lies, the mantissa it is or-ed into, and what is subtracted.
  struct Constants {
    uint32_t mask[kFields], magic[kFields];
    float bias[kFields];
  };
  static constexpr Constants make_constants() {
    Constants c{};
    for (int j = 0; j < kFields; ++j) {
      const int bit = (j < kDirect ? j : j - kDirect) * kBits;
      c.mask[j] = ((1u << kBits) - 1u) << bit;
      c.magic[j] = uint32_t(127 + 23 - bit) << 23;
      c.bias[j] = float(int64_t(1) << (23 - bit)) + float(kCentre);
    }
    return c;
  }
  static constexpr Constants kConstants = make_constants();
  // The compiler must not see the values: g++ would rebuild each vector with a move and a broadcast wherever it is used.
  SB_INLINE const Constants* constants() {
    const Constants* c = &kConstants;
    __asm__("" : "+r"(c));
    return c;
  }
  // Codes j, j + kFields, j + 2 kFields ..., less the centre. j must be a constant once loops are unrolled.
  [[gnu::always_inline]] inline Simd::Float field(int j, const Constants* c) const {
    return Simd::field(j < kDirect ? low : high, c->mask[j], c->magic[j], c->bias[j]);
  }
};

// `count` floats of type t from element i on, as a vector; reads nothing at or beyond `end`. Lanes from count on are
// unspecified.
SB_INLINE Simd::Float load_floats(const uint8_t* p, DType t, const uint8_t* end, int64_t count) {
  alignas(64) uint8_t copy[4 * Simd::kLanes];
  const int64_t bytes = t == DType::kF32 ? 4 : 2;
  if (end - p < bytes * Simd::kLanes) [[unlikely]] {
    std::memset(copy, 0, sizeof(copy));
    const int64_t used = bytes * (count < Simd::kLanes ? count : Simd::kLanes);
    for (int64_t i = 0; i < used; ++i) copy[i] = p[i];
    p = copy;
  }
  if (t == DType::kF32) return Simd::load(reinterpret_cast<const float*>(p));
  return t == DType::kF16 ? Simd::load_f16(p) : Simd::load_bf16(p);
}

// One float of type t.
SB_INLINE float load_one(const uint8_t* p, DType t) {
  if (t == DType::kF32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  if (t == DType::kF16) return _cvtsh_ss(h);
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(uint32_t(h) << 16))));
}

// Offset o of a group (weight_segment.h) from its scale and zero.
SB_INLINE Simd::Float group_offset(ZeroKind kind, float centre, Simd::Float scale, Simd::Float zero) {
  return kind == ZeroKind::kOffsets ? Simd::fma(scale, Simd::set1(centre), zero)
                                    : Simd::mul(scale, Simd::sub(Simd::set1(centre), zero));
}

// Scales and offsets of groups [g, g + count), count <= lanes, of row n. Lanes from count on are unspecified.
SB_INLINE void load_groups(const WeightSegment& w, int64_t n, int64_t g, int64_t count, Simd::Float& scale,
                           Simd::Float& offset) {
  const int64_t i = n * w.row_groups + g;
  scale = load_floats(w.scales + i * dtype_bytes(w.scale_dtype), w.scale_dtype, w.scales_end, count);
  const Simd::Float zero = w.zero_kind == ZeroKind::kFixed
                               ? Simd::set1(format_fixed_zero(w.format))
                               : load_floats(w.zeros + i * dtype_bytes(w.zero_dtype), w.zero_dtype, w.zeros_end, count);
  offset = group_offset(w.zero_kind, float(format_centre(w.format)), scale, zero);
}

// `count` elements of type t (never float64) from x on, through perm when there is one, to float32. The copy of float32
// without perm is left to the caller.
SB_INLINE void convert_floats(const uint8_t* x, DType t, const int32_t* perm, int64_t k, int64_t count, float* out) {
  const int64_t bytes = dtype_bytes(t);
  if (perm != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = load_one(x + perm[k + i] * bytes, t);
    return;
  }
  int64_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    const uint8_t* p = x + (k + i) * bytes;
    Simd::store(out + i, t == DType::kF32   ? Simd::load(reinterpret_cast<const float*>(p))
                         : t == DType::kF16 ? Simd::load_f16(p)
                                            : Simd::load_bf16(p));
  }
  for (; i < count; ++i) out[i] = load_one(x + (k + i) * bytes, t);
}

}  // namespace
}  // namespace subbyte
