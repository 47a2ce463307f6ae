// linear_a8 with 512-bit vectors and no VNNI (Skylake-X to Cannon Lake): vpmaddubsw and vpmaddwd, as in x86_avx2.cc.
// The tile of panel is 4 rows of x by 48 rows of weight: 12 sums, 3 vectors of codes and a broadcast of 32 registers.
// Measured on one core of Sapphire Rapids as in x86_avx2.cc: 8 bits 1.1, 4 bits 0.9, 2 bits 0.7, 1 bit 0.34 to 0.40 of the
// read; panel with 64 rows of x 208 Gop/s at 4 bits, 91 at 8 (x takes the sign of each code: two more instructions).
#include <immintrin.h>

#include <bit>

#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte::linear_a8_x86::avx512 {
namespace {

#include "subbyte/ops/linear_a8/x86_avx512_vectors.h"

struct V : Vectors512 {
  static constexpr bool kVnni = false, kCentersBytes = true;
  SB_INLINE void dot(I& acc, I codes, I x) { acc = add_i32(acc, widen_pairs(pairs(codes, x))); }  // codes of up to 7 bits
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

}  // namespace subbyte::linear_a8_x86::avx512
