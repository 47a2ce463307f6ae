#include "subbyte/ops/dequantize/dequantize.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte {

bool check_sizes(const DequantizeParams& p) {
  validate(p.w, "dequantize");
  check_arg(p.w.n <= 1 || p.out_stride >= p.w.k, "dequantize: row stride ", p.out_stride, " is below K = ", p.w.k);
  if (p.w.n == 0 || p.w.k == 0) return false;
  check_arg(p.out != nullptr, "dequantize: out is missing");
  return true;
}

std::span<const DecodeKernel> decode_kernels() {
  static constexpr DecodeKernel kKernels[] = {
#define SB_DECODE_KERNEL(name, isa, decode_row) {name, Isa::isa, decode_row},
#include "subbyte/ops/dequantize/kernels.inc"
#undef SB_DECODE_KERNEL
  };
  return kKernels;
}

const DecodeKernel& select_decode_kernel(Isa isa) {
  for (const DecodeKernel& kernel : decode_kernels())
    if (kernel.isa <= isa) return kernel;
  return decode_kernels().back();
}

void dequantize(const DequantizeParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "dequantize");
  const DecodeRow decode_row = select_decode_kernel(active_isa()).decode_row;
  const int64_t stride_bytes = p.out_stride * dtype_bytes(p.out_dtype);
  parallel_for(p.w.n, max_i64(1, 16384 / p.w.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) decode_row(p.w, n, static_cast<uint8_t*>(p.out) + n * stride_bytes, p.out_dtype);
  });
}

}  // namespace subbyte
