// packed_update for AVX2; x86_update_rows.h holds the algorithm. Bound by arithmetic: 8 weights of adamw with 8-bit moments
// take about 200 instructions, a fifth of them Philox. Measured on Zen 3, one thread, bfloat16 gradients, 4-bit codes: adamw
// with 8-bit moments 0.22 G weights/s (a tenth of the memory's rate, a quarter of torch's fused bfloat16 AdamW on dense
// weights), with bfloat16 moments 0.28 to 0.33, sgd 0.42. One random word serves code and both moments; a word each would add a
// third. Copies by memcpy of run-time length became `rep movs`: with float32 moments 40 % of the time.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/x86_update_rows.h"

namespace subbyte::avx2 {
namespace {

struct UpdateVector : Vector {
  using M = __m256;
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  // Within 2^-11 of the root of a >= 1/4.
  static F rough_sqrt(F a) { return mul(a, _mm256_rsqrt_ps(a)); }
  static F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static F pick(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static F with_sign_of(F magnitude, F sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(sign, set(-0.0f))); }
  static F load_codes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void unpack(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
    unpack_stream(stream, count, bits, codes);
  }
  static I mixed(const uint32_t* words, uint32_t mix) {
    return _mm256_mullo_epi32(_mm256_loadu_si256(reinterpret_cast<const I*>(words)), _mm256_set1_epi32(int32_t(mix)));
  }
  static F mixed_uniform(const uint32_t* words, uint32_t mix) {
    return mul(_mm256_cvtepi32_ps(_mm256_srli_epi32(mixed(words, mix), 8)), set(0x1p-24f));
  }
  static void store_stochastic_bf16(uint16_t* out, F v, const uint32_t* words, uint32_t mix) {
    const I bits = _mm256_add_epi32(_mm256_castps_si256(v), _mm256_srli_epi32(mixed(words, mix), 16));
    const I high = _mm256_srli_epi32(bits, 16), packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
};

}  // namespace

void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept {
  update_rows_with<UpdateVector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx2
