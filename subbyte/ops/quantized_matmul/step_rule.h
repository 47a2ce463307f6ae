// The quantization of one value on a learned step: shared text of reference, CPU and CUDA code.
#pragma once
#include <cmath>

#include "subbyte/base/int_math.h"

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

}  // namespace subbyte
