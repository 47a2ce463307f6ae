// Idea: bits of a nibble are looked up by vpshufb, counts of bytes stay in bytes for up to 15 vectors and leave through
// vpsadbw. A tile of 2 x 4 rows reuses its loads. Bound by the shuffle and logic ports (8 operations for 256 bits). Rows of up
// to 1024 bits are counted by popcnt on 64 bits instead, which needs no sum across a vector at the end: attention and
// convolutions.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "subbyte/base/dtype.h"

namespace subbyte::binary_matmul_x86::avx2 {
namespace {

inline int32_t sum_of(__m256i v) {
  const __m128i s = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return int32_t(_mm_cvtsi128_si64(s) + _mm_extract_epi64(s, 1));
}

template <int M, int N>
__attribute__((always_inline)) inline void tile(const uint8_t* x, const uint8_t* z, int64_t row_bytes, int32_t* counts,
                                                int64_t stride) {
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  __m256i total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = zero;
  constexpr int64_t kBytesOfBytes = 15 * 32;  // 15 vectors of at most 8 a byte stay below 256
  for (int64_t begin = 0; begin < row_bytes; begin += kBytesOfBytes) {
    const int64_t end = begin + kBytesOfBytes < row_bytes ? begin + kBytesOfBytes : row_bytes;
    __m256i part[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) part[m][n] = zero;
    for (int64_t i = begin; i < end; i += 32) {
      __m256i a[M];
      for (int m = 0; m < M; ++m) a[m] = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + m * row_bytes + i));
      for (int n = 0; n < N; ++n) {
        const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(z + n * row_bytes + i));
        for (int m = 0; m < M; ++m) {
          const __m256i v = _mm256_xor_si256(a[m], b);
          const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
          const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
          part[m][n] = _mm256_add_epi8(part[m][n], _mm256_add_epi8(lo, hi));
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = _mm256_add_epi64(total[m][n], _mm256_sad_epu8(part[m][n], zero));
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) counts[m * stride + n] = sum_of(total[m][n]);
}

inline uint64_t word_at(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

template <int N>
__attribute__((always_inline)) inline void short_row(const uint8_t* x, const uint8_t* z, int64_t row_bytes, int64_t words,
                                                     int32_t* counts) {
  int64_t total[N] = {};
  for (int64_t i = 0; i < words; ++i) {
    const uint64_t a = word_at(x + i * 8);
    for (int n = 0; n < N; ++n) total[n] += __builtin_popcountll(a ^ word_at(z + n * row_bytes + i * 8));
  }
  for (int n = 0; n < N; ++n) counts[n] = int32_t(total[n]);
}

void count_short(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes, int64_t words,
                 int32_t* counts, int64_t stride) {
  for (int64_t m = 0; m < m_count; ++m) {
    const uint8_t* xr = x + m * row_bytes;
    int64_t n = 0;
    for (; n + 4 <= n_count; n += 4) short_row<4>(xr, z + n * row_bytes, row_bytes, words, counts + m * stride + n);
    for (; n < n_count; ++n) short_row<1>(xr, z + n * row_bytes, row_bytes, words, counts + m * stride + n);
  }
}

int64_t pack_f32(const float* v, int64_t k, uint8_t* out, bool& nan) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 none = zero;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    uint32_t bits = 0;
    for (int j = 0; j < 4; ++j) {
      const __m256 a = _mm256_loadu_ps(v + i + 8 * j);
      none = _mm256_or_ps(none, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
      bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, zero, _CMP_GE_OQ))) << (8 * j);
    }
    std::memcpy(out + i / 8, &bits, 4);
  }
  for (; i + 8 <= k; i += 8) {
    const __m256 a = _mm256_loadu_ps(v + i);
    none = _mm256_or_ps(none, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    out[i / 8] = uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(a, zero, _CMP_GE_OQ)));
  }
  nan = nan || _mm256_movemask_ps(none) != 0;
  return i;
}

// On the bit patterns: +1 unless the sign is set on something other than zero; NaN lies beyond infinity.
int64_t pack_f16(const uint16_t* v, int infinity, int64_t k, uint8_t* out, bool& nan) {
  const __m256i low = _mm256_set1_epi16(0x7fff), top = _mm256_set1_epi16(int16_t(infinity)), zero = _mm256_setzero_si256();
  __m256i none = zero;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    __m256i plus[2];
    for (int j = 0; j < 2; ++j) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + i + 16 * j));
      const __m256i magnitude = _mm256_and_si256(a, low), beyond = _mm256_cmpgt_epi16(magnitude, top);
      none = _mm256_or_si256(none, beyond);
      // -0 is the one pattern that is negative as an integer and has no magnitude.
      const __m256i minus = _mm256_andnot_si256(_mm256_cmpeq_epi16(magnitude, zero), _mm256_srai_epi16(a, 15));
      plus[j] = _mm256_andnot_si256(_mm256_or_si256(minus, beyond), _mm256_set1_epi16(-1));
    }
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(plus[0], plus[1]), 0xd8);
    const uint32_t bits = uint32_t(_mm256_movemask_epi8(bytes));
    std::memcpy(out + i / 8, &bits, 4);
  }
  nan = nan || _mm256_movemask_epi8(none) != 0;
  return i;
}

}  // namespace

int64_t pack_signs(const void* v, DType dtype, int64_t k, uint8_t* out, bool& nan) noexcept {
  if (dtype == DType::kF32) return pack_f32(static_cast<const float*>(v), k, out, nan);
  if (dtype == DType::kBF16) return pack_f16(static_cast<const uint16_t*>(v), 0x7f80, k, out, nan);
  if (dtype == DType::kF16) return pack_f16(static_cast<const uint16_t*>(v), 0x7c00, k, out, nan);
  return 0;
}

void count_xor(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes, int64_t used_bytes,
               int32_t* counts, int64_t stride) noexcept {
  if (used_bytes <= 128) return count_short(x, m_count, z, n_count, row_bytes, (used_bytes + 7) / 8, counts, stride);
  for (int64_t m = 0; m < m_count; m += 2)
    for (int64_t n = 0; n < n_count; n += 4) {
      const uint8_t* xr = x + m * row_bytes;
      const uint8_t* zr = z + n * row_bytes;
      int32_t* out = counts + m * stride + n;
      if (m + 2 <= m_count && n + 4 <= n_count) {
        tile<2, 4>(xr, zr, row_bytes, out, stride);
      } else {
        for (int64_t r = 0; r < 2 && m + r < m_count; ++r)
          for (int64_t c = 0; c < 4 && n + c < n_count; ++c)
            tile<1, 1>(xr + r * row_bytes, zr + c * row_bytes, row_bytes, out + r * stride + c, stride);
      }
    }
}

}  // namespace subbyte::binary_matmul_x86::avx2
