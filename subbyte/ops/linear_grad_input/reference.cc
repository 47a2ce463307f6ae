// The definition of linear_grad_input.
#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

namespace subbyte::reference {

void linear_grad_input_columns(const LinearGradInputParams& p, int64_t k_begin, int64_t k_end) noexcept {
  for (int64_t k = k_begin; k < k_end; ++k) {
    const int64_t column = p.w.perm != nullptr ? p.w.perm[k] : k;
    for (int64_t m = 0; m < p.m; ++m) {
      double sum = 0;
      for (int64_t n = 0; n < p.w.n; ++n)
        sum += load_double(p.gy, p.dtype, m * p.gy_stride + n) * double(packed_value(p.w, n, k));
      store_double(p.gx, p.dtype, m * p.gx_stride + column, sum);
    }
  }
}

}  // namespace subbyte::reference
