// packed_update for AVX-512; x86_update_rows.h holds the algorithm and x86_avx2.cc says what limits it.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/x86_update_rows.h"

namespace subbyte::avx512 {
namespace {

struct UpdateVector : Vector {
  using M = __mmask16;
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F of_bits(I a) { return _mm512_castsi512_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fused_sub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F abs(F a) { return _mm512_andnot_ps(set(-0.0f), a); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static F pick(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static I pick_int(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
  static F with_sign_of(F magnitude, F sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(sign, set(-0.0f))); }

  static I int_set(uint32_t v) { return _mm512_set1_epi32(int32_t(v)); }
  static I int_add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I int_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I int_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I int_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I int_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I int_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I int_min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I int_max(I a, I b) { return _mm512_max_epi32(a, b); }
  template <int kBits>
  static I left(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I right(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static I left_by(I a, int count) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static I right_by(I a, int count) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(count)); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static I load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }

  // kLanes neighbouring columns.
  static I columns() {
    return _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), int_set(kColumnStep));
  }
  static I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_vector_bytes(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void unpack(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
    unpack_stream(stream, count, bits, codes);
  }

  // 4-bit streams.
  static void spread_nibbles(const uint8_t* stream, int64_t count, uint8_t* codes) { unpack_stream(stream, count, 4, codes); }
  static void gather_nibbles(const uint8_t* codes, int64_t count, uint8_t* stream) { pack_stream(codes, count, 4, stream); }

  // Pairs of vectors for 32 columns, in their order.
  template <DType T>
  static void load_pair(const void* p, int64_t i, F (&out)[2]) {
    for (int part = 0; part < 2; ++part) out[part] = load<T>(p, i + part * kLanes);
  }
  // The largest magnitude so far in `size`, as bits.
  template <DType T>
  static void track_pair(const void* p, int64_t i, I& size) {
    if constexpr (T == DType::kBF16) {
      const I x = _mm512_loadu_si512(static_cast<const uint16_t*>(p) + i);
      size = _mm512_max_epi16(size, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
    } else {
      for (int half = 0; half < 2 * kLanes; half += kLanes)
        size = int_max(size, int_and(bits(load<T>(p, i + half)), int_set(0x7fffffffu)));
    }
  }
  template <DType T>
  static bool tracked_below(I size, float limit) {
    const uint32_t at = std::bit_cast<uint32_t>(limit);
    if constexpr (T == DType::kBF16) return _mm512_cmpgt_epi16_mask(size, _mm512_set1_epi16(int16_t((at >> 16) - 1u))) == 0;
    else return _mm512_cmpgt_epi32_mask(size, int_set(at - 1u)) == 0;
  }
  static void load_pair_bytes(const uint8_t* p, I (&out)[2]) {
    for (int part = 0; part < 2; ++part) out[part] = load_bytes(p + part * kLanes);
  }
  // Codes of kBits bits, one a byte, as the upper bits of their lanes.
  template <int kBits>
  static void load_pair_upper(const uint8_t* p, I (&out)[2]) {
    for (int part = 0; part < 2; ++part) out[part] = left<32 - kBits>(load_bytes(p + part * kLanes));
  }

  // A pair again.
  static constexpr int kParts = 2;
  static I quad_columns(int part) { return int_add(columns(), int_set(uint32_t(part * kLanes) * kColumnStep)); }
  static void store_floats(float* p, const F (&in)[kParts]) {
    for (int part = 0; part < kParts; ++part) _mm512_storeu_ps(p + part * kLanes, in[part]);
  }
  struct Pair {
    I a, b;
  };
  static Pair narrow(I a, I b) { return {a, b}; }
  static Pair upper_halves(I a, I b) { return {right<16>(a), right<16>(b)}; }
  template <class Code>
  static Pair codes_of(I noisy_a, I noisy_b) {
    return {int_and(right<Code::kShift>(noisy_a), int_set(Code::kMask)),
            int_and(right<Code::kShift>(noisy_b), int_set(Code::kMask))};
  }
  static Pair signs_of(F a, F b) { return {bits(a), bits(b)}; }
  static void store_halves(uint16_t* p, const Pair (&in)[2]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(in[0].a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_cvtepi32_epi16(in[0].b));
  }
  // What lies outside 0 .. top becomes 0 or top.
  static void store_codes(uint8_t* p, const Pair (&in)[2], uint8_t top) {
    store_vector_bytes(p, int_min(int_max(in[0].a, int_set(0)), int_set(top)));
    store_vector_bytes(p + kLanes, int_min(int_max(in[0].b, int_set(0)), int_set(top)));
  }
  template <class Code>
  static I with_sign(I magnitude, I sign) {  // magnitude | (sign bit as the code's)
    return _mm512_ternarylogic_epi32(magnitude, right<31 - Code::kMagnitudeBits>(sign), int_set(Code::kMask + 1u), 0xf8);
  }
  template <class Code>
  static void store_signed_codes(uint8_t* p, const Pair (&magnitudes)[2], const Pair (&signs)[2]) {
    store_vector_bytes(p, with_sign<Code>(magnitudes[0].a, signs[0].a));
    store_vector_bytes(p + kLanes, with_sign<Code>(magnitudes[0].b, signs[0].b));
  }
};

}  // namespace

void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept {
  update_rows_with<UpdateVector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx512
