// linear_a8 with AVX512_VNNI: vpdpbusd takes codes of any width as they are (unsigned) and x (signed) straight into int32.
// rowdot is bound by memory at 8, 4 and 2 bits and by instructions at 1 bit (shift, mask, product for 64 codes); panel by the
// product, two an instruction cycle where the machine has two 512-bit ports. The tile, 4 rows of x by 48 rows of weight, has 12
// sums: enough to hide the latency of 5 cycles, few enough that no compiler moves or spills them.
// Measured on one core of Sapphire Rapids, N = K = 4096, cold weights, one row of x, share of a plain read of the same bytes,
// groups of 128 and a scale per row: 8 bits 1.17 and 1.12, 4 bits 0.98 and 0.80, 2 bits 0.72 and 0.74, 1 bit 0.37 and 0.35; two
// threads 1.1, 0.94, 0.70, 0.42. panel 190 to 220 Gop/s with 64 rows, 200 to 330 with 512; PyTorch's float32 linear 101 and
// 138.
#include <immintrin.h>

#include <bit>

#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte::linear_a8_x86::avx512_vnni {
namespace {

#include "subbyte/ops/linear_a8/x86_avx512_vectors.h"

struct V : Vectors512 {
  static constexpr bool kVnni = true, kCentersBytes = false;
  // Written as assembly because g++ 12 copies the accumulator of the intrinsic in loops with many of them.
  SB_INLINE void dot(I& acc, I codes, I x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x)); }
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

}  // namespace subbyte::linear_a8_x86::avx512_vnni
