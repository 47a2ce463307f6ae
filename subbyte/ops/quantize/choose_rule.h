// The rule of choose for one group: shared text of reference, CPU and CUDA kernels, so that they give the same bits.
#pragma once
#include <cmath>

#include "subbyte/formats/packed_matrix.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte {

// Scale before it is rounded to its dtype. lo, hi: smallest and largest value, of equal ones (-0 and +0) the first;
// magnitude: sum of |v| in double, in stored order; count: values of the group.
SB_HD float choose_scale(Scheme scheme, ZeroKind kind, Format f, float lo, float hi, double magnitude, int64_t count) {
  const float top = float(format_levels(f) - 1), fixed = format_fixed_zero(f);
  switch (scheme) {
    case Scheme::kMinMax:
      if (kind == ZeroKind::kZeros) {
        lo = lo > 0 ? 0 : lo;
        hi = hi < 0 ? 0 : hi;
      }
      return (hi - lo) / top;
    case Scheme::kAbsMax: {
      const float up = hi / (top - fixed), down = -lo / fixed;
      return up > down ? up : down;
    }
    case Scheme::kAbsMean: {
      const float mean = float(magnitude / double(count));
      if (f == Format::kSign) return 2 * mean;
      if (f == Format::kTernary) return mean;
      return 2 * mean / sqrtf(float((1 << (format_bits(f) - 1)) - 1));
    }
  }
  return 0;
}

// Zero or offset before it is rounded to its dtype; `stored` is the scale after it was rounded to its own.
SB_HD float choose_zero(ZeroKind kind, Format f, float lo, float stored) {
  if (kind == ZeroKind::kOffsets) return lo;
  if (kind == ZeroKind::kFixed || stored == 0) return 0;
  lo = lo > 0 ? 0 : lo;
  return fminf(fmaxf(rintf(-lo / stored), 0.0f), float(format_levels(f) - 1));
}

}  // namespace subbyte
