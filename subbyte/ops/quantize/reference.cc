// The definition of choose and encode.
#include <cmath>
#include <cstring>

#include "subbyte/ops/quantize/code_rule.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte::reference {
namespace {

float value_at(const QuantizeParams& p, int64_t n, int64_t stored_k) {
  const int64_t k = p.out.perm != nullptr ? p.out.perm[stored_k] : stored_k;
  return load_float(p.w, p.w_dtype, n * p.w_stride + k);
}

}  // namespace

bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  const PackedMatrix& o = p.out;
  const int64_t groups = o.groups();
  bool finite = true;
  for (int64_t n = row_begin; n < row_end; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * o.group_size, end = min_i64(begin + o.group_size, o.k), i = n * groups + g;
      const Format f = segment_of(o.layout, begin).format;
      const float top = float(format_levels(f) - 1), fixed = format_fixed_zero(f);
      float lo = value_at(p, n, begin), hi = lo;
      double magnitude = 0;
      for (int64_t k = begin; k < end; ++k) {
        const float v = value_at(p, n, k);
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
        magnitude += std::fabs(double(v));
      }
      float scale = 0, zero = 0;
      switch (p.scheme) {
        case Scheme::kMinMax:
          if (o.zero_kind == ZeroKind::kZeros) {
            lo = lo > 0 ? 0 : lo;
            hi = hi < 0 ? 0 : hi;
          }
          scale = (hi - lo) / top;
          break;
        case Scheme::kAbsMax: {
          const float up = hi / (top - fixed), down = -lo / fixed;
          scale = up > down ? up : down;
          break;
        }
        case Scheme::kAbsMean: {
          const float mean = float(magnitude / double(end - begin));
          if (f == Format::kSign) scale = 2 * mean;
          else if (f == Format::kTernary) scale = mean;
          else scale = 2 * mean / std::sqrt(float((1 << (format_bits(f) - 1)) - 1));
          break;
        }
      }
      store_float(p.scales, o.scale_dtype, i, scale);
      const float stored = load_float(p.scales, o.scale_dtype, i);
      finite = finite && std::isfinite(stored);
      if (o.zero_kind == ZeroKind::kOffsets) {
        zero = lo;
      } else if (o.zero_kind == ZeroKind::kZeros) {
        zero = stored == 0 ? 0 : std::fmin(std::fmax(std::rint(-lo / stored), 0.0f), top);
      }
      if (p.zeros != nullptr) {
        store_float(p.zeros, o.zero_dtype, i, zero);
        finite = finite && std::isfinite(load_float(p.zeros, o.zero_dtype, i));
      }
    }
  return finite;
}

void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  const PackedMatrix& o = p.out;
  const int64_t groups = o.groups();
  for (int64_t n = row_begin; n < row_end; ++n) {
    uint8_t* row = p.codes + n * o.layout.row_bytes;
    std::memset(row, 0, size_t(o.layout.row_bytes));
    for (int j = 0; j < o.layout.segment_count; ++j) {
      const Segment& s = o.layout.segments[j];
      for (int64_t k = 0; k < s.k_count; ++k) {
        const int64_t stored = s.k_begin + k, i = n * groups + stored / o.group_size;
        const uint32_t code =
            code_of(value_at(p, n, stored), load_float(o.scales, o.scale_dtype, i), group_zero(o, s.format, i), o.zero_kind,
                    s.format, p.rounding, p.seed, p.offset, uint64_t(n) * uint64_t(o.k) + uint64_t(stored));
        set_code(row + s.byte_begin, k, format_bits(s.format), code);
      }
    }
  }
}

}  // namespace subbyte::reference
