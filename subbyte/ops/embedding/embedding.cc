#include "subbyte/ops/embedding/embedding.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/dequantize/dequantize.h"

namespace subbyte {

bool check_sizes(const EmbeddingParams& p) {
  validate(p.table, "embedding");
  check_arg(p.count >= 0, "embedding: ", p.count, " indices, expected at least 0");
  check_arg(p.count <= 1 || p.out_stride >= p.table.k, "embedding: row stride ", p.out_stride, " is below K = ", p.table.k);
  if (p.count == 0) return false;
  check_arg(p.indices != nullptr, "embedding: indices are missing");
  check_arg(p.table.k == 0 || p.out != nullptr, "embedding: out is missing");
  return true;
}

void embedding(const EmbeddingParams& p) {
  if (!check_sizes(p)) return;
  auto index = [&](int64_t i) {
    return p.indices_are_int64 ? static_cast<const int64_t*>(p.indices)[i] : static_cast<const int32_t*>(p.indices)[i];
  };
  for (int64_t i = 0; i < p.count; ++i)
    if (index(i) < 0 || index(i) >= p.table.n)
      throw std::out_of_range(detail::concat("embedding: index ", index(i), " at position ", i,
                                             " is outside the table, expected 0 <= index < ", p.table.n));
  if (p.table.k == 0) return;
  parallel_for(p.count, max_i64(1, 16384 / p.table.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // One row of the table as a matrix of its own, written to row i of out.
      const int64_t n = index(i), groups = p.table.groups();
      DequantizeParams row;
      row.w = p.table;
      row.w.n = 1;
      row.w.codes += n * p.table.layout.row_bytes;
      row.w.scales = static_cast<const uint8_t*>(p.table.scales) + n * groups * dtype_bytes(p.table.scale_dtype);
      if (p.table.zeros != nullptr)
        row.w.zeros = static_cast<const uint8_t*>(p.table.zeros) + n * groups * dtype_bytes(p.table.zero_dtype);
      row.out = static_cast<uint8_t*>(p.out) + i * p.out_stride * dtype_bytes(p.out_dtype);
      row.out_dtype = p.out_dtype;
      row.out_stride = p.out_stride;
      reference::dequantize_rows(row, 0, 1);
    }
  });
}

}  // namespace subbyte
