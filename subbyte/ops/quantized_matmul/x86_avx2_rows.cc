// Idea: eight values a step through the codec kernels' loads, one division, one rounding, and two saturating packs; a stream of
// codes through pdep. Division bounds the first (8 lanes in about 5 cycles), so no reciprocal is taken: v * (1 / s) rounds
// otherwise and would break the promise of equal bits. The plain loop calls rintf, fminf and fmaxf in libm.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte::quantized_matmul_x86::avx2 {
namespace {

using subbyte::avx2::Vector;

template <DType kType>
bool quantize_as(const void* v, int64_t begin, int64_t k, float step, int bits, int8_t* out) {
  const __m256 s = _mm256_set1_ps(step), hi = _mm256_set1_ps(float((1 << (bits - 1)) - 1)),
               lo = _mm256_set1_ps(-float(1 << (bits - 1)));
  __m256 not_number = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const __m256 t = _mm256_div_ps(Vector::load<kType>(v, begin + i), s), nan = _mm256_cmp_ps(t, t, _CMP_UNORD_Q);
    not_number = _mm256_or_ps(not_number, nan);
    const __m256 q = _mm256_min_ps(_mm256_max_ps(Vector::rint(t), lo), hi);
    const __m256i n = _mm256_cvtps_epi32(_mm256_andnot_ps(nan, q));
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_packs_epi16(w, w));
  }
  bool nan = _mm256_movemask_ps(not_number) != 0;
  for (; i < k; ++i) {
    const float t = load_float(v, kType, begin + i);
    nan = nan || t != t;
    out[i] = int8_t(step_code(t, step, bits));
  }
  return nan;
}

}  // namespace

bool quantize_row(const void* v, DType dtype, int64_t begin, int64_t k, float step, int bits, int8_t* out) noexcept {
  switch (dtype) {
    case DType::kF32: return quantize_as<DType::kF32>(v, begin, k, step, bits, out);
    case DType::kF16: return quantize_as<DType::kF16>(v, begin, k, step, bits, out);
    case DType::kBF16: return quantize_as<DType::kBF16>(v, begin, k, step, bits, out);
    default: return quantize_as<DType::kF64>(v, begin, k, step, bits, out);
  }
}

void unpack_row(const uint8_t* codes, int64_t k, int bits, int8_t* out) noexcept {
  subbyte::avx2::unpack_stream(codes, k, bits, reinterpret_cast<uint8_t*>(out));
  const __m256i middle = _mm256_set1_epi8(char(1 << (bits - 1)));
  for (int64_t i = 0; i < k; i += 32) {
    __m256i* at = reinterpret_cast<__m256i*>(out + i);
    _mm256_store_si256(at, _mm256_sub_epi8(_mm256_load_si256(at), middle));
  }
}

}  // namespace subbyte::quantized_matmul_x86::avx2
