// One definition serves the CPU: descent and xor are a few byte operations a row, and the average costs a Philox block for
// every four weights of rows that the batch has read and differentiated anyway.
#include "subbyte/ops/embedding_update/embedding_update.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/embedding_update/update_rule.h"

namespace subbyte {

bool check_sizes(const EmbeddingUpdateParams& p) {
  check_arg(p.n >= 0 && p.k >= 0 && p.count >= 0, "embedding_update: N = ", p.n, ", K = ", p.k, ", count = ", p.count,
            ", expected at least 0");
  check_arg(p.one_minus_beta > 0.0f && p.one_minus_beta <= 1.0f, "embedding_update: beta is ", 1.0f - p.one_minus_beta,
            ", expected 0 <= beta < 1");
  check_arg(p.lr >= 0.0f && std::isfinite(p.lr), "embedding_update: lr is ", p.lr, ", expected a finite number of at least 0");
  if (p.count == 0 || p.k == 0) return false;
  check_arg(p.codes != nullptr && p.rows != nullptr && p.sign_bits != nullptr,
            "embedding_update: codes, rows or sign_bits are missing");
  if (p.mode == EmbeddingUpdateMode::kMomentum)
    check_arg(p.momentum != nullptr && p.slots != nullptr, "embedding_update: momentum or slots are missing");
  return true;
}

void embedding_update(const EmbeddingUpdateParams& p) {
  if (!check_sizes(p)) return;
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.rows[i] < 0 || p.rows[i] >= p.n)
      throw std::out_of_range(detail::concat("embedding_update: row ", p.rows[i], " at position ", i,
                                             " is outside the table, expected 0 <= row < ", p.n));
    check_arg(i == 0 || p.rows[i] > p.rows[i - 1], "embedding_update: row ", p.rows[i], " follows row ",
              i == 0 ? 0 : p.rows[i - 1], ", expected strictly increasing rows");
    if (p.mode == EmbeddingUpdateMode::kMomentum)
      check_arg(p.slots[i] >= 0 && p.slots[i] < p.momentum_rows, "embedding_update: slot ", p.slots[i], " at position ", i,
                ", expected 0 <= slot < ", p.momentum_rows);
  }
  parallel_for(p.count, max_i64(1, 4096 / p.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = p.mode == EmbeddingUpdateMode::kMomentum ? p.slots[i] : 0;
      uint8_t* codes = p.codes + p.rows[i] * p.row_bytes();
      for (int64_t byte = 0; byte < p.row_bytes(); ++byte) codes[byte] = updated_byte(p, i, p.rows[i], slot, byte);
    }
  });
}

}  // namespace subbyte
