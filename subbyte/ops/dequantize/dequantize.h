// out[n, perm[k]] = value of code k of row n (formats/packed_matrix.h), for all N rows; without perm, out[n, k].
//
// w    packed [N, K], any format, mixed width, zeros or offsets
// out  float32, float16, bfloat16 or float64 [N, K], row stride in elements; float32 values are the exact rule of
//      packed_matrix.h, float16 and bfloat16 are those rounded once to nearest even
// N, K may be 0; K need not divide by group_size. Errors: std::invalid_argument for inconsistent sizes or perm out of range.
// Threads: parallel over rows. Workspace: none. Same bits on every path.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

struct DequantizeParams {
  PackedMatrix w;
  void* out = nullptr;
  DType out_dtype = DType::kF32;
  int64_t out_stride = 0;
};
void dequantize(const DequantizeParams& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_sizes(const DequantizeParams& p);

namespace reference {
void dequantize_rows(const DequantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
}

}  // namespace subbyte
