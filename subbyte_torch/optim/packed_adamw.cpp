#include "subbyte_torch/optim/packed_adamw.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/nn/pimpl.h>
#include <torch/utils.h>

#include <cmath>
#include <functional>

#include "subbyte/ops/packed_update/packed_update.h"
#include "subbyte_torch/nn/embedding.h"
#include "subbyte_torch/nn/linear.h"
#include "subbyte_torch/ops/packed_update.h"

namespace subbyte::optim {
namespace {

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

std::vector<torch::Tensor> parameters_of(const PackedParamGroup& group) {
  std::vector<torch::Tensor> out;
  for (const PackedWeight& w : group.weights) out.push_back(w.handle());
  out.insert(out.end(), group.params.begin(), group.params.end());
  return out;
}

std::vector<torch::optim::OptimizerParamGroup> groups_of(const std::vector<PackedParamGroup>& groups,
                                                         const PackedAdamWOptions& defaults) {
  std::vector<torch::optim::OptimizerParamGroup> out;
  for (const PackedParamGroup& group : groups)
    out.emplace_back(parameters_of(group), std::make_unique<PackedAdamWOptions>(group.options.value_or(defaults)));
  return out;
}

void check_moment(const std::string& name) {
  TORCH_CHECK_VALUE(name == "float32" || name == "bfloat16" || name == "8bit" || name == "4bit", "PackedAdamW: a moment is '",
                    name, "', expected float32, bfloat16, 8bit or 4bit");
}

void check_options(const PackedAdamWOptions& o) {
  TORCH_CHECK_VALUE(o.lr() >= 0, "PackedAdamW: lr is ", o.lr(), ", expected at least 0");
  TORCH_CHECK_VALUE(o.eps() >= 0, "PackedAdamW: eps is ", o.eps(), ", expected at least 0");
  TORCH_CHECK_VALUE(o.weight_decay() >= 0, "PackedAdamW: weight_decay is ", o.weight_decay(), ", expected at least 0");
  for (const double beta : {std::get<0>(o.betas()), std::get<1>(o.betas())})
    TORCH_CHECK_VALUE(beta >= 0 && beta < 1, "PackedAdamW: a beta is ", beta, ", expected 0 <= beta < 1");
  check_moment(o.first_moment());
  check_moment(o.second_moment());
}

std::pair<torch::Tensor, torch::Tensor> fresh_moment(const std::string& kind, const PackedWeight& w) {
  const auto options = torch::TensorOptions().device(w.codes.device());
  const int64_t n = w.out_features(), k = w.in_features;
  if (kind == "float32") return {torch::zeros({n, k}, options), {}};
  if (kind == "bfloat16") return {torch::zeros({n, k}, options.dtype(torch::kBFloat16)), {}};
  const int64_t columns = kind == "8bit" || k < 2 ? k : (k + 1) / 2;
  return {torch::zeros({n, columns}, options.dtype(torch::kByte)), torch::zeros({n, ceil_div(k, kMomentBlock)}, options)};
}

struct Hook : torch::autograd::PostAccumulateGradHook {
  explicit Hook(std::function<void(const torch::Tensor&)> function) : run(std::move(function)) {}
  void operator()(const torch::autograd::Variable& tensor) override { run(tensor); }
  std::function<void(const torch::Tensor&)> run;
};

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

void PackedAdamWParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(m);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(m_absmax);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(v);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(v_absmax);
}

void PackedAdamWParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, m);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, m_absmax);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, v);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, v_absmax);
}

PackedAdamW::PackedAdamW(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedAdamWOptions defaults)
    : PackedAdamW(std::vector<PackedParamGroup>{{std::move(weights), std::move(params)}}, std::move(defaults)) {}

PackedAdamW::PackedAdamW(const std::vector<PackedParamGroup>& groups, PackedAdamWOptions defaults)
    : Optimizer(groups_of(groups, defaults), std::make_unique<PackedAdamWOptions>(defaults)) {
  check_options(defaults);
  for (const PackedParamGroup& group : groups) {
    if (group.options.has_value()) check_options(*group.options);
    for (const PackedWeight& w : group.weights) weights_.emplace(w.handle().unsafeGetTensorImpl(), w);
  }
}

PackedAdamW::~PackedAdamW() { end_update_in_backward(); }

torch::Tensor PackedAdamW::step(LossClosure closure) {
  torch::Tensor loss;
  if (closure != nullptr) {
    const torch::AutoGradMode with_gradient(true);
    loss = closure();
  }
  if (!in_backward_) step_with_factor(torch::Tensor());
  return loss;
}

void PackedAdamW::step_with_factor(const torch::Tensor& grad_factor) {
  TORCH_CHECK(!in_backward_, "PackedAdamW: the parameters were updated during the backward pass, a factor comes too late");
  const torch::NoGradGuard no_grad;
  int64_t position = 0;
  for (size_t i = 0; i < param_groups_.size(); ++i)
    for (torch::Tensor& param : param_groups_[i].params()) {
      if (param.grad().defined()) update(i, position, param, optional(grad_factor));
      ++position;
    }
}

void PackedAdamW::update(size_t group, int64_t position, torch::Tensor& param, const OptionalTensor& grad_factor) {
  auto& options = static_cast<PackedAdamWOptions&>(param_groups_[group].options());
  auto& slot = state_[param.unsafeGetTensorImpl()];
  if (slot == nullptr) slot = std::make_unique<PackedAdamWParamState>();
  auto& state = static_cast<PackedAdamWParamState&>(*slot);
  state.step(state.step() + 1);
  const auto [beta1, beta2] = options.betas();
  const double correction1 = 1 - std::pow(beta1, double(state.step())), correction2 = 1 - std::pow(beta2, double(state.step()));
  const auto packed = weights_.find(param.unsafeGetTensorImpl());
  torch::Tensor grad = param.grad();
  if (packed != weights_.end()) {
    const PackedWeight& w = packed->second;
    if (!state.m().defined()) {
      auto [m, m_absmax] = fresh_moment(options.first_moment(), w);
      auto [v, v_absmax] = fresh_moment(options.second_moment(), w);
      state.m(m).m_absmax(m_absmax).v(v).v_absmax(v_absmax);
    }
    ops::packed_adamw_(w.codes, w.scales, optional(w.zeros), optional(w.offsets), optional(w.perm), w.format, w.in_features,
                       w.group_size, grad, state.m(), optional(state.m_absmax()), state.v(), optional(state.v_absmax()),
                       options.lr(), beta1, beta2, options.eps(), options.weight_decay(), correction1, correction2,
                       options.seed(), position << 40 | state.step(), options.maximize(), grad_factor, std::nullopt,
                       std::nullopt, optional(w.residual), w.residual_bits);
    return;
  }
  if (!state.m().defined()) state.m(torch::zeros_like(param)).v(torch::zeros_like(param));
  if (grad_factor.has_value()) grad = grad * grad_factor->to(grad.scalar_type());
  if (options.maximize()) grad = -grad;
  if (options.weight_decay() != 0) param.mul_(1 - options.lr() * options.weight_decay());
  state.m().lerp_(grad, 1 - beta1);
  state.v().mul_(beta2).addcmul_(grad, grad, 1 - beta2);
  const torch::Tensor denominator = state.v().sqrt().div_(std::sqrt(correction2)).add_(options.eps());
  param.addcdiv_(state.m(), denominator, -options.lr() / correction1);
}

void PackedAdamW::update_in_backward() {
  TORCH_CHECK(!in_backward_, "PackedAdamW: update_in_backward is on already");
  in_backward_ = true;
  int64_t position = 0;
  for (size_t i = 0; i < param_groups_.size(); ++i)
    for (torch::Tensor& param : param_groups_[i].params()) {
      torch::autograd::impl::set_post_acc_grad_hooks(param, std::make_unique<Hook>([this, i, position](const torch::Tensor& t) {
                                                       const torch::NoGradGuard no_grad;
                                                       torch::Tensor own = t;
                                                       update(i, position, own, std::nullopt);
                                                       own.mutable_grad() = torch::Tensor();
                                                     }));
      ++position;
    }
}

void PackedAdamW::end_update_in_backward() {
  if (!in_backward_) return;
  in_backward_ = false;
  for (auto& group : param_groups_)
    for (torch::Tensor& param : group.params()) torch::autograd::impl::set_post_acc_grad_hooks(param, nullptr);
}

void PackedAdamW::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<PackedAdamWParamState, PackedAdamWOptions>(archive, *this);
}

void PackedAdamW::load(torch::serialize::InputArchive& archive) {
  torch::optim::serialize<PackedAdamWParamState, PackedAdamWOptions>(archive, *this);
}

std::vector<PackedWeight> packed_weights(const torch::nn::Module& module) {
  std::vector<PackedWeight> out;
  for (const std::shared_ptr<torch::nn::Module>& m : module.modules(/*include_self=*/false)) {
    if (const auto* linear = m->as<nn::LinearImpl>()) out.push_back((linear->handle(), linear->weight()));
    else if (const auto* embedding = m->as<nn::EmbeddingImpl>()) out.push_back((embedding->handle(), embedding->weight()));
  }
  if (const auto* linear = dynamic_cast<const nn::LinearImpl*>(&module)) out.push_back((linear->handle(), linear->weight()));
  if (const auto* embedding = dynamic_cast<const nn::EmbeddingImpl*>(&module))
    out.push_back((embedding->handle(), embedding->weight()));
  return out;
}

}  // namespace subbyte::optim
