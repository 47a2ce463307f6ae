// Idea: bits of a nibble are looked up by vpshufb, counts of bytes stay in bytes for up to 15 vectors and leave through
// vpsadbw. A tile of 2 x 4 rows reuses its loads. Bound by the shuffle and logic ports (8 operations for 256 bits).
#include <immintrin.h>

#include <cstdint>

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

}  // namespace

void count_xor(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes, int32_t* counts,
               int64_t stride) noexcept {
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
