// out[i, perm[k]] = value of code k of row indices[i]        look-up in a packed table [V, D] (N = V rows, K = D columns)
//
// indices  int64 or int32 [count], each in [0, N)
// table    packed [N, K] as in dequantize
// out      float32, float16, bfloat16 or float64 [count, K], row stride in elements; values and rounding as in dequantize
// count, N, K may be 0. Errors: std::out_of_range for an index outside [0, N), naming position and value (CPU); sizes as in
// dequantize. Threads: parallel over count. Cost grows with count, never with N. Same bits on every path.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

struct EmbeddingParams {
  PackedMatrix table;
  const void* indices = nullptr;
  bool indices_are_int64 = true;
  int64_t count = 0;
  void* out = nullptr;
  DType out_dtype = DType::kF32;
  int64_t out_stride = 0;
};
void embedding(const EmbeddingParams& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when there is no index to look up; a table without columns still has its indices checked.
bool check_sizes(const EmbeddingParams& p);

}  // namespace subbyte
