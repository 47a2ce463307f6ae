// The last step of the binary products, the same on every path: an exact integer, scaled twice, shifted, rounded once.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

// scale, second_scale: one float (one double where dtype is float64) or null for 1; bias: element i of an array of dtype, or
// null.
SB_HD void store_scaled_sum(void* y, DType dtype, int64_t at, int64_t sum, bool nan, const void* scale,
                            const void* second_scale, const void* bias, int64_t i) {
  if (dtype == DType::kF64) {
    double v = double(sum) * (scale != nullptr ? *static_cast<const double*>(scale) : 1.0);
    if (second_scale != nullptr) v *= *static_cast<const double*>(second_scale);
    if (bias != nullptr) v += static_cast<const double*>(bias)[i];
    static_cast<double*>(y)[at] = nan ? std::bit_cast<double>(uint64_t(0x7ff8000000000000)) : v;
    return;
  }
  float v = float(sum) * (scale != nullptr ? *static_cast<const float*>(scale) : 1.0f);
  if (second_scale != nullptr) v *= *static_cast<const float*>(second_scale);
  if (bias != nullptr) v += load_float(bias, dtype, i);
  store_float(y, dtype, at, nan ? std::bit_cast<float>(uint32_t(0x7fc00000)) : v);
}

// store_scaled_sum for float32 with what does not change kept at hand.
class ScaledSum {
 public:
  SB_MEMBER_HD ScaledSum(const void* scale, const void* second_scale, const void* bias)
      : scale_(scale != nullptr ? *static_cast<const float*>(scale) : 1.0f),
        second_scale_(second_scale != nullptr ? *static_cast<const float*>(second_scale) : 1.0f),
        bias_(static_cast<const float*>(bias)) {}
  SB_MEMBER_HD float of(int64_t sum, bool nan, int64_t i) const {
    float v = float(sum) * scale_ * second_scale_;
    if (bias_ != nullptr) v += bias_[i];
    return nan ? std::bit_cast<float>(uint32_t(0x7fc00000)) : v;
  }

 private:
  float scale_, second_scale_;
  const float* bias_;
};

// Whether element i counts as +1; sets `nan` if it is none. Float64 is not rounded first: a tiny negative number is negative.
SB_HD bool is_plus(const void* v, DType dtype, int64_t i, bool& nan) {
  if (dtype == DType::kF64) {
    const double d = static_cast<const double*>(v)[i];
    nan = nan || d != d;
    return d >= 0;
  }
  const float f = load_float(v, dtype, i);
  nan = nan || f != f;
  return f >= 0;
}

}  // namespace subbyte
