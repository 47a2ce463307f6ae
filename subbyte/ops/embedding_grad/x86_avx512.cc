// embedding_grad for AVX512: x86_embedding_grad_piece.h holds the algorithm. The sums of a piece stay in the first-level cache
// while the rows of gy that belong to it stream by once. Limit: reading gy.
#include "subbyte/formats/x86_avx512_vector.h"
#include "subbyte/ops/embedding_grad/kernels.h"
#include "subbyte/ops/embedding_grad/x86_embedding_grad_piece.h"

namespace subbyte::avx512 {

void embedding_grad_piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept {
  embedding_grad_piece_any<Vector>(p, t, k_begin, k_end);
}

}  // namespace subbyte::avx512
