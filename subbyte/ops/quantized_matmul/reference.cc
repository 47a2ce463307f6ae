// The definition of quantized_matmul.
#include <cmath>
#include <limits>

#include "subbyte/ops/quantized_matmul/quantized_matmul.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte::reference {

void quantized_matmul(const QuantizedMatmulParams& p) noexcept {
  const float sx = std::fmax(p.x_step, p.eps), sz = std::fmax(p.z_step, p.eps);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.m; ++m)
      for (int64_t n = 0; n < p.n; ++n) {
        int64_t sum = 0;
        bool nan = false;
        for (int64_t k = 0; k < p.k; ++k) {
          const float x = load_float(p.x, p.dtype, b * p.x_batch_stride + m * p.x_stride + k);
          const float z = load_float(p.z, p.dtype, b * p.z_batch_stride + n * p.z_stride + k);
          nan = nan || std::isnan(x) || std::isnan(z);
          sum += int64_t(step_code(x, sx, p.bits)) * step_code(z, sz, p.bits);
        }
        const int64_t at = b * p.y_batch_stride + m * p.y_stride + n;
        if (nan) store_double(p.y, p.dtype, at, std::numeric_limits<double>::quiet_NaN());
        else if (p.dtype == DType::kF64) store_double(p.y, p.dtype, at, double(sum) * double(sx) * double(sz));
        else store_float(p.y, p.dtype, at, float(sum) * sx * sz);
      }
}

}  // namespace subbyte::reference
