// linear_a8 with 256-bit vectors and no VNNI (Zen 3 and older, Haswell to Coffee Lake): vpmaddubsw and vpmaddwd.
// rowdot takes packed codes apart with a shift and a mask for each stream and never saturates (x86_shapes.h); panel works on a
// tile of 4 rows of x by 16 rows of weight: 8 sums, 2 vectors of codes, one broadcast and one product fill the 16 registers.
// Measured on a shared Zen 3 core, N = K = 4096, cold weights, share of a plain read of the same bytes, groups of 128 and a
// scale per row: 8 bits 1.0 and 0.95, 4 bits 0.95 and 1.08, 2 bits 0.74 and 0.92, 1 bit 0.39 and 0.41 (bound by shift, mask,
// product and sum for each 32 codes). panel, processor time against PyTorch's float32 linear: 3.2 times at 4 bits and 2.2 at 8
// with 64 rows of x, 2.3 and 1.5 with 512. The core was busy with other work, so these are ratios of best calls. Lost: vector
// loads of scales just stored, which stall (613 us instead of 395 at 2 bits).
#include <immintrin.h>

#include <bit>

#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte::linear_a8_x86::avx2 {
namespace {

#define SB_INLINE [[gnu::always_inline]] static inline

SB_INLINE int32_t load_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
SB_INLINE void store_dword(void* p, int32_t v) { __builtin_memcpy(p, &v, 4); }

struct V {
  using I = __m256i;
  using F = __m256;
  static constexpr int kBytes = 32, kLanes = 8, kNr = 2;
  static constexpr int64_t kBlockK = 1024, kBlockM = 256, kPrefetchBytes = 2048;
  static constexpr bool kVnni = false, kCentersBytes = true;

  SB_INLINE I zero() { return _mm256_setzero_si256(); }
  SB_INLINE F zero_f() { return _mm256_setzero_ps(); }
  SB_INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  SB_INLINE void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  SB_INLINE I load_part(const uint8_t* p, int64_t bytes) {
    alignas(32) uint8_t b[32] = {};
    for (int64_t i = 0; i < bytes; ++i) b[i] = p[i];
    return load(b);
  }
  SB_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
  SB_INLINE void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
  SB_INLINE F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  SB_INLINE F load_bf16(const uint16_t* p) {
    const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  }
  SB_INLINE void store_f16(void* p, F v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  SB_INLINE void store_bf16(void* p, F v) {
    const __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40)), nan);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
  }
  SB_INLINE I set1_i8(int v) { return _mm256_set1_epi8(char(v)); }
  SB_INLINE I set1_i32(int32_t v) { return _mm256_set1_epi32(v); }
  SB_INLINE F set1_f(float v) { return _mm256_set1_ps(v); }
  SB_INLINE F first_lane(float v) { return _mm256_insertf128_ps(_mm256_setzero_ps(), _mm_set_ss(v), 0); }
  SB_INLINE I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  SB_INLINE I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  SB_INLINE I shift_right_16(I a, int n) { return _mm256_srli_epi16(a, n); }
  SB_INLINE I abs_i8(I a) { return _mm256_abs_epi8(a); }
  SB_INLINE I apply_sign(I a, I sign) { return _mm256_sign_epi8(a, sign); }
  SB_INLINE I pairs(I unsigned_codes, I x) { return _mm256_maddubs_epi16(unsigned_codes, x); }
  SB_INLINE I widen_pairs(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
  SB_INLINE I add_i16(I a, I b) { return _mm256_add_epi16(a, b); }
  SB_INLINE I add_i32(I a, I b) { return _mm256_add_epi32(a, b); }
  SB_INLINE void dot(I& acc, I codes, I x) { acc = add_i32(acc, widen_pairs(pairs(codes, x))); }  // codes of up to 7 bits
  SB_INLINE I max_i32(I a, I b) { return _mm256_max_epi32(a, b); }
  SB_INLINE I magnitude(F a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
  SB_INLINE I round(F a) { return _mm256_cvtps_epi32(a); }
  SB_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  SB_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  SB_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  SB_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  SB_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  SB_INLINE void store_i8(int8_t* p, I v) {
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
  }
  SB_INLINE float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // Lane l of a block of `groups` groups belongs to group l * groups / 8.
  SB_INLINE I group_of_lane(int groups) {
    const __m256i l = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_srli_epi32(_mm256_mullo_epi32(l, _mm256_set1_epi32(groups)), 3);
  }
  SB_INLINE F pick(F a, I lanes) { return _mm256_permutevar8x32_ps(a, lanes); }

  // 8 rows of 8 dwords -> 8 columns.
  SB_INLINE void transpose(const uint8_t* from, int64_t stride, uint8_t* to, int64_t to_stride) {
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) a[r] = load(from + r * stride);
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {  // a[r + c]: rows r .. r + 3 of columns c and c + 4
      a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      store(to + c * to_stride, _mm256_permute2x128_si256(a[c], a[c + 4], 0x20));
      store(to + (c + 4) * to_stride, _mm256_permute2x128_si256(a[c], a[c + 4], 0x31));
    }
  }
};

#include "subbyte/ops/linear_a8/x86_shapes.h"

}  // namespace

void prepare_rowdot(const LinearA8Job& job, int64_t m_begin, int64_t m_end) noexcept {
  prepare_rowdot_rows(job, m_begin, m_end);
}
void run_rowdot(const LinearA8Job& job, int64_t n_begin, int64_t n_end) noexcept { rowdot(job, n_begin, n_end); }
void prepare_panel(const LinearA8Job& job, int64_t m_begin, int64_t m_end) noexcept { prepare_panel_rows(job, m_begin, m_end); }
void run_panel(const LinearA8Job& job, int64_t n_begin, int64_t n_end) noexcept {
  for (int64_t n = n_begin; n < n_end; n += kStrip) panel_strip(job, n, n_end);
}

}  // namespace subbyte::linear_a8_x86::avx2
