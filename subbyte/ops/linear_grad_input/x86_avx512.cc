// The float kernels of linear_grad_input for AVX-512 (F, BW, DQ, VL, VBMI); what they do and what limits them stands in
// x86_kernels.h.
#include "subbyte/ops/linear_grad_input/x86_kernels.h"

namespace subbyte {

void linear_grad_input_f32_rows_avx512_prepare(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept {
  prepare_rows(task, m_begin, m_end);
}
void linear_grad_input_f32_rows_avx512_multiply(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept {
  kRowsUnits[int(task.w.format)](task, unit_begin, unit_end);
}
void linear_grad_input_f32_tile14x32_avx512_prepare(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept {
  prepare_tiles(task, m_begin, m_end);
}
void linear_grad_input_f32_tile14x32_avx512_multiply(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept {
  multiply_tiles_units(task, unit_begin, unit_end);
}

}  // namespace subbyte
