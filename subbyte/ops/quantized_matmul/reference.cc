// The definition of quantized_matmul.
#include <cmath>

#include "subbyte/formats/bits.h"
#include "subbyte/ops/quantized_matmul/quantized_matmul.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte::reference {

void quantized_matmul(const QuantizedMatmulParams& p) noexcept {
  const float sx = std::fmax(*p.x_step, p.eps), sz = std::fmax(*p.z_step, p.eps);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.m; ++m)
      for (int64_t n = 0; n < p.n; ++n) {
        int64_t sum = 0;
        bool nan = false;
        for (int64_t k = 0; k < p.k; ++k) {
          const float x = load_float(p.x, p.dtype, b * p.x_batch_stride + m * p.x_stride + k);
          nan = nan || std::isnan(x);
          int zq = 0;
          if (p.z_codes != nullptr) {
            zq = int(get_code(p.z_codes + n * stream_bytes(p.k, p.bits), k, p.bits)) - (1 << (p.bits - 1));
          } else {
            const float z = load_float(p.z, p.z_dtype, b * p.z_batch_stride + n * p.z_stride + k);
            nan = nan || std::isnan(z);
            zq = step_code(z, sz, p.bits);
          }
          sum += int64_t(step_code(x, sx, p.bits)) * zq;
        }
        store_scaled(p, b * p.y_batch_stride + m * p.y_stride + n, n, int32_t(sum), sx, sz, nan);
      }
}

}  // namespace subbyte::reference
