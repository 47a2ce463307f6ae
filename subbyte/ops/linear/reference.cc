// The definition of linear: packed_value in a double sum.
#include "subbyte/ops/linear/linear.h"

namespace subbyte::reference {

void linear_rows(const LinearParams& p, int64_t n_begin, int64_t n_end) noexcept {
  for (int64_t n = n_begin; n < n_end; ++n)
    for (int64_t m = 0; m < p.m; ++m) {
      double sum = p.bias != nullptr ? load_double(p.bias, p.dtype, n) : 0.0;
      for (int64_t k = 0; k < p.w.k; ++k) {
        const int64_t column = p.w.perm != nullptr ? p.w.perm[k] : k;
        sum += load_double(p.x, p.dtype, m * p.x_stride + column) * double(packed_value(p.w, n, k));
      }
      store_double(p.y, p.dtype, m * p.y_stride + n, sum);
    }
}

}  // namespace subbyte::reference
