// packed_update for AVX2; x86_update_rows.h holds the algorithm. Bound by arithmetic: 8 weights of adamw take about 110
// instructions with 8-bit moments and 75 with bfloat16 ones, of which a root and a division alone keep the divider 9 cycles,
// and llvm-mca (znver3) gives the two passes 30 cycles for 8 weights with 8-bit moments, its multiplication and shift ports
// full. docs/performance.md has what that comes to.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/x86_update_rows.h"

namespace subbyte::avx2 {
namespace {

struct UpdateVector : Vector {
  using M = __m256;
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F of_bits(I a) { return _mm256_castsi256_ps(a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fused_sub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static F pick(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static I pick_int(M m, I a, I b) { return _mm256_blendv_epi8(b, a, bits(m)); }
  static F with_sign_of(F magnitude, F sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(sign, set(-0.0f))); }

  static I int_set(uint32_t v) { return _mm256_set1_epi32(int32_t(v)); }
  static I int_add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I int_sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I int_mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I int_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I int_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I int_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I int_min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I int_max(I a, I b) { return _mm256_max_epi32(a, b); }
  template <int kBits>
  static I left(I a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I right(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static I left_by(I a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static I right_by(I a, int count) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(count)); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static I load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void store_words(uint32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(p), a); }

  // kLanes neighbouring columns.
  static I columns() { return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), int_set(kColumnStep)); }
  static I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static void store_vector_bytes(uint8_t* p, I v) {
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
  }
  static void unpack(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) {
    unpack_stream(stream, count, bits, codes);
  }

  // 4-bit streams, `count` codes, a multiple of 32.
  static void spread_nibbles(const uint8_t* stream, int64_t count, uint8_t* codes) {
    for (int64_t j = 0; j < count; j += 32) {
      const I x = load_16_bytes(stream + j / 2);
      _mm256_storeu_si256(reinterpret_cast<I*>(codes + j),
                          _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0f)));
    }
  }
  static void gather_nibbles(const uint8_t* codes, int64_t count, uint8_t* stream) {
    for (int64_t j = 0; j < count; j += 32) {
      const I pairs =
          _mm256_maddubs_epi16(_mm256_loadu_si256(reinterpret_cast<const I*>(codes + j)), _mm256_set1_epi16(0x1001));
      const I bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(stream + j / 2), _mm256_castsi256_si128(bytes));
    }
  }

  // Pairs of vectors for 16 columns. Interleaving 16-bit elements works in halves of 128 bits: the first has columns 0-3 and
  // 8-11, the second 4-7 and 12-15. Narrowing puts them back in order.
  template <DType T>
  static void load_pair(const void* p, int64_t i, F (&out)[2]) {
    if constexpr (T == DType::kBF16) {
      const I x = _mm256_loadu_si256(reinterpret_cast<const I*>(static_cast<const uint16_t*>(p) + i));
      out[0] = of_bits(_mm256_unpacklo_epi16(zero(), x));
      out[1] = of_bits(_mm256_unpackhi_epi16(zero(), x));
    } else {
      const F low = load<T>(p, i), high = load<T>(p, i + 8);
      out[0] = _mm256_permute2f128_ps(low, high, 0x20);
      out[1] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }
  // The largest magnitude so far in `size`, as bits.
  template <DType T>
  static void track_pair(const void* p, int64_t i, I& size) {
    if constexpr (T == DType::kBF16) {
      const I x = _mm256_loadu_si256(reinterpret_cast<const I*>(static_cast<const uint16_t*>(p) + i));
      size = _mm256_max_epi16(size, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
    } else {
      for (int half = 0; half < 16; half += 8) size = int_max(size, int_and(bits(load<T>(p, i + half)), int_set(0x7fffffffu)));
    }
  }
  template <DType T>
  static bool tracked_below(I size, float limit) {
    const uint32_t at = std::bit_cast<uint32_t>(limit);
    if constexpr (T == DType::kBF16) return !any(_mm256_cmpgt_epi16(size, _mm256_set1_epi16(int16_t((at >> 16) - 1u))));
    else return !any(_mm256_cmpgt_epi32(size, int_set(at - 1u)));
  }
  static I load_16_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // 16 bytes, each as byte number kAt of its lane.
  template <int kAt>
  static void spread_16_bytes(const uint8_t* p, I (&out)[2]) {
    const I x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const auto lane = [](int byte) {
      return int((~uint64_t(0) << 8 | uint64_t(byte)) << 8 * kAt | ((uint64_t(1) << 8 * kAt) - 1));
    };
    for (int i = 0; i < 2; ++i)
      out[i] = _mm256_shuffle_epi8(x, _mm256_setr_epi32(lane(4 * i), lane(4 * i + 1), lane(4 * i + 2), lane(4 * i + 3),
                                                        lane(4 * i + 8), lane(4 * i + 9), lane(4 * i + 10), lane(4 * i + 11)));
  }
  static void load_pair_bytes(const uint8_t* p, I (&out)[2]) { spread_16_bytes<0>(p, out); }
  // Codes of kBits bits, one a byte, as the upper bits of their lanes.
  template <int kBits>
  static void load_pair_upper(const uint8_t* p, I (&out)[2]) {
    spread_16_bytes<3>(p, out);
    if constexpr (kBits < 8)
      for (I& v : out) v = left<8 - kBits>(v);
  }

  // Two pairs, 32 columns.
  static constexpr int kParts = 4;
  static I quad_columns(int part) {
    const I first = _mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11);
    return _mm256_mullo_epi32(_mm256_add_epi32(first, _mm256_set1_epi32(part / 2 * 16 + part % 2 * 4)), int_set(kColumnStep));
  }
  static void store_floats(float* p, const F (&in)[kParts]) {
    for (int pair = 0; pair < 2; ++pair) {
      _mm256_storeu_ps(p + 16 * pair, _mm256_permute2f128_ps(in[2 * pair], in[2 * pair + 1], 0x20));
      _mm256_storeu_ps(p + 16 * pair + 8, _mm256_permute2f128_ps(in[2 * pair], in[2 * pair + 1], 0x31));
    }
  }
  // A pair as 16-bit elements in the order of columns; from int32 by signed saturation.
  using Pair = I;
  static Pair narrow(I a, I b) { return _mm256_packs_epi32(a, b); }
  static Pair upper_halves(I a, I b) { return _mm256_packus_epi32(right<16>(a), right<16>(b)); }
  template <class Code>
  static Pair codes_of(I noisy_a, I noisy_b) {
    return _mm256_and_si256(_mm256_packus_epi32(right<Code::kShift>(noisy_a), right<Code::kShift>(noisy_b)),
                            _mm256_set1_epi16(int16_t(Code::kMask)));
  }
  // Saturation keeps signs.
  static Pair signs_of(F a, F b) { return narrow(bits(a), bits(b)); }
  static void store_halves(uint16_t* p, const Pair (&in)[2]) {
    for (int pair = 0; pair < 2; ++pair) _mm256_storeu_si256(reinterpret_cast<I*>(p + 16 * pair), in[pair]);
  }
  static void store_32_bytes(uint8_t* p, I bytes) {
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_permute4x64_epi64(bytes, 0xd8));
  }
  // What lies outside 0 .. top becomes 0 or top.
  static void store_codes(uint8_t* p, const Pair (&in)[2], uint8_t top) {
    store_32_bytes(p, _mm256_min_epu8(_mm256_packus_epi16(in[0], in[1]), _mm256_set1_epi8(char(top))));
  }
  template <class Code>
  static void store_signed_codes(uint8_t* p, const Pair (&magnitudes)[2], const Pair (&signs)[2]) {
    I upper = _mm256_and_si256(_mm256_packs_epi16(signs[0], signs[1]), _mm256_set1_epi8(char(0x80)));
    if constexpr (Code::kBits == 4) upper = _mm256_srli_epi16(upper, 4);
    store_32_bytes(p, _mm256_or_si256(_mm256_packus_epi16(magnitudes[0], magnitudes[1]), upper));
  }
};

}  // namespace

void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept {
  update_rows_with<UpdateVector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx2
