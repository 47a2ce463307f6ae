// Formats by name, and the layout of a packed row.
//
// A row is described by a string, the same in files, Python, the command line and op schemas:
//   "uint4"                   every code of the row has 4 bits
//   "uint8*64+uint4*448"      mixed width: the first 64 stored columns are uint8, the next 448 uint4
// A mixed row is a list of segments stored back to back, each starting on a byte, each a canonical stream (bits.h).
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "subbyte/formats/bits.h"

namespace subbyte {

enum class Format : uint8_t {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) id,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};

struct FormatInfo {
  const char* name;
  int bits;
  int levels;
  float fixed_zero;
};

inline constexpr FormatInfo kFormats[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) {name, bits, levels, fixed_zero},
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};
inline constexpr int kFormatCount = int(sizeof(kFormats) / sizeof(kFormats[0]));

// Properties of a format. Switches, not table look-ups, so that the same text serves device code.
SB_HD constexpr int format_bits(Format f) {
  switch (f) {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) \
  case Format::id:                                    \
    return bits;
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
  }
  return 0;
}
SB_HD constexpr int format_levels(Format f) {
  switch (f) {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) \
  case Format::id:                                    \
    return levels;
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
  }
  return 0;
}
SB_HD constexpr float format_fixed_zero(Format f) {
  switch (f) {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) \
  case Format::id:                                    \
    return fixed_zero;
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
  }
  return 0;
}
const char* format_name(Format f);
// Throws std::invalid_argument that lists the known names.
Format format_from_name(std::string_view name);
// "uint<bits>" for 2..8, "sign" for 1. Throws std::invalid_argument otherwise.
Format format_from_bits(int bits);

// Columns [k_begin, k_begin + k_count) of every row, in one format, starting at byte `byte_begin` of the row.
struct Segment {
  int64_t k_begin = 0;
  int64_t k_count = 0;
  int64_t byte_begin = 0;
  Format format = Format::kUint8;
};

// How K codes lie in a row. A plain value: cheap to copy, passed to GPU kernels as it is.
struct RowLayout {
  static constexpr int kMaxSegments = 16;
  std::array<Segment, kMaxSegments> segments{};
  int segment_count = 0;
  int64_t k = 0;
  int64_t row_bytes = 0;

  bool uniform() const { return segment_count <= 1; }
  // Smallest and largest code width.
  int min_bits() const;
  int max_bits() const;
  // The string that row_layout() parses back.
  std::string name() const;
};

RowLayout row_layout(Format format, int64_t k);
// Parses "uint4" or "uint8*64+uint4*448". Throws std::invalid_argument when a name is unknown, a count is not a positive
// number, the counts do not add up to k, or there are more than RowLayout::kMaxSegments segments.
RowLayout row_layout(std::string_view name, int64_t k);

}  // namespace subbyte
