// Eight codes an instruction by pext and pdep (x86_avx2_vector.h). Limit: one of them a cycle, 8 bytes of codes a cycle, which
// is more than memory moves; so the nibble and bit tricks that single widths allow were not written.
#include "subbyte/formats/x86_avx2_vector.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte::avx2 {

void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept {
  pack_stream(codes, count, bits, stream);
}

void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept {
  unpack_stream(stream, count, bits, codes);
}

}  // namespace subbyte::avx2
