// One run of columns of a packed matrix in which all codes have the same width: what the float kernels of linear and
// linear_grad_input work on. A mixed-width matrix is a list of these.
//
// Value of code q of a column in group g, in the form the kernels use (c = segment_centre, an integer):
//   w = s * (q - c) + o,   o = s * (c - zero), or fma(s, c, offset)
// q - c is exact, so a symmetric matrix (zero = c, o = 0) has no cancellation, and o meets x only as a sum over the group.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

struct WeightSegment {
  Format format = Format::kUint8;
  ZeroKind zero_kind = ZeroKind::kFixed;
  DType scale_dtype = DType::kF32;
  DType zero_dtype = DType::kF32;
  int64_t n = 0;
  int64_t k = 0;                       // columns of this segment
  int64_t k_begin = 0;                 // first stored column
  int64_t group_size = 1;              // at most k when groups == 1 is false
  int64_t groups = 0;                  // ceil(k / group_size): a segment starts at a group's start
  int64_t row_groups = 0;              // distance between rows of scales and zeros, in groups
  int64_t row_bytes = 0;               // distance between rows of codes
  const uint8_t* codes = nullptr;      // row 0, first byte of the segment
  const uint8_t* codes_end = nullptr;  // one past the last byte of the matrix: nothing is read from here on
  const uint8_t* scales = nullptr;     // row 0, first group of the segment
  const uint8_t* scales_end = nullptr;
  const uint8_t* zeros = nullptr;  // zeros or offsets, as zero_kind says; null when kFixed
  const uint8_t* zeros_end = nullptr;
};

// The code that q is measured from: the middle of the levels, rounded up.
SB_HD constexpr int format_centre(Format f) { return format_levels(f) / 2; }
// Whether o can be other than 0.
SB_HD constexpr bool segment_has_offset(const WeightSegment& w) {
  return w.zero_kind != ZeroKind::kFixed || format_fixed_zero(w.format) != float(format_centre(w.format));
}

SB_HD WeightSegment weight_segment(const PackedMatrix& w, int index) {
  const Segment& s = w.layout.segments[index];
  const int64_t groups = w.groups(), first_group = s.k_begin / w.group_size;
  WeightSegment out;
  out.format = s.format;
  out.zero_kind = w.zero_kind;
  out.scale_dtype = w.scale_dtype;
  out.zero_dtype = w.zero_dtype;
  out.n = w.n;
  out.k = s.k_count;
  out.k_begin = s.k_begin;
  out.group_size = w.group_size;
  out.groups = ceil_div(s.k_count, w.group_size);
  out.row_groups = groups;
  out.row_bytes = w.layout.row_bytes;
  out.codes = w.codes + s.byte_begin;
  out.codes_end = w.codes + w.codes_bytes();
  const int64_t scale_bytes = dtype_bytes(w.scale_dtype), zero_bytes = dtype_bytes(w.zero_dtype);
  out.scales = static_cast<const uint8_t*>(w.scales) + first_group * scale_bytes;
  out.scales_end = static_cast<const uint8_t*>(w.scales) + w.n * groups * scale_bytes;
  if (w.zero_kind != ZeroKind::kFixed) {
    out.zeros = static_cast<const uint8_t*>(w.zeros) + first_group * zero_bytes;
    out.zeros_end = static_cast<const uint8_t*>(w.zeros) + w.n * groups * zero_bytes;
  }
  return out;
}

// Codes of a segment that lie in one 32-bit lane of a block. The x86 kernels load a block (as many lanes as the vector has)
// so that lane i holds codes [i * f, (i + 1) * f), f = lane_codes: widths that divide 32 fill the lane, the others take
// whole bytes (3 bits: 3 bytes, 6 bits: 3 bytes) or halves of 8 codes (5 and 7 bits).
SB_HD constexpr int lane_codes(int bits) { return bits <= 2 ? 32 / bits : bits <= 4 ? 8 : 4; }

}  // namespace subbyte
