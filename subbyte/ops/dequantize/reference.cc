// The definition of dequantize.
#include "subbyte/ops/dequantize/dequantize.h"

namespace subbyte::reference {

void dequantize_rows(const DequantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t n = row_begin; n < row_end; ++n)
    for (int64_t k = 0; k < p.w.k; ++k) {
      const int64_t column = p.w.perm != nullptr ? p.w.perm[k] : k;
      store_float(p.out, p.out_dtype, n * p.out_stride + column, packed_value(p.w, n, k));
    }
}

}  // namespace subbyte::reference
