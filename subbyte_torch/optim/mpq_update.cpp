#include "subbyte_torch/optim/mpq_update.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>

#include "subbyte_torch/convert.h"

namespace subbyte {
namespace {

constexpr const char* kMomentsSchema =
    "mpq_moments_(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor grad, float beta1, float beta2, float eps) -> Tensor";
constexpr const char* kApplySchema =
    "mpq_apply_(Tensor(a!) codes, Tensor scales, Tensor(b!)? zeros, Tensor(c!)? offsets, Tensor? perm, str format, "
    "int in_features, int group_size, Tensor? parent, Tensor delta, float decay, bool move_zeros, bool integer_zeros=True, "
    "int zeros_low=1, str rounding=\"stochastic\", int seed=0, int offset=0) -> ()";

// Keeps the random bits of zeros apart from those of codes, which the same seed gives.
constexpr int64_t kZerosSeed = 0x5bd1e995a4093822;

// Parents renumbered from 0, so below the number of pieces. Waits for the device.
at::Tensor compact_ids(const at::Tensor& parent) {
  return std::get<1>(at::_unique2(parent, /*sorted=*/true, /*return_inverse=*/true));
}

// Mean over each group's rows of `delta` [N, K] (input order), a value a group of the packed weight [N, G']: pieces of one
// parent get the parent's mean.
at::Tensor group_means(const at::Tensor& delta, const OptionalTensor& perm, const OptionalTensor& parent, int64_t group_size) {
  const int64_t n = delta.size(0), k = delta.size(1), pieces = ceil_div(k, group_size);
  at::Tensor stored = given(perm) ? delta.index_select(1, *perm) : delta;
  if (pieces * group_size > k) stored = at::constant_pad_nd(stored, {0, pieces * group_size - k});
  at::Tensor sums = stored.reshape({n, pieces, group_size}).sum(2);
  at::Tensor counts = at::full({pieces}, double(group_size), sums.options());
  if (pieces > 0) counts.narrow(0, pieces - 1, 1).fill_(double(k - (pieces - 1) * group_size));
  if (!given(parent)) return sums / counts;
  const at::Tensor id = compact_ids(*parent);
  auto total = [&](const at::Tensor& t) { return at::zeros_like(t).index_add_(-1, id, t).index_select(-1, id); };
  return total(sums) / total(counts);
}

// Smallest and largest zero of each group: [G'], or a number for one width.
at::Tensor clamped_zeros(const at::Tensor& z, const RowLayout& layout, int64_t group_size, int64_t low) {
  if (layout.uniform()) {
    const int64_t levels = layout.segment_count == 0 ? 2 : int64_t(1) << format_bits(layout.segments[0].format);
    return z.clamp(low, low + levels - 1);
  }
  std::vector<float> high;
  for (int64_t g = 0; g < z.size(1); ++g)
    high.push_back(float(low + (1 << format_bits(segment_of(layout, g * group_size).format)) - 1));
  return at::minimum(z.clamp_min(low), at::tensor(at::ArrayRef<float>(high), at::kFloat).to(z.device()));
}

at::Tensor rounded_zeros(const at::Tensor& z, std::string_view rounding, int64_t low, int64_t seed, int64_t offset) {
  if (rounding == "nearest" || z.numel() == 0) return z.round();
  // The rounding of codes, applied to z - low on a grid of step 1.
  const int64_t n = z.size(0), g = z.size(1);
  const at::Tensor one = at::ones({n, 1}, z.options()), shift = at::full({n, 1}, double(low), z.options());
  return ops::unpack(ops::encode(z, one, std::nullopt, shift, std::nullopt, "uint8", g, rounding, seed ^ kZerosSeed, offset),
                     "uint8", g)
      .to(at::kFloat)
      .add_(low);
}

at::Tensor moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad, double beta1, double beta2,
                   double eps) {
  constexpr const char* op = "mpq_moments_";
  for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}})
    TORCH_CHECK_VALUE(t.is_floating_point() && t.sizes() == grad.sizes(), op, ": ", name, " is ", t.scalar_type(), " ",
                      t.sizes(), ", expected floating point of the gradient's shape ", grad.sizes());
  TORCH_CHECK_VALUE(grad.is_floating_point(), op, ": grad is ", grad.scalar_type(), ", expected floating point");
  for (const auto& [name, b] : {std::pair<const char*, double>{"beta1", beta1}, {"beta2", beta2}})
    TORCH_CHECK_VALUE(b >= 0 && b < 1, op, ": ", name, " is ", b, ", expected 0 <= ", name, " < 1");
  TORCH_CHECK_VALUE(eps >= 0, op, ": eps is ", eps, ", expected at least 0");
  const at::Tensor g = grad.to(exp_avg.scalar_type());
  exp_avg.mul_(beta1).add_(g, 1 - beta1);
  exp_avg_sq.mul_(beta2).addcmul_(g, g, 1 - beta2);
  return exp_avg / (exp_avg_sq.sqrt().to(exp_avg.scalar_type()).add_(eps));
}

void apply(SB_PACKED_PARAMS, const OptionalTensor& parent, const at::Tensor& delta, double decay, bool move_zeros,
           bool integer_zeros, int64_t zeros_low, std::string_view rounding, int64_t seed, int64_t offset) {
  constexpr const char* op = "mpq_apply_";
  check_packed(op, {SB_PACKED});
  TORCH_CHECK_VALUE(delta.is_floating_point() && delta.dim() == 2 && delta.sym_size(0) == codes.sym_size(0) &&
                        delta.sym_size(1) == in_features,
                    op, ": delta is ", delta.scalar_type(), " ", delta.sym_sizes(), ", expected floating point [N, K] = [",
                    codes.sym_size(0), ", ", in_features, "]");
  TORCH_CHECK_VALUE(rounding == "nearest" || rounding == "stochastic", op, ": rounding '", rounding,
                    "' is unknown, expected nearest or stochastic");
  TORCH_CHECK_VALUE(zeros_low == 0 || zeros_low == 1, op, ": zeros_low is ", zeros_low, ", expected 0 or 1");
  if (given(parent))
    TORCH_CHECK_VALUE(parent->scalar_type() == at::kLong && parent->dim() == 1 && parent->sym_size(0) == scales.sym_size(1), op,
                      ": parent is ", parent->scalar_type(), " ", parent->sym_sizes(), ", expected int64 [groups] = [",
                      scales.sym_size(1), "]");
  const at::Tensor step = delta.to(at::kFloat);
  at::Tensor w = ops::dequantize(SB_PACKED, at::kFloat) - step;
  if (decay != 0) w.mul_(1 - decay);
  if (move_zeros && (given(zeros) || given(offsets))) {
    const at::Tensor mean = group_means(step, perm, parent, group_size);
    if (given(offsets)) {
      const at::Tensor moved = (offsets->to(at::kFloat) - mean).to(offsets->scalar_type());
      ops::encode_(codes, w, scales, zeros, moved, perm, format, group_size, rounding, seed, offset);
      offsets->copy_(moved);
      return;
    }
    const at::Tensor s = scales.to(at::kFloat), z = zeros->to(at::kFloat);
    at::Tensor moved = z + at::where(s == 0, at::zeros_like(mean), mean / s);
    if (integer_zeros) {
      moved = rounded_zeros(moved, rounding, zeros_low, seed, offset);
      if (given(parent)) {  // pieces of one group round alike: as the first of them
        const at::Tensor id = compact_ids(*parent), index = at::arange(parent->numel(), parent->options());
        const at::Tensor first = at::full_like(index, parent->numel()).scatter_reduce_(0, id, index, "amin");
        moved = moved.index_select(1, first.index_select(0, id));
      }
      moved = clamped_zeros(moved, layout_of(op, format, in_features), group_size, zeros_low);
    }
    moved = moved.to(zeros->scalar_type());
    ops::encode_(codes, w, scales, moved, offsets, perm, format, group_size, rounding, seed, offset);
    zeros->copy_(moved);
    return;
  }
  ops::encode_(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kMomentsSchema);
  m.def(kApplySchema);
}
// Composed of operations that serve every device, meta included.
TORCH_LIBRARY_IMPL(subbyte, CompositeExplicitAutograd, m) {
  m.impl("mpq_moments_", moments);
  m.impl("mpq_apply_", apply);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("mpq_moments_", torch::autograd::autogradNotImplementedFallback());
  m.impl("mpq_apply_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor ops::mpq_moments_(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad, double beta1,
                             double beta2, double eps) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::mpq_moments_", "").typed<decltype(moments)>();
  return op.call(exp_avg, exp_avg_sq, grad, beta1, beta2, eps);
}

void ops::mpq_apply_(SB_PACKED_PARAMS, const OptionalTensor& parent, const at::Tensor& delta, double decay, bool move_zeros,
                     bool integer_zeros, int64_t zeros_low, std::string_view rounding, int64_t seed, int64_t offset) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::mpq_apply_", "").typed<decltype(apply)>();
  op.call(SB_PACKED, parent, delta, decay, move_zeros, integer_zeros, zeros_low, rounding, seed, offset);
}

void optim::mpq_update_(PackedWeight& weight, const torch::Tensor& grad, const torch::Tensor& exp_avg,
                        const torch::Tensor& exp_avg_sq, int64_t step, const MpqUpdateOptions& o,
                        const std::function<torch::Tensor(const torch::Tensor&)>& project_back, const torch::Tensor& parent) {
  TORCH_CHECK_VALUE(step >= 1, "mpq_update_: step is ", step, ", expected at least 1");
  TORCH_CHECK_VALUE(!weight.residual.defined(),
                    "mpq_update_: weight has a residual, which the MPQ rule does not know: use drop_residual() first");
  TORCH_CHECK_VALUE(o.lr >= 0 && std::isfinite(o.lr), "mpq_update_: lr is ", o.lr, ", expected a number of at least 0");
  TORCH_CHECK_VALUE(o.weight_decay >= 0 && std::isfinite(o.weight_decay), "mpq_update_: weight_decay is ", o.weight_decay,
                    ", expected a number of at least 0");
  TORCH_CHECK_VALUE(o.zeros_every >= 0, "mpq_update_: zeros_every is ", o.zeros_every, ", expected at least 0");
  const torch::NoGradGuard no_grad;
  at::Tensor r = ops::mpq_moments_(exp_avg, exp_avg_sq, grad, o.beta1, o.beta2, o.eps);
  if (project_back) r = project_back(r);
  double eta = o.lr;
  if (o.correct_bias) eta *= std::sqrt(1 - std::pow(o.beta2, double(step))) / (1 - std::pow(o.beta1, double(step)));
  auto optional = [](const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  ops::mpq_apply_(weight.codes, weight.scales, optional(weight.zeros), optional(weight.offsets), optional(weight.perm),
                  weight.format, weight.in_features, weight.group_size, optional(parent), r * eta, o.lr * o.weight_decay,
                  o.zeros_every != 0 && step % o.zeros_every == 0, o.integer_zeros, o.zeros_low,
                  o.stochastic ? "stochastic" : "nearest", o.seed, o.offset.value_or(step));
}

}  // namespace subbyte
