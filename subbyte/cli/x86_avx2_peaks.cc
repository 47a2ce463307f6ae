// Twelve independent accumulators hide the latency of the multiply-add (4 to 5 cycles, 2 a cycle) within 16 registers. Bound by
// the arithmetic units alone: no memory is read.
#include <immintrin.h>

#include "subbyte/cli/peaks.h"

namespace subbyte::cli {

void fma_rounds_avx2(int64_t iterations, float* sink) noexcept {
  __m256 a[12];
  for (int i = 0; i < 12; ++i) a[i] = _mm256_set1_ps(float(i));
  __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(0.001f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm256_fmadd_ps(a[i], x, y);
    __asm__ volatile("" : "+x"(x), "+x"(y));
  }
  __m256 sum = a[0];
  for (int i = 1; i < 12; ++i) sum = _mm256_add_ps(sum, a[i]);
  *sink = _mm256_cvtss_f32(sum);
}

void dot_rounds_avx2(int64_t iterations, float* sink) noexcept {
  __m256i a[12];
  for (int i = 0; i < 12; ++i) a[i] = _mm256_set1_epi32(i);
  __m256i x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(-5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
      __asm__ volatile("" : "+x"(x));  // each product is computed
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), ones));
    }
  }
  __m256i sum = a[0];
  for (int i = 1; i < 12; ++i) sum = _mm256_add_epi32(sum, a[i]);
  *sink = float(_mm256_cvtsi256_si32(sum));
}

}  // namespace subbyte::cli
