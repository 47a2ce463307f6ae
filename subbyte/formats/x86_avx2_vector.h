// Eight float32 lanes of AVX2 and what the codec kernels do with them: read and write canonical code streams, load and store
// element types, Philox. Included by x86_avx2*.cc files only; everything has internal linkage.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "subbyte/base/dtype.h"
#include "subbyte/formats/bits.h"

namespace subbyte::avx2 {
namespace {

// 8 bytes at p as a little-endian word; bytes at and after `end` read as zero and are not touched.
inline uint64_t load_bytes(const uint8_t* p, const uint8_t* end) {
  uint64_t v = 0;
  if (end - p >= 8) [[likely]] {
    std::memcpy(&v, p, 8);
    return v;
  }
  for (int64_t i = 0; i < end - p; ++i) v |= uint64_t(p[i]) << (8 * i);
  return v;
}

inline uint64_t field_mask(int bits) { return 0x0101010101010101u * ((1u << bits) - 1u); }

// Of `count` codes the first ones, a multiple of 8, each eight of which may be moved as a whole 8-byte word of the stream.
inline int64_t whole_words(int64_t count, int bits) {
  const int64_t words = (stream_bytes(count, bits) - 8 + bits) / bits;
  return words <= 0 ? 0 : 8 * (words < count / 8 ? words : count / 8);
}

// One byte a code -> stream, and back. pext and pdep move 8 codes an instruction: one byte of codes a cycle and more, above
// what memory delivers. (Zen 1 and 2 run them in microcode, about 20 times slower; correct there all the same.)
inline void pack_stream(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) {
  const uint64_t mask = field_mask(bits);
  const uint8_t* const end = stream + stream_bytes(count, bits);
  int64_t k = 0;
  for (const int64_t whole = whole_words(count, bits); k < whole; k += 8, stream += bits) {
    uint64_t v;
    std::memcpy(&v, codes + k, 8);
    v = _pext_u64(v, mask);
    std::memcpy(stream, &v, 8);  // the bytes after `bits` are written again by the next step
  }
  for (; k < count; k += 8) {
    const uint64_t v = _pext_u64(load_bytes(codes + k, codes + count), mask);
    for (int i = 0; i < bits && stream < end; ++i) *stream++ = uint8_t(v >> (8 * i));
  }
}

inline void unpack_stream(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
  const uint64_t mask = field_mask(bits);
  const uint8_t* const end = stream + stream_bytes(count, bits);
  int64_t k = 0;
  for (const int64_t whole = whole_words(count, bits); k < whole; k += 8, stream += bits) {
    uint64_t v;
    std::memcpy(&v, stream, 8);
    v = _pdep_u64(v, mask);
    std::memcpy(codes + k, &v, 8);
  }
  for (; k + 8 <= count; k += 8, stream += bits) {
    const uint64_t v = _pdep_u64(load_bytes(stream, end), mask);
    std::memcpy(codes + k, &v, 8);
  }
  if (k < count) {
    uint64_t v = _pdep_u64(load_bytes(stream, end), mask);
    for (; k < count; ++k, v >>= 8) codes[k] = uint8_t(v);
  }
}

struct Vector {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;

  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  // A NaN in the first argument gives the second.
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F floor(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F rint(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 1 where a < b (a >= b), else 0.
  static F one_if_less(F a, F b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), set(1.0f)); }
  static F one_if_not_less(F a, F b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), set(1.0f)); }

  template <DType T>
  static F load(const void* p, int64_t i) {
    if constexpr (T == DType::kF32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
    if constexpr (T == DType::kF16)
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i)));
    if constexpr (T == DType::kBF16) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    if constexpr (T == DType::kF64) {
      const double* d = static_cast<const double*>(p) + i;
      return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(d + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(d)));
    }
  }

  template <DType T>
  static void store(void* p, int64_t i, F v) {
    if constexpr (T == DType::kF32) _mm256_storeu_ps(static_cast<float*>(p) + i, v);
    if constexpr (T == DType::kF16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i),
                       _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if constexpr (T == DType::kBF16) {
      const I u = _mm256_castps_si256(v), high = _mm256_srli_epi32(u, 16);
      const I even = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
      const I rounded = _mm256_srli_epi32(_mm256_add_epi32(u, even), 16);
      const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const I r = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
      const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), _mm256_castsi256_si128(packed));
    }
    if constexpr (T == DType::kF64) {
      double* d = static_cast<double*>(p) + i;
      _mm256_storeu_pd(d, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
      _mm256_storeu_pd(d + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    }
  }

  // Codes of kLanes columns from a stream, as float. The first code starts `shift` bits (0..7) after p.
  struct Fields {
    uint64_t mask;
    explicit Fields(int bits) : mask(field_mask(bits)) {}
    static F widen(uint64_t eight) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(eight)))); }
    // `safe` bytes from p on may be read without a look at the end.
    static constexpr int kSafeBytes = 8;
    F read(const uint8_t* p, int shift) const {
      uint64_t v;
      std::memcpy(&v, p, 8);
      return widen(_pdep_u64(v >> shift, mask));
    }
    F read_before(const uint8_t* p, int shift, const uint8_t* end) const {
      return widen(_pdep_u64(load_bytes(p, end) >> shift, mask));
    }
  };

  // kLanes codes, given as whole numbers 0..255 in float, as bytes.
  static void store_codes(uint8_t* p, F codes) {
    const I v = _mm256_cvtps_epi32(codes);
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
  }
  static void pack(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) { pack_stream(codes, count, bits, stream); }

  // Exponent all ones (NaN or infinity) in any lane, gathered over many vectors.
  static I zero() { return _mm256_setzero_si256(); }
  static I mark_not_finite(I marks, F v) {
    const I exponent = _mm256_set1_epi32(0x7f800000);
    return _mm256_or_si256(marks, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), exponent), exponent));
  }
  static bool any(I marks) { return !_mm256_testz_si256(marks, marks); }
  static float reduce_min(F v) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
  }
  static float reduce_max(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }

  // Uniforms in [0, 1) from random words, as uniform24.
  static F uniform(const uint32_t* words) {
    const I w = _mm256_loadu_si256(reinterpret_cast<const I*>(words));
    return mul(_mm256_cvtepi32_ps(_mm256_srli_epi32(w, 8)), set(0x1p-24f));
  }

  // Philox keeps one 32-bit word in the low half of each 64-bit lane (the high half is ignored by the multiplication, so it
  // need not be cleared): one counter a lane, kBlocks counters at a time.
  static constexpr int kBlocks = 4;
  static I block_indices(uint64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_set_epi64x(3, 2, 1, 0));
  }
  static I set64(uint64_t v) { return _mm256_set1_epi64x(int64_t(v)); }
  static I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  static I mul32(I a, I b) { return _mm256_mul_epu32(a, b); }
  static I high32(I a) { return _mm256_srli_epi64(a, 32); }
  static I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  // Words 0..3 of each counter, counter after counter.
  static void store_blocks(uint32_t* out, I c0, I c1, I c2, I c3) {
    const I a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const I b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    const I even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256(reinterpret_cast<I*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<I*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

}  // namespace
}  // namespace subbyte::avx2
