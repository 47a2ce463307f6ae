// The kernels of embedding_grad and how one is chosen. All give the same bits; float64 is the reference's alone.
#pragma once
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/embedding_grad/embedding_grad.h"

namespace subbyte {

// A piece holds at most this many columns.
inline constexpr int64_t kEmbeddingGradPiece = 512;

struct EmbeddingGradKernel {
  const char* name;
  Isa isa;
  bool float64;
  // As reference::embedding_grad_piece, at most kEmbeddingGradPiece columns.
  void (*piece)(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept;
};

// Best first; the last row is the reference.
std::span<const EmbeddingGradKernel> embedding_grad_kernels();
// The first row that the instruction set includes and that takes the type.
const EmbeddingGradKernel& select_embedding_grad_kernel(DType gy_dtype, Isa isa);

namespace avx2 {
void embedding_grad_piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept;
}
namespace avx512 {
void embedding_grad_piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept;
}

}  // namespace subbyte
