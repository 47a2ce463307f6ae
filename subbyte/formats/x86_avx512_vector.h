// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL, VBMI) and what the codec kernels do with them; the counterpart of
// x86_avx2_vector.h. Included by x86_avx512*.cc files only; everything has internal linkage.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "subbyte/base/dtype.h"
#include "subbyte/formats/bits.h"

namespace subbyte::avx512 {
namespace {

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

// Byte shuffles between 64 codes in 8 lanes of 8 bytes and their stream of 8 * bits bytes, for each width.
struct ByteTables {
  alignas(64) uint8_t spread[9][64];   // stream -> lane j, byte i: stream byte j * bits + i
  alignas(64) uint8_t compact[9][64];  // lanes, `bits` bytes used of each -> stream
  alignas(64) uint8_t shifts[9][64];   // bit of lane j where code i starts
};
constexpr ByteTables make_byte_tables() {
  ByteTables t{};
  for (int bits = 1; bits <= 8; ++bits)
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 8; ++i) {
        t.spread[bits][8 * j + i] = uint8_t((j * bits + i) % 64);
        t.shifts[bits][8 * j + i] = uint8_t(i * bits);
        if (i < bits) t.compact[bits][j * bits + i] = uint8_t(8 * j + i);
      }
  return t;
}
constexpr ByteTables kByteTables = make_byte_tables();

// 64 codes a step. Neighbours are merged in 16-, 32- and 64-bit lanes; a byte shuffle closes the gaps.
inline void pack_stream(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) {
  const __m512i compact = _mm512_load_si512(kByteTables.compact[bits]);
  const uint64_t ones = (uint64_t(1) << bits) - 1, ones2 = ones << bits | ones, ones4 = ones2 << 2 * bits | ones2;
  const __m512i odd16 = _mm512_set1_epi16(int16_t(ones << bits)), odd32 = _mm512_set1_epi32(int32_t(ones2 << 2 * bits)),
                odd64 = _mm512_set1_epi64(int64_t(ones4 << 4 * bits));
  const __m128i by16 = _mm_cvtsi32_si128(8 - bits), by32 = _mm_cvtsi32_si128(16 - 2 * bits),
                by64 = _mm_cvtsi32_si128(32 - 4 * bits);
  for (; count > 0; count -= 64, codes += 64, stream += 8 * bits) {
    __m512i v = _mm512_maskz_loadu_epi8(first_bytes(count), codes);
    v = _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi16(0x00ff)), _mm512_and_si512(_mm512_srl_epi16(v, by16), odd16));
    v = _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), _mm512_and_si512(_mm512_srl_epi32(v, by32), odd32));
    v = _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi64(0xffffffff)), _mm512_and_si512(_mm512_srl_epi64(v, by64), odd64));
    _mm512_mask_storeu_epi8(stream, first_bytes(stream_bytes(count < 64 ? count : 64, bits)),
                            _mm512_permutexvar_epi8(compact, v));
  }
}

inline void unpack_stream(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
  const __m512i spread = _mm512_load_si512(kByteTables.spread[bits]), shifts = _mm512_load_si512(kByteTables.shifts[bits]);
  const __m512i mask = _mm512_set1_epi8(char((1u << bits) - 1u));
  for (; count > 0; count -= 64, codes += 64, stream += 8 * bits) {
    __m512i v = _mm512_maskz_loadu_epi8(first_bytes(stream_bytes(count < 64 ? count : 64, bits)), stream);
    v = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, v));
    _mm512_mask_storeu_epi8(codes, first_bytes(count), _mm512_and_si512(v, mask));
  }
}

struct Vector {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;

  static F set(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  // A NaN in the first argument gives the second.
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F rint(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 1 where a < b (a >= b), else 0.
  static F one_if_less(F a, F b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), set(1.0f)); }
  static F one_if_not_less(F a, F b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), set(1.0f)); }

  template <DType T>
  static F load(const void* p, int64_t i) {
    if constexpr (T == DType::kF32) return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    if constexpr (T == DType::kF16)
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i)));
    if constexpr (T == DType::kBF16) {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    if constexpr (T == DType::kF64) {
      const double* d = static_cast<const double*>(p) + i;
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(d))),
                                _mm512_cvtpd_ps(_mm512_loadu_pd(d + 8)), 1);
    }
  }

  template <DType T>
  static void store(void* p, int64_t i, F v) {
    if constexpr (T == DType::kF32) _mm512_storeu_ps(static_cast<float*>(p) + i, v);
    if constexpr (T == DType::kF16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i),
                          _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if constexpr (T == DType::kBF16) {
      const I u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16);
      const I even = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
      const I rounded = _mm512_srli_epi32(_mm512_add_epi32(u, even), 16);
      const I r = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), _mm512_cvtepi32_epi16(r));
    }
    if constexpr (T == DType::kF64) {
      double* d = static_cast<double*>(p) + i;
      _mm512_storeu_pd(d, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
      _mm512_storeu_pd(d + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
  }

  // Codes of kLanes columns from a stream, as float. The first code starts `shift` bits (0..7) after p. Two runs of 8 codes
  // are brought to the two 64-bit lanes of 16 bytes; 8 codes and the shift fit in 64 bits at every width (8 bits: shift 0).
  struct Fields {
    __m128i spread, shifts, mask;
    explicit Fields(int bits)
        : spread(_mm_load_si128(reinterpret_cast<const __m128i*>(kByteTables.spread[bits]))),
          shifts(_mm_load_si128(reinterpret_cast<const __m128i*>(kByteTables.shifts[bits]))),
          mask(_mm_set1_epi8(char((1u << bits) - 1u))) {}
    F widen(__m128i bytes, int shift) const {
      const __m128i at = _mm_add_epi8(shifts, _mm_set1_epi8(char(shift)));
      const __m128i codes = _mm_and_si128(_mm_multishift_epi64_epi8(at, _mm_shuffle_epi8(bytes, spread)), mask);
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
    }
    // `safe` bytes from p on may be read without a look at the end.
    static constexpr int kSafeBytes = 16;
    F read(const uint8_t* p, int shift) const { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), shift); }
    F read_before(const uint8_t* p, int shift, const uint8_t* end) const {
      const int64_t bytes = end - p < 16 ? (end - p > 0 ? end - p : 0) : 16;
      return widen(_mm_maskz_loadu_epi8(__mmask16((1u << bytes) - 1u), p), shift);
    }
  };

  // kLanes codes, given as whole numbers 0..255 in float, as bytes.
  static void store_codes(uint8_t* p, F codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(codes)));
  }
  static void pack(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) { pack_stream(codes, count, bits, stream); }

  // Exponent all ones (NaN or infinity) in any lane, gathered over many vectors.
  static I zero() { return _mm512_setzero_si512(); }
  static I mark_not_finite(I marks, F v) {
    const I exponent = _mm512_set1_epi32(0x7f800000);
    const __mmask16 bad = _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(v), exponent), exponent);
    return _mm512_mask_mov_epi32(marks, bad, exponent);
  }
  static bool any(I marks) { return _mm512_test_epi32_mask(marks, marks) != 0; }
  static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }

  // Uniforms in [0, 1) from random words, as uniform24.
  static F uniform(const uint32_t* words) {
    return mul(_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 8)), set(0x1p-24f));
  }

  // Philox keeps one 32-bit word in the low half of each 64-bit lane (the high half is ignored by the multiplication, so it
  // need not be cleared): one counter a lane, kBlocks counters at a time.
  static constexpr int kBlocks = 8;
  static I block_indices(uint64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  }
  static I set64(uint64_t v) { return _mm512_set1_epi64(int64_t(v)); }
  static I add64(I a, I b) { return _mm512_add_epi64(a, b); }
  static I mul32(I a, I b) { return _mm512_mul_epu32(a, b); }
  static I high32(I a) { return _mm512_srli_epi64(a, 32); }
  static I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  // Words 0..3 of each counter, counter after counter.
  static void store_blocks(uint32_t* out, I c0, I c1, I c2, I c3) {
    const I a = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
    const I b = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
    const I even = _mm512_unpacklo_epi64(a, b), odd = _mm512_unpackhi_epi64(a, b);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(even, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), odd));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(even, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), odd));
  }
};

}  // namespace
}  // namespace subbyte::avx512
