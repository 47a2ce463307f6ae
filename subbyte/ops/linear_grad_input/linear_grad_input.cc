#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"

namespace subbyte {

int64_t linear_grad_input_workspace_bytes(const LinearGradInputParams&) { return 0; }

bool check_sizes(const LinearGradInputParams& p) {
  validate(p.w, "linear_grad_input");
  check_arg(p.m >= 0, "linear_grad_input: gy has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.gy_stride >= p.w.n, "linear_grad_input: row stride of gy ", p.gy_stride, " is below N = ", p.w.n);
  check_arg(p.m <= 1 || p.gx_stride >= p.w.k, "linear_grad_input: row stride of gx ", p.gx_stride, " is below K = ", p.w.k);
  if (p.m == 0 || p.w.k == 0) return false;
  check_arg(p.gx != nullptr && (p.gy != nullptr || p.w.n == 0), "linear_grad_input: gy or gx are missing");
  return true;
}

void linear_grad_input(const LinearGradInputParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear_grad_input");
  parallel_for(p.w.k, 1, [&](int64_t begin, int64_t end) { reference::linear_grad_input_columns(p, begin, end); });
}

}  // namespace subbyte
