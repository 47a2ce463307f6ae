// The definition of dequantize.
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte::reference {

void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept {
  for (int64_t k = 0; k < w.k; ++k) store_float(out, out_dtype, w.perm != nullptr ? w.perm[k] : k, packed_value(w, n, k));
}

void dequantize_rows(const DequantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t n = row_begin; n < row_end; ++n)
    decode_row(p.w, n, static_cast<uint8_t*>(p.out) + n * p.out_stride * dtype_bytes(p.out_dtype), p.out_dtype);
}

}  // namespace subbyte::reference
