// The definition of linear_a8: quantize a row of x, exact integer sums by group, float part in double.
#include <cmath>
#include <limits>
#include <vector>

#include "subbyte/ops/linear_a8/linear_a8.h"

namespace subbyte::reference {

void linear_a8(const LinearA8Params& p) {
  const PackedMatrix& w = p.w;
  const int64_t groups = w.groups();
  std::vector<int> xq(static_cast<size_t>(w.k));
  std::vector<float> xs(static_cast<size_t>(groups));
  for (int64_t m = 0; m < p.m; ++m) {
    auto x_at = [&](int64_t k) { return load_float(p.x, p.dtype, m * p.x_stride + (w.perm != nullptr ? w.perm[k] : k)); };
    bool finite = true;
    for (int64_t k = 0; k < w.k; ++k) finite = finite && std::isfinite(x_at(k));
    for (int64_t g = 0; g < groups && finite; ++g) {
      const int64_t begin = g * w.group_size, end = min_i64(begin + w.group_size, w.k);
      const bool by_row = p.x_scale == ActivationScale::kRow;
      float a = 0;
      for (int64_t k = by_row ? 0 : begin; k < (by_row ? w.k : end); ++k) a = std::fmax(a, std::fabs(x_at(k)));
      if (a < kLinearA8SmallestX) a = 0;
      xs[size_t(g)] = a / 127.0f;
      const float inverse = a > 0 ? 127.0f / a : 0.0f;
      for (int64_t k = begin; k < end; ++k)
        xq[size_t(k)] = int(std::fmin(std::fmax(std::rint(x_at(k) * inverse), -127.0f), 127.0f));
    }
    for (int64_t n = 0; n < w.n; ++n) {
      double sum = p.bias != nullptr ? load_double(p.bias, p.dtype, n) : 0.0;
      for (int64_t g = 0; g < groups && finite; ++g) {
        const int64_t begin = g * w.group_size, end = min_i64(begin + w.group_size, w.k), i = n * groups + g;
        const Format f = segment_of(w.layout, begin).format;
        const int middle = format_levels(f) / 2;
        int64_t d = 0, e = 0;
        for (int64_t k = begin; k < end; ++k) {
          d += int64_t(xq[size_t(k)]) * (int(packed_code(w, n, k)) - middle);
          e += xq[size_t(k)];
        }
        const double s = load_float(w.scales, w.scale_dtype, i);
        const double at_middle = affine_value(float(middle), float(s), group_zero(w, f, i), w.zero_kind);
        sum += double(xs[size_t(g)]) * (s * double(d) + at_middle * double(e));
      }
      store_double(p.y, p.dtype, m * p.y_stride + n, finite ? sum : std::numeric_limits<double>::quiet_NaN());
    }
  }
}

}  // namespace subbyte::reference
