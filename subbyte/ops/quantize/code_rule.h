// The rounding rule of encode for one value: shared text of reference, CPU and CUDA kernels, so that they give the same bits.
#pragma once
#include <cmath>

#include "subbyte/base/philox.h"
#include "subbyte/formats/packed_matrix.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte {

// `word` is the value's random word; nearest rounding ignores it. Total: NaN gives code 0, an infinity the end of the range,
// so that a device, which cannot refuse such values, still does the same everywhere.
SB_HD uint32_t code_of_word(float v, float scale, float zero, ZeroKind kind, Format f, Rounding rounding, uint32_t word) {
  const float top = float(format_levels(f) - 1);
  if (scale == 0.0f) return kind == ZeroKind::kOffsets ? 0u : uint32_t(fminf(fmaxf(rintf(zero), 0.0f), top));
#if defined(__CUDA_ARCH__)
  const float t = kind == ZeroKind::kOffsets ? __fdiv_rn(__fsub_rn(v, zero), scale) : __fadd_rn(__fdiv_rn(v, scale), zero);
#else
  float t;
  if (kind == ZeroKind::kOffsets) {
    t = (v - zero) / scale;
  } else {
    t = v / scale;
    t = t + zero;
  }
#endif
  float r;
  if (rounding == Rounding::kStochastic) {
    const float low = floorf(t);
    r = low + (uniform24(word) < t - low ? 1.0f : 0.0f);
  } else if (f == Format::kSign && kind == ZeroKind::kFixed) {
    r = t >= 0.5f ? 1.0f : 0.0f;
  } else {
    r = rintf(t);
  }
  return uint32_t(fminf(fmaxf(r, 0.0f), top));
}

// `element` is (first_row + n) * K + stored column.
SB_HD uint32_t code_of(float v, float scale, float zero, ZeroKind kind, Format f, Rounding rounding, uint64_t seed,
                       uint64_t offset, uint64_t element) {
  return code_of_word(v, scale, zero, kind, f, rounding,
                      rounding == Rounding::kStochastic ? philox_word(seed, offset, element) : 0u);
}

}  // namespace subbyte
