// The definition of pack and unpack: one get or set a code.
#include <cstring>

#include "subbyte/formats/bits.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte::reference {

void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept {
  std::memset(stream, 0, size_t(stream_bytes(count, bits)));
  for (int64_t k = 0; k < count; ++k) set_code(stream, k, bits, codes[k]);
}

void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept {
  for (int64_t k = 0; k < count; ++k) codes[k] = uint8_t(get_code(stream, k, bits));
}

}  // namespace subbyte::reference
