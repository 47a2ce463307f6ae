// The row decoder for AVX2: 8 codes a step by pdep and a byte-to-int widening; x86_decode_row.h holds the algorithm. Limit: the
// store. Measured on Zen 3, one busy core, float32 output as a share of filling the same array: uint4 81 % (groups of 32) and
// 82 % (128), sign 75 % and 98 %; bfloat16 output is bound by the rounding, 3.7 GB/s. A table of values a group was not tried:
// a group of 32 costs four steps, a table of 16 values two.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/dequantize/kernels.h"
#include "subbyte/ops/dequantize/x86_decode_row.h"

namespace subbyte::avx2 {

void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept {
  decode_row_any<Vector>(w, n, out, out_dtype);
}

}  // namespace subbyte::avx2
