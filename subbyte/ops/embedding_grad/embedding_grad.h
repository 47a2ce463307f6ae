// A[t, k] = sum_{j in [begins[t], ends[t])} factors[j] * gy[sources[j], k]        gradient of the rows of a table that were
// used values[t, k] = A[t, k];     bit k of sign_bits row t = 1 where scales[t] * A[t, k] >= 0, else 0 (NaN gives 0)
//
// The gradient of an embedding look-up, for the touched rows alone: t counts them, j the look-ups of row t in the order of
// their position, so nothing here has the height of the table. sources[j] is the look-up's row of gy (of a bag: the bag).
//
// gy         float32, float16, bfloat16 or float64 [gy_rows, K], row stride in elements; only read
// sources    int64 [count], each in [0, gy_rows)
// factors    float32 [count] or null (all 1)
// begins, ends  int64 [rows], 0 <= begin <= end <= count
// scales     float32 [rows] or null (all 1); sign_bits alone looks at it
// values     gy's type [rows, K], row stride in elements, or null
// sign_bits  uint8 [rows, ceil(K / 8)] or null: format sign, column k in bit k % 8 of byte k / 8; spare high bits are 0
//
// Sums are float32 (float64 for float64 gy), from +0, in order of j; products round apart; values are rounded once to gy's
// type. The sign is that of the unrounded sum. Same bits on every path, thread count and device. rows, count, K may be 0.
// Errors (std::invalid_argument): sizes, missing arrays; on the CPU also a source, begin or end out of range. Threads: parallel
// over rows and pieces of 512 columns. Workspace: none. Source: the packed sign gradient of bitorch-engine's binary embedding;
// deviations: rows that were not used have no entry, spare bits are 0, gy is never written.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

struct EmbeddingGradParams {
  const void* gy = nullptr;
  DType gy_dtype = DType::kF32;
  int64_t gy_rows = 0, gy_stride = 0, k = 0;
  const int64_t* sources = nullptr;
  const float* factors = nullptr;
  int64_t count = 0;
  const int64_t* begins = nullptr;
  const int64_t* ends = nullptr;
  const float* scales = nullptr;
  int64_t rows = 0;
  void* values = nullptr;
  int64_t values_stride = 0;
  uint8_t* sign_bits = nullptr;

  SB_MEMBER_HD int64_t sign_bytes() const { return (k + 7) / 8; }
};
void embedding_grad(const EmbeddingGradParams& p);
// The checks of the entry that need no content; shared by the CPU and CUDA entries. False when there is nothing to do.
bool check_sizes(const EmbeddingGradParams& p);

namespace reference {
// Columns [k_begin, k_end) of row t; k_begin is a multiple of 8.
void embedding_grad_piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept;
}  // namespace reference

}  // namespace subbyte
