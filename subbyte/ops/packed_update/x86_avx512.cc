// packed_update for AVX-512; x86_update_rows.h holds the algorithm and x86_avx2.cc says what limits it.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/x86_update_rows.h"

namespace subbyte::avx512 {
namespace {

struct UpdateVector : Vector {
  using M = __mmask16;
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  // Within 2^-11 of the root of a >= 1/4.
  static F rough_sqrt(F a) { return mul(a, _mm512_rsqrt14_ps(a)); }
  static F abs(F a) { return _mm512_andnot_ps(set(-0.0f), a); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static F pick(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static F with_sign_of(F magnitude, F sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(sign, set(-0.0f))); }
  static F load_codes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void unpack(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
    unpack_stream(stream, count, bits, codes);
  }
  static I mixed(const uint32_t* words, uint32_t mix) {
    return _mm512_mullo_epi32(_mm512_loadu_si512(words), _mm512_set1_epi32(int32_t(mix)));
  }
  static F mixed_uniform(const uint32_t* words, uint32_t mix) {
    return mul(_mm512_cvtepi32_ps(_mm512_srli_epi32(mixed(words, mix), 8)), set(0x1p-24f));
  }
  static void store_stochastic_bf16(uint16_t* out, F v, const uint32_t* words, uint32_t mix) {
    const I bits = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_srli_epi32(mixed(words, mix), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
};

}  // namespace

void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept {
  update_rows_with<UpdateVector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx512
