// Idea: vpopcntq counts 512 bits an instruction, so xor + count + add is all there is; a tile of 4 x 4 rows keeps the loads at
// half an instruction a product. Bound by the one vpopcntq a cycle.
#include <immintrin.h>

#include <cstdint>

namespace subbyte::binary_matmul_x86::avx512_vnni {
namespace {

template <int M, int N>
__attribute__((always_inline)) inline void tile(const uint8_t* x, const uint8_t* z, int64_t row_bytes, int32_t* counts,
                                                int64_t stride) {
  __m512i total[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) total[m][n] = _mm512_setzero_si512();
  for (int64_t i = 0; i < row_bytes; i += 64) {
    __m512i a[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) a[m] = _mm512_load_si512(x + m * row_bytes + i);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512i b = _mm512_load_si512(z + n * row_bytes + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][n] = _mm512_add_epi64(total[m][n], _mm512_popcnt_epi64(_mm512_xor_si512(a[m], b)));
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) counts[m * stride + n] = int32_t(_mm512_reduce_add_epi64(total[m][n]));
}

}  // namespace

void count_xor(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes, int32_t* counts,
               int64_t stride) noexcept {
  for (int64_t m = 0; m < m_count; m += 4)
    for (int64_t n = 0; n < n_count; n += 4) {
      const uint8_t* xr = x + m * row_bytes;
      const uint8_t* zr = z + n * row_bytes;
      int32_t* out = counts + m * stride + n;
      if (m + 4 <= m_count && n + 4 <= n_count) {
        tile<4, 4>(xr, zr, row_bytes, out, stride);
      } else {
        for (int64_t r = 0; r < 4 && m + r < m_count; ++r)
          for (int64_t c = 0; c < 4 && n + c < n_count; ++c)
            tile<1, 1>(xr + r * row_bytes, zr + c * row_bytes, row_bytes, out + r * stride + c, stride);
      }
    }
}

}  // namespace subbyte::binary_matmul_x86::avx512_vnni
