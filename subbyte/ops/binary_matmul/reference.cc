// The definition of binary_matmul.
#include <cmath>
#include <limits>

#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/binary_matmul.h"

namespace subbyte::reference {

void binary_matmul(const BinaryMatmulParams& p) noexcept {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.m; ++m)
      for (int64_t n = 0; n < p.n; ++n) {
        int64_t sum = 0;
        bool nan = false;
        for (int64_t k = 0; k < p.k; ++k) {
          const double x = load_double(p.x, p.dtype, b * p.x_batch_stride + m * p.x_stride + k);
          double z;
          if (p.z_bits != nullptr) z = get_code(p.z_bits + n * stream_bytes(p.k, 1), k, 1) != 0 ? 1.0 : -1.0;
          else z = load_double(p.z, p.dtype, b * p.z_batch_stride + n * p.z_stride + k);
          nan = nan || std::isnan(x) || std::isnan(z);
          sum += (x >= 0) == (z >= 0) ? 1 : -1;
        }
        const int64_t at = b * p.y_batch_stride + m * p.y_stride + n;
        if (nan) store_double(p.y, p.dtype, at, std::numeric_limits<double>::quiet_NaN());
        else if (p.dtype == DType::kF64) store_double(p.y, p.dtype, at, double(sum) * double(p.scale));
        else store_float(p.y, p.dtype, at, float(sum) * p.scale);
      }
}

}  // namespace subbyte::reference
