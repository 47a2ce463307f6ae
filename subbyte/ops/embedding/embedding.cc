#include "subbyte/ops/embedding/embedding.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/dequantize/kernels.h"

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
  validate_perm(p.table, "embedding");
  const DecodeRow decode_row = select_decode_kernel(active_isa()).decode_row;
  const int64_t stride_bytes = p.out_stride * dtype_bytes(p.out_dtype);
  parallel_for(p.count, max_i64(1, 16384 / p.table.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      decode_row(p.table, index(i), static_cast<uint8_t*>(p.out) + i * stride_bytes, p.out_dtype);
  });
}

}  // namespace subbyte
