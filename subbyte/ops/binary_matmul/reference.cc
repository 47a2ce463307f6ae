// The definition of binary_matmul.
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/binary_matmul.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte::reference {

void binary_matmul(const BinaryMatmulParams& p) noexcept {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.m; ++m)
      for (int64_t n = 0; n < p.n; ++n) {
        int64_t sum = 0;
        bool nan = false;
        for (int64_t k = 0; k < p.k; ++k) {
          const bool x = is_plus(p.x, p.dtype, b * p.x_batch_stride + m * p.x_stride + k, nan);
          const bool z = p.z_bits != nullptr ? get_code(p.z_bits + n * stream_bytes(p.k, 1), k, 1) != 0
                                             : is_plus(p.z, p.z_dtype, b * p.z_batch_stride + n * p.z_stride + k, nan);
          sum += x == z ? 1 : -1;
        }
        store_scaled_sum(p.y, p.dtype, b * p.y_batch_stride + m * p.y_stride + n, sum, nan, p.scale, p.second_scale, p.bias, n);
      }
}

}  // namespace subbyte::reference
