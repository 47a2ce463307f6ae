#include "subbyte/formats/packed_matrix.h"

#include "subbyte/base/error.h"

namespace subbyte {

void validate(const PackedMatrix& w, const char* op) {
  check_arg(w.n >= 0 && w.k >= 0, op, ": the weight is [", w.n, ", ", w.k, "], expected sizes of at least 0");
  check_arg(w.group_size >= 1, op, ": group_size is ", w.group_size, ", expected at least 1");
  check_arg(w.layout.k == w.k, op, ": the format describes ", w.layout.k, " columns, the weight has K = ", w.k);
  for (int i = 0; i + 1 < w.layout.segment_count; ++i) {
    const int64_t end = w.layout.segments[i].k_begin + w.layout.segments[i].k_count;
    check_arg(end % w.group_size == 0, op, ": format segment ", i, " ends at column ", end,
              ", expected a multiple of group_size = ", w.group_size);
  }
  check_arg(w.scale_dtype != DType::kF64 && w.zero_dtype != DType::kF64, op,
            ": scales and zeros are float64, expected float32, float16 or bfloat16");
  if (w.n == 0 || w.k == 0) return;
  check_arg(w.codes != nullptr && w.scales != nullptr, op, ": codes or scales are missing");
  check_arg((w.zeros != nullptr) == (w.zero_kind != ZeroKind::kFixed), op, ": zeros are ",
            w.zeros != nullptr ? "given but the kind is fixed" : "missing");
}

void validate_perm(const PackedMatrix& w, const char* op) {
  if (w.perm == nullptr) return;
  for (int64_t k = 0; k < w.k; ++k)
    check_arg(w.perm[k] >= 0 && w.perm[k] < w.k, op, ": perm[", k, "] is ", w.perm[k], ", expected 0 <= perm < K = ", w.k);
}

}  // namespace subbyte
