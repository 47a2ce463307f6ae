// As x86_avx2_peaks.cc with vpdpbusd. Twelve accumulators: g++ 12 copies registers in such loops from 16 on.
#include <immintrin.h>

#include "subbyte/cli/peaks.h"

namespace subbyte::cli {

void dot_rounds_avx512_vnni(int64_t iterations, float* sink) noexcept {
  __m512i a[12];
  for (int i = 0; i < 12; ++i) a[i] = _mm512_set1_epi32(i);
  __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(-5);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm512_dpbusd_epi32(a[i], x, y);
    __asm__ volatile("" : "+v"(x), "+v"(y));
  }
  __m512i sum = a[0];
  for (int i = 1; i < 12; ++i) sum = _mm512_add_epi32(sum, a[i]);
  *sink = float(_mm512_cvtsi512_si32(sum));
}

}  // namespace subbyte::cli
