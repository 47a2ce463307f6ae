#include "subbyte/ops/ternary/ternary.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/base3.h"

namespace subbyte {
namespace {

// Sums run over this many interleaved double accumulators, which the compiler keeps in vector registers.
constexpr int64_t kLanes = 8;

double folded(const double* lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

double sum_of_magnitudes(const float* r, int64_t k) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += double(std::fabs(r[i + j]));
  for (; i < k; ++i) lanes[i % kLanes] += double(std::fabs(r[i]));
  return folded(lanes);
}

struct Kept {
  double magnitude = 0;
  int64_t count = 0;
};

// Trits of a row under a mean magnitude, and what the threshold keeps of it.
Kept write_trits(const float* r, int64_t k, TernaryMethod method, double mean, float threshold, int8_t* trits) {
  if (method == TernaryMethod::kAbsMean) {
    // clamp(rint(q), -1, 1) with ties to even is 0 up to |q| = 1/2.
    const float gamma = float(mean);
    for (int64_t i = 0; i < k; ++i) {
      const float q = gamma > 0 ? r[i] / gamma : 0.0f;
      trits[i] = int8_t(int(q > 0.5f) - int(q < -0.5f));
    }
    return {};
  }
  const double limit = double(threshold) * mean;
  double lanes[kLanes] = {};
  Kept kept;
  for (int64_t i = 0; i < k; ++i) {
    const double a = double(std::fabs(r[i]));
    const bool keep = a > limit;
    trits[i] = int8_t(int(keep && r[i] > 0) - int(keep && r[i] < 0));
    lanes[i % kLanes] += keep ? a : 0.0;
    kept.count += keep;
  }
  kept.magnitude = folded(lanes);
  return kept;
}

float scale_of(TernaryMethod method, double mean, Kept kept) {
  if (method == TernaryMethod::kAbsMean) return float(mean);
  return kept.count > 0 ? float(kept.magnitude / double(kept.count)) : 0.0f;
}

void subtract(float* r, int64_t k, float gamma, const int8_t* trits) {
  for (int64_t i = 0; i < k; ++i) r[i] -= gamma * float(trits[i]);
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
  const int64_t grain = max_i64(1, 16384 / max_i64(1, p.k));
  auto read_row = [&p](int64_t n, float* row) {
    for (int64_t k = 0; k < p.k; ++k) row[k] = load_float(p.w, p.dtype, n * p.w_stride + k);
  };
  auto for_rows = [&](auto&& f) {
    parallel_for(p.n, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(p.k));
      for (int64_t n = begin; n < end; ++n) f(n, row.data());
    });
  };
  // Finite values have a finite sum in double, so one number a row says whether to look for a culprit.
  std::vector<double> magnitudes(static_cast<size_t>(p.n));
  for_rows([&](int64_t n, float* row) {
    read_row(n, row);
    magnitudes[size_t(n)] = sum_of_magnitudes(row, p.k);
  });
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t k = 0; k < p.k && !std::isfinite(magnitudes[size_t(n)]); ++k) {
      const float v = load_float(p.w, p.dtype, n * p.w_stride + k);
      check_arg(std::isfinite(v), "ternary_decompose: w[", n, ", ", k, "] is ", v, ", expected finite values");
    }
  auto trits_of = [&p](int64_t term, int64_t n) { return p.trits + (term * p.n + n) * p.k; };

  if (p.scale == TernaryScale::kPerRow) {
    for_rows([&](int64_t n, float* row) {
      read_row(n, row);
      for (int64_t t = 0; t < p.terms; ++t) {
        const double sum = t == 0 ? magnitudes[size_t(n)] : sum_of_magnitudes(row, p.k);
        const double mean = p.k > 0 ? sum / double(p.k) : 0.0;
        const Kept kept = write_trits(row, p.k, p.method, mean, p.threshold, trits_of(t, n));
        p.gamma[t * p.n + n] = scale_of(p.method, mean, kept);
        subtract(row, p.k, p.gamma[t * p.n + n], trits_of(t, n));
      }
    });
    return;
  }
  // One scale for all rows: rows are read again for each term, and their residual formed again, instead of a kept copy of w.
  std::vector<Kept> kept(static_cast<size_t>(p.n));
  std::vector<float> gammas;
  auto residual_of = [&](int64_t n, float* row) {
    read_row(n, row);
    for (size_t t = 0; t < gammas.size(); ++t) subtract(row, p.k, gammas[t], trits_of(int64_t(t), n));
  };
  for (int64_t t = 0; t < p.terms; ++t) {
    if (t > 0)
      for_rows([&](int64_t n, float* row) {
        residual_of(n, row);
        magnitudes[size_t(n)] = sum_of_magnitudes(row, p.k);
      });
    double sum = 0;
    for (int64_t n = 0; n < p.n; ++n) sum += magnitudes[size_t(n)];
    const double mean = p.k > 0 ? sum / (double(p.n) * double(p.k)) : 0.0;
    for_rows([&](int64_t n, float* row) {
      residual_of(n, row);
      kept[size_t(n)] = write_trits(row, p.k, p.method, mean, p.threshold, trits_of(t, n));
    });
    Kept all;
    for (const Kept& of_row : kept) {
      all.magnitude += of_row.magnitude;
      all.count += of_row.count;
    }
    gammas.push_back(scale_of(p.method, mean, all));
    for (int64_t n = 0; n < p.n; ++n) p.gamma[t * p.n + n] = gammas.back();
  }
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
