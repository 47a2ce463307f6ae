#include "subbyte_torch/optim/packed_adamw.h"

#include <torch/utils.h>

#include <cmath>

#include "subbyte_torch/ops/packed_update.h"

namespace subbyte::optim {
namespace {

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

void check(const PackedAdamWOptions& o) {
  check_option("PackedAdamW", "lr", o.lr());
  check_option("PackedAdamW", "eps", o.eps());
  check_option("PackedAdamW", "weight_decay", o.weight_decay());
  check_beta("PackedAdamW", "betas[0]", std::get<0>(o.betas()));
  check_beta("PackedAdamW", "betas[1]", std::get<1>(o.betas()));
  check_moment("PackedAdamW", "first_moment", o.first_moment());
  check_moment("PackedAdamW", "second_moment", o.second_moment());
}

}  // namespace

PackedAdamWOptions::PackedAdamWOptions(double lr) : lr_(lr) {}

void PackedAdamWOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(betas);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(first_moment);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(second_moment);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(maximize);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(seed);
}

void PackedAdamWOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(betas_t, betas);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, first_moment);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, second_moment);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, maximize);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, seed);
}

double PackedAdamWOptions::get_lr() const { return lr(); }
void PackedAdamWOptions::set_lr(const double lr) { this->lr(lr); }

PackedAdamW::PackedAdamW(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedAdamWOptions defaults)
    : PackedAdamW(std::vector<PackedParamGroup<PackedAdamWOptions>>{{std::move(weights), std::move(params)}},
                  std::move(defaults)) {}

PackedAdamW::PackedAdamW(const std::vector<PackedParamGroup<PackedAdamWOptions>>& groups, PackedAdamWOptions defaults)
    : PackedOptimizer(groups, defaults) {
  check(defaults);
  for (const auto& group : groups)
    if (group.options.has_value()) check(*group.options);
}

void PackedAdamW::update_packed(const torch::optim::OptimizerOptions& group, const PackedWeight& w, const torch::Tensor& grad,
                                PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) {
  const auto& options = static_cast<const PackedAdamWOptions&>(group);
  const auto [beta1, beta2] = options.betas();
  if (!state.m().defined()) {
    auto [m, m_absmax] = fresh_moment(options.first_moment(), w);
    auto [v, v_absmax] = fresh_moment(options.second_moment(), w);
    state.m(m).m_absmax(m_absmax).v(v).v_absmax(v_absmax);
  }
  const double t = double(state.step());
  ops::packed_adamw_(w.codes, w.scales, optional(w.zeros), optional(w.offsets), optional(w.perm), w.format, w.in_features,
                     w.group_size, grad, state.m(), optional(state.m_absmax()), state.v(), optional(state.v_absmax()),
                     options.lr(), beta1, beta2, options.eps(), options.weight_decay(), 1 - std::pow(beta1, t),
                     1 - std::pow(beta2, t), options.seed(), offset, options.maximize(), grad_factor, std::nullopt,
                     std::nullopt, optional(w.residual), w.residual_bits);
}

void PackedAdamW::update_dense(const torch::optim::OptimizerOptions& group, torch::Tensor& param, const torch::Tensor& gradient,
                               PackedParamState& state) {
  const auto& options = static_cast<const PackedAdamWOptions&>(group);
  const auto [beta1, beta2] = options.betas();
  if (!state.m().defined()) state.m(torch::zeros_like(param)).v(torch::zeros_like(param));
  const torch::Tensor grad = options.maximize() ? -gradient : gradient;
  const double t = double(state.step());
  if (options.weight_decay() != 0) param.mul_(1 - options.lr() * options.weight_decay());
  state.m().lerp_(grad, 1 - beta1);
  state.v().mul_(beta2).addcmul_(grad, grad, 1 - beta2);
  const torch::Tensor denominator = state.v().sqrt().div_(std::sqrt(1 - std::pow(beta2, t))).add_(options.eps());
  param.addcdiv_(state.m(), denominator, -options.lr() / (1 - std::pow(beta1, t)));
}

void PackedAdamW::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<PackedParamState, PackedAdamWOptions>(archive, *this);
}

void PackedAdamW::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<PackedParamState, PackedAdamWOptions>(archive, *this);
}

}  // namespace subbyte::optim
