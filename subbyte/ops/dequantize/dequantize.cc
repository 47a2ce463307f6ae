#include "subbyte/ops/dequantize/dequantize.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"

namespace subbyte {

bool check_sizes(const DequantizeParams& p) {
  validate(p.w, "dequantize");
  check_arg(p.w.n <= 1 || p.out_stride >= p.w.k, "dequantize: row stride ", p.out_stride, " is below K = ", p.w.k);
  if (p.w.n == 0 || p.w.k == 0) return false;
  check_arg(p.out != nullptr, "dequantize: out is missing");
  return true;
}

void dequantize(const DequantizeParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "dequantize");
  parallel_for(p.w.n, max_i64(1, 16384 / p.w.k),
               [&](int64_t begin, int64_t end) { reference::dequantize_rows(p, begin, end); });
}

}  // namespace subbyte
