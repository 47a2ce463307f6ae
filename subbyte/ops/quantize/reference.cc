// The definition of choose and encode.
#include <cmath>
#include <cstring>

#include "subbyte/ops/quantize/choose_rule.h"
#include "subbyte/ops/quantize/code_rule.h"
#include "subbyte/ops/quantize/kernels.h"

namespace subbyte::reference {
namespace {

float value_at(const QuantizeParams& p, int64_t n, int64_t stored_k) {
  const int64_t k = p.out.perm != nullptr ? p.out.perm[stored_k] : stored_k;
  return load_float(p.w, p.w_dtype, n * p.w_stride + k);
}

}  // namespace

int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  for (int64_t n = row_begin; n < row_end; ++n)
    for (int64_t k = 0; k < p.out.k; ++k)
      if (!std::isfinite(load_float(p.w, p.w_dtype, n * p.w_stride + k))) return n;
  return -1;
}

bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept {
  const PackedMatrix& o = p.out;
  const int64_t groups = o.groups();
  bool finite = true;
  for (int64_t n = row_begin; n < row_end; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * o.group_size, end = min_i64(begin + o.group_size, o.k), i = n * groups + g;
      const Format f = segment_of(o.layout, begin).format;
      float lo = value_at(p, n, begin), hi = lo;
      double magnitude = 0;
      for (int64_t k = begin; k < end; ++k) {
        const float v = value_at(p, n, k);
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
        magnitude += std::fabs(double(v));
      }
      const float scale = choose_scale(p.scheme, o.zero_kind, f, lo, hi, magnitude, end - begin, o.k);
      store_float(p.scales, o.scale_dtype, i, scale);
      const float stored = load_float(p.scales, o.scale_dtype, i);
      finite = finite && std::isfinite(stored);
      if (p.zeros != nullptr) {
        store_float(p.zeros, o.zero_dtype, i, choose_zero(p.scheme, o.zero_kind, f, lo, stored));
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
                    s.format, p.rounding, p.seed, p.offset, (p.first_row + uint64_t(n)) * uint64_t(o.k) + uint64_t(stored));
        set_code(row + s.byte_begin, k, format_bits(s.format), code);
      }
    }
  }
}

}  // namespace subbyte::reference
