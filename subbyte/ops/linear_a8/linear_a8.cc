#include "subbyte/ops/linear_a8/linear_a8.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"

namespace subbyte {

int64_t linear_a8_workspace_bytes(const LinearA8Params&) { return 0; }

bool check_sizes(const LinearA8Params& p) {
  validate(p.w, "linear_a8");
  check_arg(p.dtype != DType::kF64, "linear_a8: x is float64, expected float32, float16 or bfloat16");
  check_arg(p.m >= 0, "linear_a8: x has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.x_stride >= p.w.k, "linear_a8: row stride of x ", p.x_stride, " is below K = ", p.w.k);
  check_arg(p.m <= 1 || p.y_stride >= p.w.n, "linear_a8: row stride of y ", p.y_stride, " is below N = ", p.w.n);
  if (p.m == 0 || p.w.n == 0) return false;
  check_arg(p.y != nullptr && (p.x != nullptr || p.w.k == 0), "linear_a8: x or y are missing");
  return true;
}

void linear_a8(const LinearA8Params& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear_a8");
  reference::linear_a8(p);
}

}  // namespace subbyte
