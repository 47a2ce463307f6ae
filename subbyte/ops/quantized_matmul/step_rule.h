// The quantization of one value on a learned step, and what becomes of a sum: shared text of reference, CPU and CUDA code.
#pragma once
#include <cmath>

#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

namespace subbyte {

// A NaN gives 0; the caller marks its row.
SB_HD int step_code(float v, float step, int bits) {
  const float hi = float((1 << (bits - 1)) - 1), lo = -hi - 1.0f;
#if defined(__CUDA_ARCH__)
  const float t = __fdiv_rn(v, step);
#else
  const float t = v / step;
#endif
  return t != t ? 0 : int(fminf(fmaxf(rintf(t), lo), hi));
}

// Element `at` of y from the integer sum of column n. Compiled without contraction on every device.
SB_HD void store_scaled(const QuantizedMatmulParams& p, int64_t at, int64_t n, int32_t sum, float sx, float sz, bool nan) {
  if (p.dtype == DType::kF64) {
    double v = double(sum) * double(sx) * double(sz);
    if (p.bias != nullptr) v += static_cast<const double*>(p.bias)[n];
    static_cast<double*>(p.y)[at] = nan ? double(NAN) : v;
  } else {
    float v = float(sum) * sx * sz;
    if (p.bias != nullptr) v += load_float(p.bias, p.dtype, n);
    store_float(p.y, p.dtype, at, nan ? NAN : v);
  }
}

}  // namespace subbyte
