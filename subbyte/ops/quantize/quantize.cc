#include "subbyte/ops/quantize/quantize.h"

#include <atomic>
#include <cmath>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/quantize/kernels.h"

namespace subbyte {
namespace {

int64_t rows_grain(int64_t k) { return max_i64(1, 16384 / max_i64(1, k)); }

void check_values(const QuantizeKernel& kernel, const QuantizeParams& p, const char* op) {
  std::atomic<int64_t> bad_row{-1};
  parallel_for(p.out.n, rows_grain(p.out.k), [&](int64_t begin, int64_t end) {
    if (const int64_t n = kernel.find_bad_row(p, begin, end); n >= 0) bad_row.store(n);
  });
  const int64_t n = bad_row.load();
  if (n < 0) return;
  for (int64_t k = 0; k < p.out.k; ++k) {
    const float v = load_float(p.w, p.w_dtype, n * p.w_stride + k);
    check_arg(std::isfinite(v), op, ": w[", n, ", ", k, "] is ", v, ", expected finite values");
  }
}

bool check_common(const QuantizeParams& p, const PackedMatrix& o, const char* op) {
  validate(o, op);
  check_arg(o.n <= 1 || p.w_stride >= o.k, op, ": row stride ", p.w_stride, " is below K = ", o.k);
  if (o.n == 0 || o.k == 0) return false;
  check_arg(p.w != nullptr && p.codes != nullptr, op, ": w or codes are missing");
  return true;
}

// The views whose codes, scales and zeros are the outputs.
QuantizeParams with_outputs(const QuantizeParams& p) {
  QuantizeParams q = p;
  q.out.codes = p.codes;
  q.out.scales = p.scales;
  q.out.zeros = p.zeros;
  return q;
}
QuantizeParams with_codes(const QuantizeParams& p) {
  QuantizeParams q = p;
  q.out.codes = p.codes;
  return q;
}

}  // namespace

Scheme scheme_from_name(std::string_view name) {
  if (name == "minmax") return Scheme::kMinMax;
  if (name == "absmax") return Scheme::kAbsMax;
  if (name == "absmean") return Scheme::kAbsMean;
  if (name == "midrise") return Scheme::kMidRise;
  if (name == "fan_in") return Scheme::kFanIn;
  throw std::invalid_argument(
      detail::concat("scheme '", name, "' is unknown, expected minmax, absmax, absmean, midrise or fan_in"));
}

Rounding rounding_from_name(std::string_view name) {
  if (name == "nearest") return Rounding::kNearest;
  if (name == "stochastic") return Rounding::kStochastic;
  throw std::invalid_argument(detail::concat("rounding '", name, "' is unknown, expected nearest or stochastic"));
}

bool scheme_takes(Scheme scheme, ZeroKind kind, const RowLayout& layout) {
  if (scheme == Scheme::kMinMax) return kind != ZeroKind::kFixed;
  if (scheme != Scheme::kMidRise && scheme != Scheme::kFanIn) return kind == ZeroKind::kFixed;
  if (kind != ZeroKind::kFixed) return kind == ZeroKind::kZeros;
  for (int i = 0; i < layout.segment_count; ++i)
    if (const Format f = layout.segments[i].format; 2 * format_fixed_zero(f) != float(format_levels(f) - 1)) return false;
  return true;
}

bool check_quantize_sizes(const QuantizeParams& p) {
  check_arg(scheme_takes(p.scheme, p.out.zero_kind, p.out.layout),
            "quantize: scheme minmax needs zeros or offsets, absmax and absmean need neither, midrise and fan_in need zeros "
            "(or neither for sign and ternary)");
  return check_common(p, with_outputs(p).out, "quantize");
}

bool check_encode_sizes(const QuantizeParams& p) { return check_common(p, with_codes(p).out, "encode"); }

std::span<const QuantizeKernel> quantize_kernels() {
  static constexpr QuantizeKernel kKernels[] = {
#define SB_QUANTIZE_KERNEL(name, isa, space) {name, Isa::isa, space::find_bad_row, space::choose_rows, space::encode_rows},
#include "subbyte/ops/quantize/kernels.inc"
#undef SB_QUANTIZE_KERNEL
  };
  return kKernels;
}

const QuantizeKernel& select_quantize_kernel(Isa isa) {
  for (const QuantizeKernel& kernel : quantize_kernels())
    if (kernel.isa <= isa) return kernel;
  return quantize_kernels().back();
}

void quantize(const QuantizeParams& params) {
  if (!check_quantize_sizes(params)) return;
  const QuantizeParams p = with_outputs(params);
  const QuantizeKernel& kernel = select_quantize_kernel(active_isa());
  validate_perm(p.out, "quantize");
  check_values(kernel, p, "quantize");
  std::atomic<bool> fits{true};
  parallel_for(p.out.n, rows_grain(p.out.k), [&](int64_t begin, int64_t end) {
    if (!kernel.choose_rows(p, begin, end)) fits.store(false);
    else kernel.encode_rows(p, begin, end);
  });
  check_arg(fits.load(), "quantize: a scale or offset overflows ", dtype_name(p.out.scale_dtype),
            ", expected weights within its range");
}

void encode(const QuantizeParams& params) {
  if (!check_encode_sizes(params)) return;
  const QuantizeParams p = with_codes(params);
  const QuantizeKernel& kernel = select_quantize_kernel(active_isa());
  validate_perm(p.out, "encode");
  check_values(kernel, p, "encode");
  parallel_for(p.out.n, rows_grain(p.out.k), [&](int64_t begin, int64_t end) { kernel.encode_rows(p, begin, end); });
}

}  // namespace subbyte
