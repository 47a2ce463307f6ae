// subbyte::affine_state, affine_adamw_, widen, regrid_ (affine_update.h). Composed of ATen and of our ops: parameters of groups
// are a hundredth of a weight, and what is as large as the weight is handled a block of rows at a time.
#include "subbyte_torch/ops/affine_update.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr int64_t kBlockElems = int64_t(1) << 20;
constexpr double kTooLarge = 0x1p63, kSmallestScale = 0x1p-120, kLargestScale = 0x1p120;  // as packed_update's
constexpr int64_t kFine = 64;                                                             // cells a level of a wide grid
constexpr int64_t kResidualBits = 8, kSpan = 1 << kResidualBits, kMiddle = 1 << 15;

constexpr const char* kStateSchema = "affine_state(" SB_PACKED_SCHEMA ") -> Tensor";
constexpr const char* kAdamWSchema =
    "affine_adamw_(Tensor codes, Tensor(a!) scales, Tensor(b!)? zeros, Tensor(c!)? offsets, Tensor? perm, str format, int "
    "in_features, int group_size, Tensor grad, Tensor(d!) state, float lr, float beta1=0.9, float beta2=0.999, float eps=1e-8, "
    "float bias_correction1=1.0, float bias_correction2=1.0, bool maximize=False, Tensor? grad_factor=None, Tensor? "
    "numbers=None) -> ()";
constexpr const char* kWidenSchema =
    "widen(" SB_PACKED_SCHEMA ") -> (Tensor codes, Tensor residual, Tensor scales, Tensor zeros)";
constexpr const char* kRegridSchema =
    "regrid_(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, Tensor(d!)? offsets, Tensor? perm, str format, int "
    "in_features, int group_size, Tensor wide_codes, Tensor wide_residual, str scheme=\"minmax\", int seed=0, int offset=0) -> "
    "()";

// A property of every stored column's format, float32 [K].
template <class Property>
at::Tensor by_column(const char* op, std::string_view format, int64_t k, const at::TensorOptions& options, Property property) {
  const RowLayout layout = layout_of(op, format, k);
  at::Tensor out = at::empty({k}, options.dtype(at::kFloat));
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    out.narrow(0, s.k_begin, s.k_count).fill_(double(property(s.format)));
  }
  return out;
}
at::Tensor column_levels(const char* op, std::string_view format, int64_t k, const at::TensorOptions& options) {
  return by_column(op, format, k, options, format_levels);
}
// [K] -> [G]. A group lies in one segment.
at::Tensor first_of_group(const at::Tensor& columns, int64_t group_size) {
  return columns.slice(0, 0, std::nullopt, std::min(group_size, std::max<int64_t>(1, columns.size(0))));
}
at::Tensor group_levels(const char* op, std::string_view format, int64_t k, int64_t group_size,
                        const at::TensorOptions& options) {
  return first_of_group(column_levels(op, format, k, options), group_size);
}
at::Tensor fixed_zero_of_groups(const char* op, std::string_view format, int64_t k, int64_t group_size,
                                const at::TensorOptions& options) {
  return first_of_group(by_column(op, format, k, options, format_fixed_zero), group_size);
}

at::Tensor usable_groups(const at::Tensor& scales) {
  const at::Tensor size = scales.abs();
  return size.ge(kSmallestScale).logical_and(size.lt(kLargestScale));
}

OptionalTensor rows_of_part(const OptionalTensor& part, int64_t begin, int64_t count) {
  return given(part) ? OptionalTensor(part->narrow(0, begin, count)) : std::nullopt;
}

int64_t state_planes(const PackedArgs& w) {
  const int64_t parts = given(w.zeros) || given(w.offsets) ? 2 : 1;
  return parts * (w.scales.scalar_type() == at::kFloat ? 2 : 3);
}

// Zeros and offsets have the scales' type, in everything that makes them; another one is refused here alone.
void check_trained(const char* op, const PackedArgs& w) {
  check_packed(op, w);
  for (const OptionalTensor* part : {&w.zeros, &w.offsets})
    TORCH_CHECK_VALUE(!given(*part) || (*part)->scalar_type() == w.scales.scalar_type(), op, ": ",
                      part == &w.zeros ? "zeros" : "offsets", " is ", (*part)->scalar_type(), ", expected the scales' ",
                      w.scales.scalar_type());
}

at::Tensor state_shape(SB_PACKED_PARAMS) {
  const PackedArgs w{SB_PACKED};
  check_trained("affine_state", w);
  return at::empty_symint({codes.sym_size(0), scales.sym_size(1), state_planes(w)}, scales.options().dtype(at::kFloat));
}

at::Tensor state_of(SB_PACKED_PARAMS) {
  at::Tensor state = state_shape(SB_PACKED).zero_();
  if (scales.scalar_type() != at::kFloat) {
    const bool shifted = given(zeros) || given(offsets);
    state.select(2, shifted ? 4 : 2).copy_(scales);
    if (shifted) state.select(2, 5).copy_(given(zeros) ? *zeros : *offsets);
  }
  return state;
}

// A parameter in float32: what the state holds of it, unless the parameter was written since.
at::Tensor exact_value(const at::Tensor& part, const at::Tensor& state, int64_t plane) {
  if (part.scalar_type() == at::kFloat) return part;
  const at::Tensor kept = state.select(2, plane);
  return at::where(kept.to(part.scalar_type()).eq(part), kept, part.to(at::kFloat));
}

void store(const at::Tensor& part, const at::Tensor& value, const at::Tensor& state, int64_t plane) {
  if (part.scalar_type() != at::kFloat) state.select(2, plane).copy_(value);
  part.copy_(value);
}

struct Rates {
  double lr, beta1, beta2, eps, correction1, correction2;
  at::Tensor rate, root;  // lr / correction1 and sqrt(correction2) in memory, or undefined

  // rate * m / (sqrt(v / correction2) + eps), after both took g where `active` says so.
  at::Tensor step(const at::Tensor& g, const at::Tensor& active, const at::Tensor& m, const at::Tensor& v) const {
    m.copy_(at::where(active, m + (1 - beta1) * (g - m), m));
    v.copy_(at::where(active, v * beta2 + (1 - beta2) * (g * g), v));
    const at::Tensor denominator = (rate.defined() ? v.sqrt() / root : v.sqrt() / std::sqrt(correction2)) + eps;
    const at::Tensor r = at::where(active.logical_and(m.ne(0)), m / denominator, at::zeros({}, m.options()));
    return rate.defined() ? r * rate : r * (lr / correction1);
  }
};

#define SB_ADAMW_PARAMS                                                                                                 \
  SB_PACKED_PARAMS, const at::Tensor &grad, const at::Tensor &state, double lr, double beta1, double beta2, double eps, \
      double bias_correction1, double bias_correction2, bool maximize, const OptionalTensor &grad_factor,               \
      const OptionalTensor &numbers
#define SB_ADAMW \
  SB_PACKED, grad, state, lr, beta1, beta2, eps, bias_correction1, bias_correction2, maximize, grad_factor, numbers

void adamw_shape(SB_ADAMW_PARAMS) {
  constexpr const char* op = "affine_adamw_";
  const PackedArgs w{SB_PACKED};
  check_trained(op, w);
  const c10::SymInt n = codes.sym_size(0), groups = scales.sym_size(1);
  const int64_t planes = state_planes(w);
  TORCH_CHECK_VALUE(grad.layout() == at::kStrided && grad.dim() == 2 && grad.sym_size(0) == n &&
                        grad.sym_size(1) == in_features && grad.is_floating_point(),
                    op, ": grad is ", grad.scalar_type(), " ", grad.layout(), " ", grad.sym_sizes(),
                    ", expected dense floating point [N, K] = [", n, ", ", in_features, "]");
  TORCH_CHECK_VALUE(state.scalar_type() == at::kFloat && state.dim() == 3 && state.sym_size(0) == n &&
                        state.sym_size(1) == groups && state.sym_size(2) == planes,
                    op, ": state is ", state.scalar_type(), " ", state.sym_sizes(), ", expected float32 [", n, ", ", groups,
                    ", ", planes, "]");
  for (const auto& [name, value] : {std::pair("lr", lr), std::pair("eps", eps)})
    TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), op, ": ", name, " is ", value,
                      ", expected a finite number of at least 0");
  for (const auto& [name, value] : {std::pair("beta1", beta1), std::pair("beta2", beta2)})
    TORCH_CHECK_VALUE(value >= 0 && value < 1, op, ": ", name, " is ", value, ", expected 0 <= ", name, " < 1");
  TORCH_CHECK_VALUE(bias_correction1 > 0 && bias_correction2 > 0, op, ": the bias corrections are ", bias_correction1, " and ",
                    bias_correction2, ", expected numbers above 0");
  TORCH_CHECK_VALUE(!given(grad_factor) || (grad_factor->scalar_type() == at::kFloat && grad_factor->sym_numel() == 1), op,
                    ": grad_factor is not one float32");
  TORCH_CHECK_VALUE(!given(numbers) || (numbers->scalar_type() == at::kFloat && numbers->sym_numel() == 3), op,
                    ": numbers is not three float32");
  check_device(op, "grad", grad, "codes", codes);
  check_device(op, "state", state, "codes", codes);
}

void adamw_(SB_ADAMW_PARAMS) {
  constexpr const char* op = "affine_adamw_";
  adamw_shape(SB_ADAMW);
  const int64_t n = codes.size(0), k = in_features;
  if (n == 0 || k == 0) return;

  const bool shifted = given(zeros) || given(offsets);
  Rates rates{lr, beta1, beta2, eps, bias_correction1, bias_correction2, {}, {}};
  if (given(numbers)) {
    const at::Tensor flat = numbers->reshape({3});
    rates.rate = flat[0] / flat[1];
    rates.root = flat[2].sqrt();
  }
  const at::Tensor per_code = 2.0 / (group_levels(op, format, k, group_size, scales.options()) - 1);
  const int64_t rows = std::max<int64_t>(1, kBlockElems / k);
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    const at::Tensor part_codes = codes.narrow(0, begin, count), part_scales = scales.narrow(0, begin, count),
                     part_state = state.narrow(0, begin, count);
    const OptionalTensor part_zeros = rows_of_part(zeros, begin, count), part_offsets = rows_of_part(offsets, begin, count);
    at::Tensor g = grad.narrow(0, begin, count).to(at::kFloat);
    if (given(grad_factor)) g = g * grad_factor->reshape({});
    if (maximize) g = -g;
    const at::Tensor used = g.abs().lt(kTooLarge);
    g = at::where(used, g, at::zeros({}, g.options()));
    const at::Tensor stored_used = given(perm) ? used.index_select(1, *perm) : used;
    const at::Tensor active =
        group_sums(stored_used.to(at::kFloat), k, group_size).gt(0).logical_and(usable_groups(part_scales));
    const AffineSums sums = affine_sums(
        g, {part_codes, part_scales, part_zeros, part_offsets, perm, format, in_features, group_size}, true, shifted);
    const at::Tensor s = exact_value(part_scales, part_state, shifted ? 4 : 2);
    const at::Tensor asked = rates.step(sums.scales, active, part_state.select(2, 0), part_state.select(2, 1)) * per_code;
    const at::Tensor half = s.abs() * 0.5;
    if (shifted) {
      const OptionalTensor& part = given(zeros) ? part_zeros : part_offsets;
      const at::Tensor old = exact_value(*part, part_state, 5);
      const at::Tensor step = rates.step(sums.shift, active, part_state.select(2, 2), part_state.select(2, 3));
      const at::Tensor moved = given(zeros) ? old + step / s : old - step;
      store(*part, at::where(active, moved, old), part_state, 5);
    }
    store(part_scales, at::where(active, s - at::minimum(at::maximum(asked, -half), half), s), part_state, shifted ? 4 : 2);
  }
}

// ---- a wide grid

// The fine cell of code 0 in every column, int32 [K]: codes lie in the middle of the 2^16 cells.
at::Tensor first_cell(const char* op, std::string_view format, int64_t k, const at::TensorOptions& options) {
  return (kMiddle - kFine / 2 * column_levels(op, format, k, options)).to(at::kInt);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> widen_shape(SB_PACKED_PARAMS) {
  check_packed("widen", {SB_PACKED});
  const c10::SymInt n = codes.sym_size(0);
  const at::TensorOptions options = scales.options().dtype(at::kFloat);
  return {at::empty_symint({n, in_features}, codes.options()), at::empty_symint({n, in_features}, codes.options()),
          at::empty_symint(scales.sym_sizes(), options), at::empty_symint(scales.sym_sizes(), options)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> widen_impl(SB_PACKED_PARAMS) {
  constexpr const char* op = "widen";
  check_packed(op, {SB_PACKED});
  const int64_t k = in_features;
  const at::Tensor cell = ops::unpack(codes, format, k).to(at::kInt) * kFine + first_cell(op, format, k, codes.options());
  const at::Tensor s = scales.to(at::kFloat), levels = group_levels(op, format, k, group_size, scales.options());
  at::Tensor zero;
  if (given(zeros)) zero = zeros->to(at::kFloat);
  else if (given(offsets)) zero = at::where(usable_groups(s), -offsets->to(at::kFloat) / s, at::zeros({}, s.options()));
  else zero = fixed_zero_of_groups(op, format, k, group_size, s.options()).expand_as(s);
  // The fine code that means 0 is wide_zero * 2^8 + (2^8 - 1) / 2 (packed_update.h).
  const at::Tensor wide_zero =
      (zero * double(kFine) + (double(kMiddle) - kFine / 2 * levels) - (kSpan - 1) * 0.5) / double(kSpan);
  return {cell.bitwise_right_shift(kResidualBits).to(at::kByte), cell.bitwise_and(kSpan - 1).to(at::kByte),
          s * (double(kSpan) / kFine), wide_zero};
}

#define SB_REGRID_PARAMS                                                                                                  \
  SB_PACKED_PARAMS, const at::Tensor &wide_codes, const at::Tensor &wide_residual, std::string_view scheme, int64_t seed, \
      int64_t offset
#define SB_REGRID SB_PACKED, wide_codes, wide_residual, scheme, seed, offset

void regrid_shape(SB_REGRID_PARAMS) {
  constexpr const char* op = "regrid_";
  check_trained(op, {SB_PACKED});
  for (const at::Tensor* t : {&wide_codes, &wide_residual}) {
    const char* name = t == &wide_codes ? "wide_codes" : "wide_residual";
    TORCH_CHECK_VALUE(
        t->scalar_type() == at::kByte && t->dim() == 2 && t->sym_size(0) == codes.sym_size(0) && t->sym_size(1) == in_features,
        op, ": ", name, " is ", t->scalar_type(), " ", t->sym_sizes(), ", expected uint8 [", codes.sym_size(0), ", ",
        in_features, "]");
    check_device(op, name, *t, "codes", codes);
  }
}

void regrid_impl(SB_REGRID_PARAMS) {
  constexpr const char* op = "regrid_";
  regrid_shape(SB_REGRID);
  const int64_t n = codes.size(0), k = in_features;
  const char* zero_kind = given(zeros) ? "zeros" : given(offsets) ? "offsets" : "fixed";
  if (n == 0 || k == 0) return;
  const at::Tensor group = at::arange(k, codes.options().dtype(at::kLong)).floor_divide(group_size);
  auto spread = [&](const at::Tensor& part) { return part.to(at::kFloat).index_select(1, group); };
  const int64_t rows = std::max<int64_t>(1, kBlockElems / k);
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    const at::Tensor cell = wide_codes.narrow(0, begin, count).to(at::kInt) * kSpan + wide_residual.narrow(0, begin, count) -
                            first_cell(op, format, k, codes.options());
    const at::Tensor q = cell.to(at::kFloat) / double(kFine);
    const at::Tensor s = spread(scales.narrow(0, begin, count));
    at::Tensor value;
    if (given(offsets)) value = s * q + spread(offsets->narrow(0, begin, count));
    else if (given(zeros)) value = s * (q - spread(zeros->narrow(0, begin, count)));
    else value = s * (q - by_column(op, format, k, s.options(), format_fixed_zero));
    if (given(perm)) value = at::empty_like(value).index_copy_(1, perm->to(at::kLong), value);
    // One seed a block: the random bits of an element are counted from the block's first row.
    const auto [new_codes, new_scales, third] =
        ops::quantize(value, format, group_size, scheme, zero_kind, scales.scalar_type(), perm, "stochastic",
                      int64_t(uint64_t(seed) + uint64_t(begin) * 0x9E3779B97F4A7C15u), offset);
    codes.narrow(0, begin, count).copy_(new_codes);
    scales.narrow(0, begin, count).copy_(new_scales);
    if (given(zeros)) zeros->narrow(0, begin, count).copy_(third);
    if (given(offsets)) offsets->narrow(0, begin, count).copy_(third);
  }
}

// Nothing is recorded; what is written gets its versions from the operations inside.
void without_gradient(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kStateSchema);
  m.def(kAdamWSchema);
  m.def(kWidenSchema);
  m.def(kRegridSchema);
}
TORCH_LIBRARY_IMPL(subbyte, CompositeExplicitAutograd, m) {
  m.impl("affine_state", state_of);
  m.impl("affine_adamw_", adamw_);
  m.impl("widen", widen_impl);
  m.impl("regrid_", regrid_impl);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("affine_state", state_shape);
  m.impl("affine_adamw_", adamw_shape);
  m.impl("widen", widen_shape);
  m.impl("regrid_", regrid_shape);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  for (const char* op : {"affine_state", "affine_adamw_", "widen", "regrid_"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&without_gradient>());
}

}  // namespace

at::Tensor ops::affine_state(SB_PACKED_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  return state_of(SB_PACKED);
}

void ops::affine_adamw_(SB_ADAMW_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  adamw_(SB_ADAMW);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ops::widen(SB_PACKED_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  return widen_impl(SB_PACKED);
}

void ops::regrid_(SB_REGRID_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  regrid_impl(SB_REGRID);
}

}  // namespace subbyte
