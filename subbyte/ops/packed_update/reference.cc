// The definition of packed_update: update_rule.h, one element at a time.
#include "subbyte/ops/packed_update/kernels.h"
#include "subbyte/ops/packed_update/update_rule.h"

namespace subbyte::reference {

void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept {
  const UpdateNumbers c = update_numbers(p, host_numbers(p));
  const uint64_t key = step_key(p.seed, c.offset);
  for (int64_t n = row_begin; n < row_end; ++n) update_row(p, c, key, n);
}

}  // namespace subbyte::reference
