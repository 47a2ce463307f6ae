// embedding_update: a thread owns one byte of a touched row, eight weights. Limited by the state it reads and writes (1 or 4
// bytes a weight under momentum; a byte in, a byte out without).
#include "subbyte/base/cuda_launch.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/ops/embedding_update/embedding_update_cuda.h"
#include "subbyte/ops/embedding_update/update_rule.h"

namespace subbyte::cuda {
namespace {

__global__ void __launch_bounds__(256) update_kernel(const __grid_constant__ EmbeddingUpdateParams p) {
  const int64_t byte = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (byte >= p.row_bytes()) return;
  for (int64_t i = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; i < p.count; i += int64_t(gridDim.y) * blockDim.y) {
    const int64_t row = p.rows[i], slot = p.mode == EmbeddingUpdateMode::kMomentum ? p.slots[i] : 0;
    if (row < 0 || row >= p.n) continue;
    if (p.mode == EmbeddingUpdateMode::kMomentum && (slot < 0 || slot >= p.momentum_rows)) continue;
    p.codes[row * p.row_bytes() + byte] = updated_byte(p, i, row, slot, byte);
  }
}

}  // namespace

void embedding_update(const EmbeddingUpdateParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  watch_indices(p.rows, true, p.count, p.n, "embedding_update", "row", stream);
  if (p.mode == EmbeddingUpdateMode::kMomentum)
    watch_indices(p.slots, true, p.count, p.momentum_rows, "embedding_update", "slot", stream);
  const RowGrid g = row_grid(p.count, p.row_bytes(), 1);
  update_kernel<<<g.grid, g.block, 0, stream_of(stream)>>>(p);
  check_launch("embedding_update");
}

}  // namespace subbyte::cuda
