// pack:   stream(n)[k] = codes[n, k]      one byte a code -> canonical code streams (formats/bits.h)
// unpack: codes[n, k]  = stream(n)[k]     the inverse; unpack(pack(c)) == c
//
// unpacked  u8 [N, K], row stride in elements; each code below the format's number of levels
// packed    u8 [N, layout.row_bytes], contiguous; spare high bits of each segment are written as zero and not read
// N and K may be 0; K need not divide anything. No rounding. perm does not enter: codes are in stored order.
// Errors: std::invalid_argument for a null pointer of a non-empty array, sizes below 0, a layout for another K, and (pack) a
// code outside its format, naming row, column and code.
// Threads: parallel over rows. Workspace: none. Same bits on every path.
#pragma once
#include <cstdint>

#include "subbyte/formats/format.h"

namespace subbyte {

struct PackParams {
  RowLayout layout;
  int64_t n = 0, k = 0;
  const uint8_t* unpacked = nullptr;
  int64_t unpacked_stride = 0;
  uint8_t* packed = nullptr;
};
void pack(const PackParams& p);

struct UnpackParams {
  RowLayout layout;
  int64_t n = 0, k = 0;
  const uint8_t* packed = nullptr;
  uint8_t* unpacked = nullptr;
  int64_t unpacked_stride = 0;
};
void unpack(const UnpackParams& p);

// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_sizes(const PackParams& p);
bool check_sizes(const UnpackParams& p);

}  // namespace subbyte
