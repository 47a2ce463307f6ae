// The rule of choose for one group: shared text of reference, CPU and CUDA kernels, so that they give the same bits.
#pragma once
#include <cmath>

#include "subbyte/formats/packed_matrix.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte {

// Whether choose_scale wants `magnitude`; it then looks at neither lo nor hi.
SB_HD constexpr bool wants_magnitude(Scheme scheme) { return scheme == Scheme::kAbsMean || scheme == Scheme::kMidRise; }

// Width of a level over mean|v| that leaves the least squared error on normally distributed values (Max 1960).
SB_HD constexpr float mid_rise_step(Format f) {
  if (format_levels(f) == 3) return 1.534f;
  switch (format_bits(f)) {
    case 1: return 2.0f;
    case 2: return 1.248f;
    case 3: return 0.7345f;
    case 4: return 0.4201f;
    case 5: return 0.2358f;
    case 6: return 0.1304f;
    case 7: return 0.0713f;
    default: return 0.0386f;
  }
}
// R sqrt(K).
SB_HD constexpr float fan_in_reach(Format f) {
  if (format_levels(f) == 3) return 3.0f;
  const int bits = format_bits(f);
  return bits == 1 ? 2.0f : bits < 4 ? 1.0f + 0.5f * float(bits) : 2.0f + 0.25f * float(bits);
}

// Scale before it is rounded to its dtype; a zero is +0. lo, hi: smallest and largest value, either zero of equal ones;
// magnitude: sum of |v| in double, in stored order; count: values of the group; k: columns of the matrix.
SB_HD float choose_scale(Scheme scheme, ZeroKind kind, Format f, float lo, float hi, double magnitude, int64_t count,
                         int64_t k) {
  const float top = float(format_levels(f) - 1), fixed = format_fixed_zero(f);
  lo += 0.0f;  // -0 becomes +0, so that the order in which a kernel meets the two cannot show
  hi += 0.0f;
  switch (scheme) {
    case Scheme::kMinMax: {
      if (kind == ZeroKind::kZeros) {
        lo = lo > 0 ? 0 : lo;
        hi = hi < 0 ? 0 : hi;
      }
      const float scale = (hi - lo) / top;
      if (kind != ZeroKind::kOffsets) return scale;
      // Weights that come from float16 scales lie on a grid that the division can miss by one unit in the last place.
      const float near = f16_to_float(float_to_f16(scale)), reached = near * top;
      return reached + lo == hi ? near : scale;
    }
    case Scheme::kAbsMax: {
      const float up = hi / (top - fixed), down = -lo / fixed;
      return (up > down ? up : down) + 0.0f;
    }
    case Scheme::kAbsMean: {
      const float mean = float(magnitude / double(count));
      if (f == Format::kSign) return 2 * mean;
      if (f == Format::kTernary) return mean;
      return 2 * mean / sqrtf(float((1 << (format_bits(f) - 1)) - 1));
    }
    case Scheme::kMidRise: return mid_rise_step(f) * float(magnitude / double(count));
    case Scheme::kFanIn: return float(double(2.0f * fan_in_reach(f)) / (double(top + 1.0f) * sqrt(double(k))));
  }
  return 0;
}

// Zero or offset before it is rounded to its dtype; `stored` is the scale after it was rounded to its own.
SB_HD float choose_zero(Scheme scheme, ZeroKind kind, Format f, float lo, float stored) {
  if (kind == ZeroKind::kZeros && scheme != Scheme::kMinMax) return float(format_levels(f) - 1) * 0.5f;
  if (kind == ZeroKind::kOffsets) return lo + 0.0f;
  if (kind == ZeroKind::kFixed || stored == 0) return 0;
  lo = lo > 0 ? 0 : lo;
  return fminf(fmaxf(rintf(-lo / stored), 0.0f), float(format_levels(f) - 1)) + 0.0f;
}

}  // namespace subbyte
