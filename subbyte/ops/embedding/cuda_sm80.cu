// embedding: the row decoder of dequantize with rows picked by index; cost grows with the number of indices.
#include "subbyte/base/value_watch.h"
#include "subbyte/ops/dequantize/decode_rows_cuda.h"
#include "subbyte/ops/embedding/embedding_cuda.h"

namespace subbyte::cuda {

void embedding(const EmbeddingParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  watch_indices(p.indices, p.indices_are_int64, p.count, p.table.n, "embedding", "index", stream);
  if (p.table.k == 0) return;
  decode_rows(p.table, p.indices, p.indices_are_int64, p.count, p.out, p.out_dtype, p.out_stride, stream, "embedding");
}

}  // namespace subbyte::cuda
