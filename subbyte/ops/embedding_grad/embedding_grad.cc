#include "subbyte/ops/embedding_grad/embedding_grad.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/embedding_grad/kernels.h"

namespace subbyte {

std::span<const EmbeddingGradKernel> embedding_grad_kernels() {
  static constexpr EmbeddingGradKernel kKernels[] = {
#define SB_EMBEDDING_GRAD_KERNEL(name, isa, float64, space) {name, Isa::isa, float64, space::embedding_grad_piece},
#include "subbyte/ops/embedding_grad/kernels.inc"
#undef SB_EMBEDDING_GRAD_KERNEL
  };
  return kKernels;
}

const EmbeddingGradKernel& select_embedding_grad_kernel(DType gy_dtype, Isa isa) {
  for (const EmbeddingGradKernel& kernel : embedding_grad_kernels())
    if (kernel.isa <= isa && (kernel.float64 || gy_dtype != DType::kF64)) return kernel;
  return embedding_grad_kernels().back();
}

bool check_sizes(const EmbeddingGradParams& p) {
  check_arg(p.rows >= 0 && p.count >= 0 && p.gy_rows >= 0 && p.k >= 0, "embedding_grad: rows = ", p.rows, ", count = ", p.count,
            ", gy_rows = ", p.gy_rows, ", K = ", p.k, ", expected at least 0");
  check_arg(p.gy_rows <= 1 || p.gy_stride >= p.k, "embedding_grad: row stride ", p.gy_stride, " of gy is below K = ", p.k);
  check_arg(p.values == nullptr || p.rows <= 1 || p.values_stride >= p.k, "embedding_grad: row stride ", p.values_stride,
            " of values is below K = ", p.k);
  if (p.rows == 0 || p.k == 0 || (p.values == nullptr && p.sign_bits == nullptr)) return false;
  check_arg(p.begins != nullptr && p.ends != nullptr, "embedding_grad: begins or ends are missing");
  check_arg(p.count == 0 || (p.sources != nullptr && p.gy != nullptr), "embedding_grad: sources or gy are missing");
  return true;
}

void embedding_grad(const EmbeddingGradParams& p) {
  if (!check_sizes(p)) return;
  for (int64_t j = 0; j < p.count; ++j)
    check_arg(p.sources[j] >= 0 && p.sources[j] < p.gy_rows, "embedding_grad: source ", p.sources[j], " at position ", j,
              ", expected 0 <= source < ", p.gy_rows);
  for (int64_t t = 0; t < p.rows; ++t)
    check_arg(0 <= p.begins[t] && p.begins[t] <= p.ends[t] && p.ends[t] <= p.count, "embedding_grad: row ", t, " sums [",
              p.begins[t], ", ", p.ends[t], "), expected a range inside [0, ", p.count, ")");
  const EmbeddingGradKernel& kernel = select_embedding_grad_kernel(p.gy_dtype, active_isa());
  const int64_t pieces = ceil_div(p.k, kEmbeddingGradPiece);
  const int64_t per_item = ceil_div(p.count, p.rows) * min_i64(p.k, kEmbeddingGradPiece);
  parallel_for(p.rows * pieces, max_i64(1, 16384 / max_i64(1, per_item)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % pieces * kEmbeddingGradPiece;
      kernel.piece(p, i / pieces, k, min_i64(p.k, k + kEmbeddingGradPiece));
    }
  });
}

}  // namespace subbyte
