// Idea: vpdpbusd takes one unsigned operand, so x enters as x + 128 (one xor) and 128 * sum(z) leaves at the end; that sum is
// one more dot product, with a vector of ones. Tiles of 4 x 4 dot products: 8 loads for 16 products and 4 sums. All modulo
// 2^32, exact.
#include <immintrin.h>

#include <cstdint>

namespace subbyte::quantized_matmul_x86::avx512_vnni {
namespace {

template <int M, int N>
__attribute__((always_inline)) inline void tile(const int8_t* x, int64_t xs, const int8_t* z, int64_t zs, int64_t k,
                                                int32_t* sums, int64_t stride) {
  const __m512i flip = _mm512_set1_epi8(char(0x80)), ones = _mm512_set1_epi8(1);
  __m512i total[M][N], column[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    column[n] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[m][n] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < k; i += 64) {
    __m512i a[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) a[m] = _mm512_xor_si512(_mm512_load_si512(x + m * xs + i), flip);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const __m512i b = _mm512_load_si512(z + n * zs + i);
      column[n] = _mm512_dpbusd_epi32(column[n], ones, b);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m][n] = _mm512_dpbusd_epi32(total[m][n], a[m], b);
    }
  }
  for (int n = 0; n < N; ++n) {
    const uint32_t bias = uint32_t(_mm512_reduce_add_epi32(column[n])) << 7;
    for (int m = 0; m < M; ++m) sums[m * stride + n] = int32_t(uint32_t(_mm512_reduce_add_epi32(total[m][n])) - bias);
  }
}

}  // namespace

void dot_int8(const int8_t* x, int64_t xs, int64_t m_count, const int8_t* z, int64_t zs, int64_t n_count, int64_t k, int,
              int32_t* sums, int64_t stride) noexcept {
  for (int64_t m = 0; m < m_count; m += 4)
    for (int64_t n = 0; n < n_count; n += 4) {
      const int8_t* xr = x + m * xs;
      const int8_t* zr = z + n * zs;
      int32_t* out = sums + m * stride + n;
      if (m + 4 <= m_count && n + 4 <= n_count) {
        tile<4, 4>(xr, xs, zr, zs, k, out, stride);
      } else if (n + 4 <= n_count) {
        for (int64_t r = 0; m + r < m_count; ++r) tile<1, 4>(xr + r * xs, xs, zr, zs, k, out + r * stride, stride);
      } else {
        for (int64_t r = 0; r < 4 && m + r < m_count; ++r)
          for (int64_t c = 0; n + c < n_count; ++c)
            tile<1, 1>(xr + r * xs, xs, zr + c * zs, zs, k, out + r * stride + c, stride);
      }
    }
}

}  // namespace subbyte::quantized_matmul_x86::avx512_vnni
