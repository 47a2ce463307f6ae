// As x86_avx2_peaks.cc with 512-bit registers.
#include <immintrin.h>

#include "subbyte/cli/peaks.h"

namespace subbyte::cli {

void fma_rounds_avx512(int64_t iterations, float* sink) noexcept {
  __m512 a[12];
  for (int i = 0; i < 12; ++i) a[i] = _mm512_set1_ps(float(i));
  __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(0.001f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm512_fmadd_ps(a[i], x, y);
    __asm__ volatile("" : "+v"(x), "+v"(y));
  }
  __m512 sum = a[0];
  for (int i = 1; i < 12; ++i) sum = _mm512_add_ps(sum, a[i]);
  *sink = _mm512_cvtss_f32(sum);
}

}  // namespace subbyte::cli
