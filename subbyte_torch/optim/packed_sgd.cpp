#include "subbyte_torch/optim/packed_sgd.h"

#include <torch/utils.h>

#include "subbyte_torch/ops/packed_update.h"

namespace subbyte::optim {
namespace {

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

void check(const PackedSGDOptions& o) {
  check_option("PackedSGD", "lr", o.lr());
  check_option("PackedSGD", "momentum", o.momentum());
  check_option("PackedSGD", "weight_decay", o.weight_decay());
  check_moment("PackedSGD", "moment", o.moment());
  TORCH_CHECK_VALUE(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0), "PackedSGD: nesterov with momentum ",
                    o.momentum(), " and dampening ", o.dampening(), ", expected a momentum above 0 and no dampening");
}

}  // namespace

PackedSGDOptions::PackedSGDOptions(double lr) : lr_(lr) {}

void PackedSGDOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(dampening);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(nesterov);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(moment);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(maximize);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(seed);
}

void PackedSGDOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, momentum);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, dampening);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, nesterov);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, moment);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, maximize);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, seed);
}

double PackedSGDOptions::get_lr() const { return lr(); }
void PackedSGDOptions::set_lr(const double lr) { this->lr(lr); }

PackedSGD::PackedSGD(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedSGDOptions defaults)
    : PackedSGD(std::vector<PackedParamGroup<PackedSGDOptions>>{{std::move(weights), std::move(params)}}, std::move(defaults)) {
}

PackedSGD::PackedSGD(const std::vector<PackedParamGroup<PackedSGDOptions>>& groups, PackedSGDOptions defaults)
    : PackedOptimizer(groups, defaults) {
  check(defaults);
  for (const auto& group : groups)
    if (group.options.has_value()) check(*group.options);
}

void PackedSGD::update_packed(const torch::optim::OptimizerOptions& group, const PackedWeight& w, const torch::Tensor& grad,
                              PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) {
  const auto& options = static_cast<const PackedSGDOptions&>(group);
  if (options.momentum() != 0 && !state.m().defined()) {
    auto [m, m_absmax] = fresh_moment(options.moment(), w);
    state.m(m).m_absmax(m_absmax);
  }
  const double dampening = state.step() == 1 ? 0.0 : options.dampening();  // the first average is the gradient
  ops::packed_sgd_(w.codes, w.scales, optional(w.zeros), optional(w.offsets), optional(w.perm), w.format, w.in_features,
                   w.group_size, grad, optional(state.m()), optional(state.m_absmax()), options.lr(), options.momentum(),
                   dampening, options.nesterov(), options.weight_decay(), options.seed(), offset, options.maximize(),
                   grad_factor, std::nullopt, std::nullopt, optional(w.residual), w.residual_bits);
}

void PackedSGD::update_dense(const torch::optim::OptimizerOptions& group, torch::Tensor& param, const torch::Tensor& gradient,
                             PackedParamState& state) {
  const auto& options = static_cast<const PackedSGDOptions&>(group);
  torch::Tensor grad = options.maximize() ? -gradient : gradient;
  if (options.weight_decay() != 0) grad = grad.add(param, options.weight_decay());
  if (options.momentum() != 0) {
    if (state.m().defined()) state.m().mul_(options.momentum()).add_(grad, 1 - options.dampening());
    else state.m(grad.detach().clone());
    grad = options.nesterov() ? grad.add(state.m(), options.momentum()) : state.m();
  }
  param.add_(grad, -options.lr());
}

void PackedSGD::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<PackedParamState, PackedSGDOptions>(archive, *this);
}

void PackedSGD::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<PackedParamState, PackedSGDOptions>(archive, *this);
}

}  // namespace subbyte::optim
