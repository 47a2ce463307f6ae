// The row decoder for AVX-512: 16 codes a step by a byte shuffle and vpmultishiftqb; x86_decode_row.h holds the algorithm.
// Limit: the store.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/dequantize/kernels.h"
#include "subbyte/ops/dequantize/x86_decode_row.h"

namespace subbyte::avx512 {

void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept {
  decode_row_any<Vector>(w, n, out, out_dtype);
}

}  // namespace subbyte::avx512
