#include "subbyte/ops/ternary/ternary.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/base3.h"

namespace subbyte {
namespace {

// One greedy step over `count` residuals: trits out, residual updated, gamma returned.
float ternarize(float* residual, int64_t count, TernaryMethod method, float threshold, int8_t* trits) {
  double magnitude = 0;
  for (int64_t i = 0; i < count; ++i) magnitude += std::fabs(double(residual[i]));
  const double mean = count > 0 ? magnitude / double(count) : 0.0;
  float gamma = 0;
  if (method == TernaryMethod::kAbsMean) {
    gamma = float(mean);
    for (int64_t i = 0; i < count; ++i)
      trits[i] = gamma > 0 ? int8_t(std::fmin(std::fmax(std::rint(residual[i] / gamma), -1.0f), 1.0f)) : int8_t(0);
  } else {
    const double limit = double(threshold) * mean;
    double kept = 0;
    int64_t kept_count = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double a = std::fabs(double(residual[i]));
      const bool keep = a > limit;
      trits[i] = keep ? (residual[i] > 0 ? int8_t(1) : int8_t(-1)) : int8_t(0);
      kept += keep ? a : 0.0;
      kept_count += keep;
    }
    gamma = kept_count > 0 ? float(kept / double(kept_count)) : 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) residual[i] -= gamma * float(trits[i]);
  return gamma;
}

}  // namespace

TernaryMethod ternary_method_from_name(std::string_view name) {
  if (name == "threshold") return TernaryMethod::kThreshold;
  if (name == "absmean") return TernaryMethod::kAbsMean;
  throw std::invalid_argument(detail::concat("ternary method '", name, "' is unknown, expected threshold or absmean"));
}

void ternary_decompose(const TernaryDecomposeParams& p) {
  check_arg(p.n >= 0 && p.k >= 0, "ternary_decompose: w is [", p.n, ", ", p.k, "], expected sizes of at least 0");
  check_arg(p.terms >= 1, "ternary_decompose: ", p.terms, " terms, expected at least 1");
  check_arg(std::isfinite(p.threshold) && p.threshold >= 0, "ternary_decompose: threshold is ", p.threshold,
            ", expected a finite number of at least 0");
  check_arg(p.n <= 1 || p.w_stride >= p.k, "ternary_decompose: row stride ", p.w_stride, " is below K = ", p.k);
  if (p.n == 0) return;
  check_arg(p.gamma != nullptr && (p.k == 0 || (p.w != nullptr && p.trits != nullptr)),
            "ternary_decompose: w, trits or gamma are missing");
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t k = 0; k < p.k; ++k) {
      const float v = load_float(p.w, p.dtype, n * p.w_stride + k);
      check_arg(std::isfinite(v), "ternary_decompose: w[", n, ", ", k, "] is ", v, ", expected finite values");
    }
  auto decompose = [&p](int64_t row_begin, int64_t row_end) {  // as one unit: one gamma a term
    const int64_t count = (row_end - row_begin) * p.k;
    std::vector<float> residual(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i)
      residual[size_t(i)] = load_float(p.w, p.dtype, (row_begin + i / p.k) * p.w_stride + i % p.k);
    for (int64_t t = 0; t < p.terms; ++t) {
      int8_t* trits = p.trits + (t * p.n + row_begin) * p.k;
      const float gamma = ternarize(residual.data(), count, p.method, p.threshold, trits);
      for (int64_t n = row_begin; n < row_end; ++n) p.gamma[t * p.n + n] = gamma;
    }
  };
  if (p.scale == TernaryScale::kPerMatrix) return decompose(0, p.n);
  parallel_for(p.n, max_i64(1, 16384 / max_i64(1, p.k)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) decompose(n, n + 1);
  });
}

void pack_base3(const int8_t* trits, int64_t count, uint8_t* bytes) {
  check_arg(count >= 0, "pack_base3: ", count, " values, expected at least 0");
  check_arg(count == 0 || (trits != nullptr && bytes != nullptr), "pack_base3: trits or bytes are missing");
  for (int64_t i = 0; i < count; ++i)
    check_arg(trits[i] >= -1 && trits[i] <= 1, "pack_base3: value ", int(trits[i]), " at position ", i,
              ", expected -1, 0 or 1");
  for (int64_t j = 0; j < base3_bytes(count); ++j)
    bytes[j] = base3_encode(trits + j * kTritsPerByte, min_i64(kTritsPerByte, count - j * kTritsPerByte));
}

void unpack_base3(const uint8_t* bytes, int64_t bytes_count, int8_t* trits, int64_t count) {
  check_arg(count >= 0 && bytes_count == base3_bytes(count), "unpack_base3: ", bytes_count, " bytes for ", count,
            " values, expected ", base3_bytes(max_i64(count, 0)));
  check_arg(count == 0 || (trits != nullptr && bytes != nullptr), "unpack_base3: trits or bytes are missing");
  for (int64_t j = 0; j < bytes_count; ++j)
    check_arg(bytes[j] < kBase3Levels, "unpack_base3: byte ", int(bytes[j]), " at position ", j, ", expected below ",
              int(kBase3Levels));
  for (int64_t j = 0; j < bytes_count; ++j)
    base3_decode(bytes[j], trits + j * kTritsPerByte, min_i64(kTritsPerByte, count - j * kTritsPerByte));
}

}  // namespace subbyte
