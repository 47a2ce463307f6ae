// 512-bit vectors for x86_shapes.h, for the AVX-512 files alone; included inside their namespaces, like x86_shapes.h. `V` of a
// file adds the integer product and the sizes of its blocks.

// g++ 12 takes the deliberately undefined operand of some of its own intrinsics for a mistake of the caller (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define SB_INLINE [[gnu::always_inline]] static inline

SB_INLINE int32_t load_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
SB_INLINE void store_dword(void* p, int32_t v) { __builtin_memcpy(p, &v, 4); }

struct Vectors512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64, kLanes = 16, kNr = 3;
  static constexpr int64_t kBlockK = 512, kBlockM = 256, kPrefetchBytes = 2048;

  SB_INLINE I zero() { return _mm512_setzero_si512(); }
  SB_INLINE F zero_f() { return _mm512_setzero_ps(); }
  SB_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
  SB_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  SB_INLINE I load_part(const uint8_t* p, int64_t bytes) { return _mm512_maskz_loadu_epi8((uint64_t(1) << bytes) - 1, p); }
  SB_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
  SB_INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
  SB_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  SB_INLINE F load_bf16(const uint16_t* p) {
    const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  }
  SB_INLINE void store_f16(void* p, F v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SB_INLINE void store_bf16(void* p, F v) {
    const __m512i u = _mm512_castps_si512(v), even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  SB_INLINE I set1_i8(int v) { return _mm512_set1_epi8(char(v)); }
  SB_INLINE I set1_i32(int32_t v) { return _mm512_set1_epi32(v); }
  SB_INLINE F set1_f(float v) { return _mm512_set1_ps(v); }
  SB_INLINE F first_lane(float v) { return _mm512_maskz_mov_ps(1, _mm512_set1_ps(v)); }
  SB_INLINE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  SB_INLINE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  SB_INLINE I shift_right_16(I a, int n) { return _mm512_srli_epi16(a, unsigned(n)); }
  SB_INLINE I abs_i8(I a) { return _mm512_abs_epi8(a); }
  // a where sign is not negative, else -a; where sign is 0 its partner abs_i8(sign) is 0.
  SB_INLINE I apply_sign(I a, I sign) { return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), a); }
  SB_INLINE I pairs(I unsigned_codes, I x) { return _mm512_maddubs_epi16(unsigned_codes, x); }
  SB_INLINE I widen_pairs(I a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
  SB_INLINE I add_i16(I a, I b) { return _mm512_add_epi16(a, b); }
  SB_INLINE I add_i32(I a, I b) { return _mm512_add_epi32(a, b); }
  SB_INLINE I max_i32(I a, I b) { return _mm512_max_epi32(a, b); }
  SB_INLINE I magnitude(F a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
  SB_INLINE I round(F a) { return _mm512_cvtps_epi32(a); }
  SB_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  SB_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  SB_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  SB_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  SB_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  SB_INLINE void store_i8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  SB_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }
  // Lane l of a block of `groups` groups belongs to group l * groups / 16.
  SB_INLINE I group_of_lane(int groups) {
    const __m512i l = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srli_epi32(_mm512_mullo_epi32(l, _mm512_set1_epi32(groups)), 4);
  }
  SB_INLINE F pick(F a, I lanes) { return _mm512_permutexvar_ps(lanes, a); }

  // 16 rows of 16 dwords -> 16 columns. Every line is read once and whole: rows a power of two apart share a cache set.
  SB_INLINE void transpose(const uint8_t* from, int64_t stride, uint8_t* to, int64_t to_stride) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = load(from + r * stride);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {  // a[r + c]: rows r .. r + 3 of columns c, c + 4, c + 8, c + 12
      a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i p = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), q = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
      const __m512i u = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88), v = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
      store(to + c * to_stride, _mm512_shuffle_i32x4(p, u, 0x88));
      store(to + (c + 8) * to_stride, _mm512_shuffle_i32x4(p, u, 0xdd));
      store(to + (c + 4) * to_stride, _mm512_shuffle_i32x4(q, v, 0x88));
      store(to + (c + 12) * to_stride, _mm512_shuffle_i32x4(q, v, 0xdd));
    }
  }
};
