// quantize for AVX2; x86_quantize_rows.h holds the algorithm: pieces of 512 columns go through the first-level cache as float,
// random words, byte codes, stream. Limits: the division (nearest), Philox's multiplications (stochastic). Measured on Zen 3,
// one busy core, uint4 g64 from float32: choose and nearest 2.0 G weights/s, stochastic 0.66 G/s; choose 6, encode 22 to 27
// times the reference. Philox in packed 32-bit lanes would need blends after each multiplication: 18 instead of 16 instructions
// a round for 8 counters.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/quantize/kernels.h"
#include "subbyte/ops/quantize/x86_quantize_rows.h"

namespace subbyte::avx2 {

int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  return find_bad_row_with<Vector>(p, row_begin, row_end);
}

bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  return choose_rows_with<Vector>(p, row_begin, row_end);
}

void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  encode_rows_with<Vector>(p, row_begin, row_end);
}

}  // namespace subbyte::avx2
