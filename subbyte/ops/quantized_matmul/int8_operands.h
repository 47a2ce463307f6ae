// Where quantized_matmul keeps its operands as int8, on every device: rows padded with zeros to a multiple of kInt8RowAlign
// columns, and a byte a row that says whether the row holds a NaN. Operands that repeat over the batch are kept once.
#pragma once
#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

namespace subbyte {

inline constexpr int64_t kInt8RowAlign = 64;

struct Int8Operands {
  int64_t row_bytes = 0, x_rows = 0, z_rows = 0;
  int64_t z_begin = 0, x_marks = 0, z_marks = 0, total_bytes = 0;
};

SB_HD Int8Operands int8_operands(const QuantizedMatmulParams& p) {
  Int8Operands w;
  w.row_bytes = round_up(p.k, kInt8RowAlign);
  w.x_rows = (p.x_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.m;
  w.z_rows = (p.z_codes != nullptr || p.z_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.n;
  w.z_begin = w.x_rows * w.row_bytes;
  w.x_marks = w.z_begin + w.z_rows * w.row_bytes;
  w.z_marks = w.x_marks + round_up(w.x_rows, 64);
  w.total_bytes = w.z_marks + round_up(w.z_rows, 64);
  return w;
}

// All checks but those of the steps' values. False when there is nothing to write.
bool check_sizes(const QuantizedMatmulParams& p);

}  // namespace subbyte
