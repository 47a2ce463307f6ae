// quantize for AVX-512; x86_quantize_rows.h holds the algorithm and x86_avx2.cc says what limits it.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/quantize/kernels.h"
#include "subbyte/ops/quantize/x86_quantize_rows.h"

namespace subbyte::avx512 {

int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  return find_bad_row_with<Vector>(p, row_begin, row_end);
}

bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  return choose_rows_with<Vector>(p, row_begin, row_end);
}

void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  encode_rows_with<Vector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx512
