#include "subbyte_torch/optim/packed_lion.h"

#include <torch/utils.h>

#include "subbyte_torch/ops/packed_update.h"

namespace subbyte::optim {
namespace {

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

void check(const PackedLionOptions& o) {
  check_option("PackedLion", "lr", o.lr());
  check_beta("PackedLion", "betas[0]", std::get<0>(o.betas()));
  check_beta("PackedLion", "betas[1]", std::get<1>(o.betas()));
  check_option("PackedLion", "weight_decay", o.weight_decay());
  check_option("PackedLion", "threshold", o.threshold());
  check_moment("PackedLion", "moment", o.moment());
}

}  // namespace

PackedLionOptions::PackedLionOptions(double lr) : lr_(lr) {}

void PackedLionOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(betas);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(threshold);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(moment);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(maximize);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(seed);
}

void PackedLionOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(betas_t, betas);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, threshold);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, moment);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, maximize);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, seed);
}

double PackedLionOptions::get_lr() const { return lr(); }
void PackedLionOptions::set_lr(const double lr) { this->lr(lr); }

PackedLion::PackedLion(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedLionOptions defaults)
    : PackedLion(std::vector<PackedParamGroup<PackedLionOptions>>{{std::move(weights), std::move(params)}},
                 std::move(defaults)) {}

PackedLion::PackedLion(const std::vector<PackedParamGroup<PackedLionOptions>>& groups, PackedLionOptions defaults)
    : PackedOptimizer(groups, defaults) {
  check(defaults);
  for (const auto& group : groups)
    if (group.options.has_value()) check(*group.options);
}

void PackedLion::update_packed(const torch::optim::OptimizerOptions& group, const PackedWeight& w, const torch::Tensor& grad,
                               PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) {
  const auto& options = static_cast<const PackedLionOptions&>(group);
  if (!state.m().defined()) {
    auto [m, m_absmax] = fresh_moment(options.moment(), w);
    state.m(m).m_absmax(m_absmax);
  }
  ops::packed_sign_(w.codes, w.scales, optional(w.zeros), optional(w.offsets), optional(w.perm), w.format, w.in_features,
                    w.group_size, grad, optional(state.m()), optional(state.m_absmax()), options.lr(),
                    std::get<0>(options.betas()), std::get<1>(options.betas()), options.threshold(), options.weight_decay(),
                    options.seed(), offset, options.maximize(), grad_factor, std::nullopt, std::nullopt, optional(w.residual),
                    w.residual_bits);
}

void PackedLion::update_dense(const torch::optim::OptimizerOptions& group, torch::Tensor& param, const torch::Tensor& gradient,
                              PackedParamState& state) {
  const auto& options = static_cast<const PackedLionOptions&>(group);
  const auto [beta1, beta2] = options.betas();
  if (!state.m().defined()) state.m(torch::zeros_like(param));
  const torch::Tensor grad = options.maximize() ? -gradient : gradient;
  const torch::Tensor average = state.m().lerp(grad, 1 - beta1);
  state.m().lerp_(grad, 1 - beta2);
  param.mul_(1 - options.lr() * options.weight_decay());
  param.sub_(average.sign().mul_(average.abs().gt(options.threshold())), options.lr());
}

void PackedLion::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<PackedParamState, PackedLionOptions>(archive, *this);
}

void PackedLion::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<PackedParamState, PackedLionOptions>(archive, *this);
}

}  // namespace subbyte::optim
