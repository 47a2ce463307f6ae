// The definition of pack and unpack: one get or set a code.
#include <cstring>

#include "subbyte/formats/bits.h"
#include "subbyte/ops/pack/pack.h"

namespace subbyte::reference {

void pack(const PackParams& p) noexcept {
  for (int64_t n = 0; n < p.n; ++n) {
    uint8_t* row = p.packed + n * p.layout.row_bytes;
    std::memset(row, 0, size_t(p.layout.row_bytes));
    for (int i = 0; i < p.layout.segment_count; ++i) {
      const Segment& s = p.layout.segments[i];
      for (int64_t k = 0; k < s.k_count; ++k)
        set_code(row + s.byte_begin, k, format_bits(s.format), p.unpacked[n * p.unpacked_stride + s.k_begin + k]);
    }
  }
}

void unpack(const UnpackParams& p) noexcept {
  for (int64_t n = 0; n < p.n; ++n) {
    const uint8_t* row = p.packed + n * p.layout.row_bytes;
    for (int i = 0; i < p.layout.segment_count; ++i) {
      const Segment& s = p.layout.segments[i];
      for (int64_t k = 0; k < s.k_count; ++k)
        p.unpacked[n * p.unpacked_stride + s.k_begin + k] = uint8_t(get_code(row + s.byte_begin, k, format_bits(s.format)));
    }
  }
}

}  // namespace subbyte::reference
