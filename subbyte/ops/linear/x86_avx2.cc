// The float kernels of linear for AVX2 with FMA and F16C; what they do and what limits them stands in x86_kernels.h.
#include "subbyte/ops/linear/x86_kernels.h"

namespace subbyte {

void linear_f32_rows_avx2_prepare(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept {
  prepare_rows(w, in, m_begin, m_end);
}
void linear_f32_rows_avx2_multiply(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin,
                                   int64_t n_end) noexcept {
  kRowsRange[int(w.format)](w, in, out, n_begin, n_end);
}
void linear_f32_tile6x16_avx2_prepare(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept {
  prepare_tiles(w, in, m_begin, m_end);
}
void linear_f32_tile6x16_avx2_multiply(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin,
                                       int64_t n_end) noexcept {
  multiply_tiles_range(w, in, out, n_begin, n_end);
}

}  // namespace subbyte
