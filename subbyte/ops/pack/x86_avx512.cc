// Sixty-four codes a step (x86_avx512_vector.h): out by a byte shuffle and vpmultishiftqb, one path for all widths; in by three
// merges of neighbours and a byte shuffle. Masked loads and stores serve the tail, so there is no second loop.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte::avx512 {

void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept {
  pack_stream(codes, count, bits, stream);
}

void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept {
  unpack_stream(stream, count, bits, codes);
}

}  // namespace subbyte::avx512
