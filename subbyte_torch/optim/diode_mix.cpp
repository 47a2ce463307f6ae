#include "subbyte_torch/optim/diode_mix.h"

#include <torch/serialize/archive.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "subbyte_torch/optim/moments.h"

namespace subbyte::optim {
namespace {

using torch::Tensor;

void check(const DiodeMixOptions& o) {
  TORCH_CHECK_VALUE(o.lr() >= 0, "DiodeMix: lr is ", o.lr(), ", expected at least 0");
  for (const double beta : {std::get<0>(o.betas()), std::get<1>(o.betas())})
    TORCH_CHECK_VALUE(beta >= 0 && beta < 1, "DiodeMix: a beta is ", beta, ", expected a number in [0, 1)");
  TORCH_CHECK_VALUE(o.eps() >= 0, "DiodeMix: eps is ", o.eps(), ", expected at least 0");
  TORCH_CHECK_VALUE(o.weight_decay() >= 0, "DiodeMix: weight_decay is ", o.weight_decay(), ", expected at least 0");
  TORCH_CHECK_VALUE(o.state_bits() == 8 || o.state_bits() == 16 || o.state_bits() == 32, "DiodeMix: state_bits is ",
                    o.state_bits(), ", expected 8, 16 or 32");
  TORCH_CHECK_VALUE(o.rank() >= 0, "DiodeMix: rank is ", o.rank(), ", expected at least 0");
  if (o.rank() > 0) GaLoreProjector({o.rank(), o.update_proj_gap(), o.scale(), o.proj_type()});
}

int64_t drawn_seed() { return torch::randint(int64_t(1) << 62, {}, torch::kLong).item<int64_t>(); }

// +1 where t >= 0, else -1.
Tensor sign_of(const Tensor& t) { return torch::where(t.ge(0), 1.0, -1.0).to(t.scalar_type()); }

// -sign(w) delta.
Tensor slow_average(const Tensor& signs) { return -signs * (torch::rand_like(signs) * 1e-3); }

Tensor first_moment(const DiodeMixParamState& state, const DiodeMixOptions& o, torch::ScalarType type) {
  return loaded_moment({state.exp_avg_l(), state.exp_avg_l_absmax()}, o.state_bits(), type);
}

Tensor second_moment(const DiodeMixParamState& state, const DiodeMixOptions& o, torch::ScalarType type, bool is_signed) {
  return loaded_moment({state.exp_avg_s(), state.exp_avg_s_absmax()}, o.state_bits(), type, is_signed);
}

// is_signed: of the second.
void keep(DiodeMixParamState& state, const DiodeMixOptions& o, const Tensor& l, const Tensor& s, bool is_signed) {
  const Moment first = stored_moment(l, o.state_bits()), second = stored_moment(s, o.state_bits(), is_signed);
  state.exp_avg_l(first.values).exp_avg_l_absmax(first.absmax);
  state.exp_avg_s(second.values).exp_avg_s_absmax(second.absmax);
}

using Back = std::function<Tensor(const Tensor&)>;

// w after a step of the ordinary rule; `w` itself is changed. Where `finite` (undefined: everywhere) is false, nothing changes.
Tensor moved(const Tensor& w, const Tensor& gradient, DiodeMixParamState& state, const DiodeMixOptions& o, const Back& back,
             const Tensor& finite = {}) {
  const auto [beta1, beta2] = o.betas();
  const Tensor g = gradient.to(w.scalar_type());
  Tensor m, v;
  if (state.exp_avg_l().defined()) {
    m = first_moment(state, o, g.scalar_type());
    v = second_moment(state, o, g.scalar_type(), /*is_signed=*/false);
  } else {
    m = torch::zeros_like(g);
    v = torch::zeros_like(g);
  }
  if (finite.defined()) {
    m.copy_(torch::where(finite, m * beta1 + (1 - beta1) * g, m));
    v.copy_(torch::where(finite, v * beta2 + (1 - beta2) * g * g, v));
  } else {
    m.mul_(beta1).add_(g, 1 - beta1);
    v.mul_(beta2).addcmul_(g, g, 1 - beta2);
  }
  keep(state, o, m, v, /*is_signed=*/false);
  double eta = o.lr();
  const double t = double(state.step());
  if (o.correct_bias()) eta *= std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t));
  auto where_finite = [&](const Tensor& x) { return finite.defined() ? torch::where(finite, x, torch::zeros_like(x)) : x; };
  w.sub_(where_finite(back(m / (v.sqrt() + o.eps()))), eta);
  if (o.weight_decay() > 0) w.sub_(where_finite(w), o.lr() * o.weight_decay());
  return w;
}

// The signs of a binary weight, rows in the order they are stored in, and how those that a mask names are flipped.
struct Signs {
  Tensor values;
  std::function<void(const Tensor&)> flip;
};

Signs signs_of(const Tensor& w) {
  const torch::ScalarType type = w.scalar_type();
  // An element that is exactly 0 counts as +1 and takes a small step to be negative.
  const double small = type == torch::kHalf ? 0x1p-14 : w.is_floating_point() ? 0x1p-100 : 1.0;
  return {sign_of(w).to(type == torch::kDouble ? type : torch::kFloat), [w, small](const Tensor& mask) {
            const Tensor negated = torch::where(w.eq(0), -small, -w).to(w.scalar_type());
            w.copy_(torch::where(mask, negated, w));
          }};
}

// Of all rows, or of some (int64 [T]).
Signs signs_of(PackedWeight& w, const Tensor& rows = {}) {
  const Tensor codes = rows.defined() ? w.codes.index_select(0, rows) : w.codes;
  const Tensor scales = rows.defined() ? w.scales.index_select(0, rows) : w.scales;
  const Tensor bits = ops::unpack(codes, "sign", w.in_features);
  const Tensor groups = torch::arange(w.in_features, torch::TensorOptions().device(codes.device()).dtype(torch::kLong))
                            .floor_divide(w.group_size);
  const Tensor direction = torch::where(scales.lt(0), -1.0, 1.0).to(torch::kFloat).index_select(1, groups);
  return {(bits.to(torch::kFloat) * 2 - 1) * direction, [&w, bits, rows](const Tensor& mask) {
            const Tensor packed = ops::pack(bits.bitwise_xor(mask.to(torch::kByte)), "sign");
            if (rows.defined()) w.codes.index_copy_(0, rows, packed);
            else w.codes.copy_(packed);
          }};
}

Tensor stored_order(const PackedWeight* w, const Tensor& g) {
  return w != nullptr && w->perm.defined() ? g.index_select(1, w->perm) : g;
}

void step_binary(const Signs& signs, const PackedWeight* w, const Tensor& gradient, DiodeMixParamState& state,
                 const DiodeMixOptions& o, const Back& back, bool projected) {
  const auto [beta1, beta2] = o.betas();
  const Tensor g = gradient.to(signs.values.scalar_type());
  const bool known = state.exp_avg_s().defined();
  Tensor l = known ? first_moment(state, o, g.scalar_type()) : torch::zeros_like(g);
  Tensor s = known ? second_moment(state, o, g.scalar_type(), /*is_signed=*/true) : slow_average(signs.values);
  // An element whose gradient is NaN or infinite keeps l, s and weight.
  const Tensor finite = g.isfinite();
  l.add_(torch::where(finite, g - l, torch::zeros_like(l)), 1 - beta1);
  const Tensor change = o.lr() * stored_order(w, back(l)).sign() - s;
  const Tensor moves = projected ? torch::ones_like(s, torch::kBool) : stored_order(w, finite);
  s.add_(torch::where(moves, change, torch::zeros_like(s)), 1 - beta2);
  keep(state, o, l, s, /*is_signed=*/true);
  signs.flip(sign_of(-s).ne(signs.values).logical_and(moves));
}

void step_table(PackedWeight& w, const Tensor& gradient, DiodeMixParamState& state, const DiodeMixOptions& o) {
  const double beta2 = std::get<1>(o.betas());
  const Tensor g = gradient.coalesce();
  const Tensor rows = g.indices()[0], values = stored_order(&w, g.values()).to(torch::kFloat);
  if (state.bound() == 0) state.bound(std::max(1e-3, o.lr()));  // |s| never exceeds the larger of its start and lr
  const double unit = o.state_bits() == 8 ? state.bound() / 127 : 1.0;
  const auto stored = [&](const Tensor& s) {
    if (o.state_bits() == 32) return s;
    if (o.state_bits() == 16) return rounded_to_bfloat16(s);
    return s.div(unit).add_(torch::rand_like(s)).floor_().clamp_(-127, 127).to(torch::kChar);
  };
  if (!state.exp_avg_s().defined()) state.exp_avg_s(stored(slow_average(signs_of(w).values)));
  const Signs signs = signs_of(w, rows);
  Tensor s = state.exp_avg_s().index_select(0, rows).to(torch::kFloat).mul(unit);
  s.add_(torch::where(values.isfinite(), o.lr() * values.sign() - s, torch::zeros_like(s)), 1 - beta2);
  state.exp_avg_s().index_copy_(0, rows, stored(s));
  signs.flip(sign_of(-s).ne(signs.values).logical_and(values.isfinite()));
}

}  // namespace

void DiodeMixOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(betas);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(correct_bias);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(binary);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(stochastic);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(state_bits);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(rank);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(update_proj_gap);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(scale);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(proj_type);
}

void DiodeMixOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(betas_t, betas);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, correct_bias);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, binary);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, stochastic);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, state_bits);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, rank);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, update_proj_gap);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, scale);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, proj_type);
}

void DiodeMixParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_l);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_s);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_l_absmax);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(exp_avg_s_absmax);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(bound);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(galore_left);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(galore_right);
}

void DiodeMixParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, exp_avg_l);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, exp_avg_s);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, exp_avg_l_absmax);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, exp_avg_s_absmax);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, bound);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, galore_left);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(Tensor, galore_right);
}

DiodeMix::DiodeMix(const std::vector<torch::optim::OptimizerParamGroup>& groups, DiodeMixOptions defaults)
    : Optimizer(groups, std::make_unique<DiodeMixOptions>(std::move(defaults))) {
  check(static_cast<const DiodeMixOptions&>(*defaults_));
  for (const auto& group : param_groups_) check(static_cast<const DiodeMixOptions&>(group.options()));
}

void DiodeMix::add_packed(PackedWeight& weight, size_t group) {
  TORCH_CHECK_VALUE(group < param_groups_.size(), "DiodeMix: group is ", group, ", there are ", param_groups_.size());
  param_groups_[group].params().push_back(weight.handle());
  packed_[weight.handle().unsafeGetTensorImpl()] = &weight;
}

Tensor DiodeMix::step(LossClosure closure) {
  const torch::NoGradGuard no_grad;
  Tensor loss;
  if (closure != nullptr) {
    const at::AutoGradMode enable_grad(true);
    loss = closure();
  }
  for (auto& group : param_groups_) {
    const auto& options = static_cast<const DiodeMixOptions&>(group.options());
    check(options);
    for (const Tensor& parameter : group.params())
      if (parameter.grad().defined()) step_one(parameter, options);
  }
  return loss;
}

void DiodeMix::step_one(const Tensor& parameter, const DiodeMixOptions& o) {
  void* key = parameter.unsafeGetTensorImpl();
  const auto found = packed_.find(key);
  PackedWeight* packed = found == packed_.end() ? nullptr : found->second;
  TORCH_CHECK(
      packed == nullptr || packed->handle().unsafeGetTensorImpl() == key,
      "DiodeMix: a packed weight has another handle than when it was added; build the optimizer after moving the model");
  const bool binary = packed == nullptr ? o.binary()
                                        : packed->format == "sign" && !packed->zeros.defined() && !packed->offsets.defined() &&
                                              !packed->residual.defined();
  Tensor g = parameter.grad();
  const bool sparse = g.is_sparse();
  TORCH_CHECK(!sparse || (binary && packed != nullptr), "DiodeMix: sparse gradients are taken by binary tables alone");
  if (binary && o.weight_decay() > 0) {
    TORCH_WARN_ONCE("DiodeMix: weight_decay has no effect on binary parameters");
  }

  auto& slot = state_[key];
  if (slot == nullptr) slot = std::make_unique<DiodeMixParamState>();
  auto& state = static_cast<DiodeMixParamState&>(*slot);

  Back back = [](const Tensor& t) { return t; };
  const bool projected = o.rank() > 0 && g.dim() == 2 && !sparse;
  if (projected) {
    GaLoreProjector projector({o.rank(), o.update_proj_gap(), o.scale(), o.proj_type()});
    projector.set_basis(state.galore_left(), state.galore_right());
    if (packed != nullptr || binary) g = torch::where(g.isfinite(), g, torch::zeros_like(g));
    g = projector.project(g.scalar_type() == torch::kDouble ? g : g.to(torch::kFloat), state.step());
    state.galore_left(projector.left());
    state.galore_right(projector.right());
    back = [projector](const Tensor& t) { return projector.project_back(t); };
  }
  state.step(state.step() + 1);

  if (packed != nullptr) {
    if (sparse) {
      step_table(*packed, g, state, o);
    } else if (binary) {
      step_binary(signs_of(*packed), packed, g, state, o, back, projected);
    } else {
      const Tensor finite = projected ? Tensor() : g.isfinite();
      const Tensor w = moved(packed->dequantize_fine(torch::kFloat), g, state, o, back, finite);
      packed->encode_(w, o.stochastic(), o.stochastic() ? drawn_seed() : 0);
    }
  } else if (binary) {
    step_binary(signs_of(parameter.detach()), nullptr, g, state, o, back, projected);
  } else if (parameter.scalar_type() == torch::kHalf || parameter.scalar_type() == torch::kBFloat16) {
    Tensor values = parameter.detach();
    values.copy_(moved(values.to(torch::kFloat), g, state, o, back));
  } else {
    moved(parameter.detach(), g, state, o, back);
  }
}

void DiodeMix::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<DiodeMixParamState, DiodeMixOptions>(archive, *this);
}

void DiodeMix::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<DiodeMixParamState, DiodeMixOptions>(archive, *this);
}

}  // namespace subbyte::optim
