// Idea: vpopcntq counts 512 bits an instruction, so xor + count + add is all there is; a tile of 4 x 4 rows keeps the loads at
// half an instruction a product. Bound by the one vpopcntq a cycle.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "subbyte/base/dtype.h"

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

int64_t pack_f32(const float* v, int64_t k, uint8_t* out, bool& nan) {
  unsigned none = 0;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m512 a = _mm512_loadu_ps(v + i);
    none |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const uint16_t bits = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GE_OQ);
    std::memcpy(out + i / 8, &bits, 2);
  }
  nan = nan || none != 0;
  return i;
}

// On the bit patterns: +1 unless the sign is set on something other than zero; NaN lies beyond infinity.
int64_t pack_f16(const uint16_t* v, int infinity, int64_t k, uint8_t* out, bool& nan) {
  const __m512i low = _mm512_set1_epi16(0x7fff), top = _mm512_set1_epi16(int16_t(infinity));
  uint32_t none = 0;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m512i a = _mm512_loadu_si512(v + i), magnitude = _mm512_and_si512(a, low);
    const uint32_t beyond = _mm512_cmpgt_epi16_mask(magnitude, top);
    const uint32_t minus = _mm512_movepi16_mask(a) & _mm512_test_epi16_mask(magnitude, magnitude), bits = ~(minus | beyond);
    none |= beyond;
    std::memcpy(out + i / 8, &bits, 4);
  }
  nan = nan || none != 0;
  return i;
}

}  // namespace

int64_t pack_signs(const void* v, DType dtype, int64_t k, uint8_t* out, bool& nan) noexcept {
  if (dtype == DType::kF32) return pack_f32(static_cast<const float*>(v), k, out, nan);
  if (dtype == DType::kBF16) return pack_f16(static_cast<const uint16_t*>(v), 0x7f80, k, out, nan);
  if (dtype == DType::kF16) return pack_f16(static_cast<const uint16_t*>(v), 0x7c00, k, out, nan);
  return 0;
}

void count_xor(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes, int64_t /*used_bytes*/,
               int32_t* counts, int64_t stride) noexcept {
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
