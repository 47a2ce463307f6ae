// Idea: rows of int8 lie K-contiguous, so a tile of 2 x 4 dot products reads 6 vectors for 8 products and sums across lanes
// once at the end, four products together. dot_narrow (values up to 32, so 4-, 5- and 6-bit operands): |x| * sign(z, x) by
// vpmaddubsw, pairs of at most 2048 stay in int16 for 15 steps before they are widened. dot_int8: both operands widened to
// int16 for vpmaddwd, exact at -128 * -128. Bound by the multiply ports; for K = 64 by the end of each product, where sums one
// by one and a store that asked for its type each time took half of the time (24 against 50 Gops, Zen 3, one thread).
#include <immintrin.h>

#include <cstdint>

namespace subbyte::quantized_matmul_x86::avx2 {
namespace {

constexpr int kRows = 2, kColumns = 4;

inline int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// The sums across the lanes of N products; four share their additions.
template <int N>
__attribute__((always_inline)) inline void store_sums(const __m256i (&total)[N], int32_t* out) {
  if constexpr (N == 4) {
    const __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(total[0], total[1]), _mm256_hadd_epi32(total[2], total[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
  } else {
    for (int n = 0; n < N; ++n) out[n] = sum_of(total[n]);
  }
}

template <int M, int N>
__attribute__((always_inline)) inline void tile_narrow(const int8_t* x, int64_t xs, const int8_t* z, int64_t zs, int64_t k,
                                                       int64_t steps, int32_t* sums, int64_t stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = _mm256_setzero_si256();
  for (int64_t begin = 0; begin < k; begin += steps * 32) {
    const int64_t end = begin + steps * 32 < k ? begin + steps * 32 : k;
    __m256i part[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) part[m][n] = _mm256_setzero_si256();
    for (int64_t i = begin; i < end; i += 32) {
      __m256i a[M], magnitude[M];
      for (int m = 0; m < M; ++m) {
        a[m] = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + m * xs + i));
        magnitude[m] = _mm256_abs_epi8(a[m]);
      }
      for (int n = 0; n < N; ++n) {
        const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(z + n * zs + i));
        for (int m = 0; m < M; ++m)
          part[m][n] = _mm256_add_epi16(part[m][n], _mm256_maddubs_epi16(magnitude[m], _mm256_sign_epi8(b, a[m])));
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = _mm256_add_epi32(total[m][n], _mm256_madd_epi16(part[m][n], ones));
  }
  for (int m = 0; m < M; ++m) store_sums<N>(total[m], sums + m * stride);
}

template <int M, int N>
__attribute__((always_inline)) inline void tile_int8(const int8_t* x, int64_t xs, const int8_t* z, int64_t zs, int64_t k,
                                                     int64_t, int32_t* sums, int64_t stride) {
  __m256i total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 16) {
    __m256i a[M];
    for (int m = 0; m < M; ++m) a[m] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(x + m * xs + i)));
    for (int n = 0; n < N; ++n) {
      const __m256i b = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(z + n * zs + i)));
      for (int m = 0; m < M; ++m) total[m][n] = _mm256_add_epi32(total[m][n], _mm256_madd_epi16(a[m], b));
    }
  }
  for (int m = 0; m < M; ++m) store_sums<N>(total[m], sums + m * stride);
}

#define SB_TILES(tile)                                                                            \
  for (int64_t m = 0; m < m_count; m += kRows) {                                                  \
    const int8_t* xr = x + m * xs;                                                                \
    for (int64_t n = 0; n < n_count; n += kColumns) {                                             \
      const int8_t* zr = z + n * zs;                                                              \
      int32_t* out = sums + m * stride + n;                                                       \
      const int64_t left = n_count - n;                                                           \
      if (m + 1 < m_count && left >= kColumns) {                                                  \
        tile<kRows, kColumns>(xr, xs, zr, zs, k, steps, out, stride);                             \
      } else if (left >= kColumns) {                                                              \
        tile<1, kColumns>(xr, xs, zr, zs, k, steps, out, stride);                                 \
      } else {                                                                                    \
        for (int64_t r = 0; r < kRows && m + r < m_count; ++r)                                    \
          for (int64_t c = 0; c < left; ++c)                                                      \
            tile<1, 1>(xr + r * xs, xs, zr + c * zs, zs, k, steps, out + r * stride + c, stride); \
      }                                                                                           \
    }                                                                                             \
  }

}  // namespace

void dot_narrow(const int8_t* x, int64_t xs, int64_t m_count, const int8_t* z, int64_t zs, int64_t n_count, int64_t k,
                int magnitude, int32_t* sums, int64_t stride) noexcept {
  const int64_t steps = 32767 / (2 * magnitude * magnitude);  // additions that int16 holds
  SB_TILES(tile_narrow)
}

void dot_int8(const int8_t* x, int64_t xs, int64_t m_count, const int8_t* z, int64_t zs, int64_t n_count, int64_t k, int,
              int32_t* sums, int64_t stride) noexcept {
  const int64_t steps = 0;
  SB_TILES(tile_int8)
}

}  // namespace subbyte::quantized_matmul_x86::avx2
