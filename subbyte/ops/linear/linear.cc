#include "subbyte/ops/linear/linear.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"

namespace subbyte {

int64_t linear_workspace_bytes(const LinearParams&) { return 0; }

bool check_sizes(const LinearParams& p) {
  validate(p.w, "linear");
  check_arg(p.m >= 0, "linear: x has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.x_stride >= p.w.k, "linear: row stride of x ", p.x_stride, " is below K = ", p.w.k);
  check_arg(p.m <= 1 || p.y_stride >= p.w.n, "linear: row stride of y ", p.y_stride, " is below N = ", p.w.n);
  if (p.m == 0 || p.w.n == 0) return false;
  check_arg(p.y != nullptr && (p.x != nullptr || p.w.k == 0), "linear: x or y are missing");
  return true;
}

void linear(const LinearParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear");
  parallel_for(p.w.n, 1, [&](int64_t begin, int64_t end) { reference::linear_rows(p, begin, end); });
}

}  // namespace subbyte
