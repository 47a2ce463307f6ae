#include "subbyte_torch/optim/packed_optimizer.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/nn/pimpl.h>
#include <torch/utils.h>

#include <functional>

#include "subbyte/ops/packed_update/packed_update.h"
#include "subbyte_torch/nn/embedding.h"
#include "subbyte_torch/nn/linear.h"
#include "subbyte_torch/nn/mpq_linear.h"

namespace subbyte::optim {
namespace {

struct Hook : torch::autograd::PostAccumulateGradHook {
  explicit Hook(std::function<void(const torch::Tensor&)> function) : run(std::move(function)) {}
  void operator()(const torch::autograd::Variable& tensor) override { run(tensor); }
  std::function<void(const torch::Tensor&)> run;
};

}  // namespace

void PackedParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(m);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(m_absmax);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(v);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(v_absmax);
}

void PackedParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, m);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, m_absmax);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, v);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(torch::Tensor, v_absmax);
}

PackedOptimizer::~PackedOptimizer() { end_update_in_backward(); }

torch::Tensor PackedOptimizer::step(LossClosure closure) {
  torch::Tensor loss;
  if (closure != nullptr) {
    const torch::AutoGradMode with_gradient(true);
    loss = closure();
  }
  if (!in_backward_) step_with_factor(torch::Tensor());
  return loss;
}

void PackedOptimizer::step_with_factor(const torch::Tensor& grad_factor) {
  TORCH_CHECK(!in_backward_, "step: the parameters were updated during the backward pass, a factor comes too late");
  const torch::NoGradGuard no_grad;
  int64_t position = 0;
  for (size_t i = 0; i < param_groups_.size(); ++i)
    for (torch::Tensor& param : param_groups_[i].params()) {
      if (param.grad().defined())
        update(i, position, param, grad_factor.defined() ? OptionalTensor(grad_factor) : std::nullopt);
      ++position;
    }
}

void PackedOptimizer::update(size_t group, int64_t position, torch::Tensor& param, const OptionalTensor& grad_factor) {
  auto& slot = state_[param.unsafeGetTensorImpl()];
  if (slot == nullptr) slot = std::make_unique<PackedParamState>();
  auto& state = static_cast<PackedParamState&>(*slot);
  state.step(state.step() + 1);
  const torch::optim::OptimizerOptions& options = param_groups_[group].options();
  torch::Tensor grad = param.grad();
  const auto packed = weights_.find(param.unsafeGetTensorImpl());
  if (packed != weights_.end()) {
    TORCH_CHECK(
        !grad.is_sparse(),
        "step: the gradient of a packed table is sparse, which this optimizer does not take. DiodeMix does for 1-bit tables, "
        "and BinaryEmbedding's update_(); or make the table with sparse = false");
    update_packed(options, packed->second, grad, state, position << 40 | state.step(), grad_factor);
    return;
  }
  if (grad_factor.has_value()) grad = grad * grad_factor->to(grad.scalar_type());
  update_dense(options, param, grad, state);
}

void PackedOptimizer::update_in_backward() {
  TORCH_CHECK(!in_backward_, "update_in_backward: this optimizer does so already");
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

void PackedOptimizer::end_update_in_backward() {
  if (!in_backward_) return;
  in_backward_ = false;
  for (auto& group : param_groups_)
    for (torch::Tensor& param : group.params()) torch::autograd::impl::set_post_acc_grad_hooks(param, nullptr);
}

int64_t PackedOptimizer::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& [parameter, slot] : state_) {
    const auto& state = static_cast<const PackedParamState&>(*slot);
    for (const torch::Tensor& t : {state.m(), state.m_absmax(), state.v(), state.v_absmax()})
      if (t.defined()) bytes += int64_t(t.nbytes());
  }
  return bytes;
}

void check_option(const char* optimizer, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0, optimizer, ": ", name, " is ", value, ", expected at least 0");
}

void check_beta(const char* optimizer, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value < 1, optimizer, ": ", name, " is ", value, ", expected 0 <= ", name, " < 1");
}

void check_moment(const char* optimizer, const char* name, const std::string& kind) {
  TORCH_CHECK_VALUE(kind == "float32" || kind == "bfloat16" || kind == "8bit" || kind == "4bit", optimizer, ": ", name, " is '",
                    kind, "', expected float32, bfloat16, 8bit or 4bit");
}

std::pair<torch::Tensor, torch::Tensor> fresh_moment(const std::string& kind, const PackedWeight& w) {
  const auto options = torch::TensorOptions().device(w.codes.device());
  const int64_t n = w.out_features(), k = w.in_features;
  if (kind == "float32") return {torch::zeros({n, k}, options), {}};
  if (kind == "bfloat16") return {torch::zeros({n, k}, options.dtype(torch::kBFloat16)), {}};
  const int64_t columns = kind == "8bit" || k < 2 ? k : (k + 1) / 2;
  return {torch::zeros({n, columns}, options.dtype(torch::kByte)), torch::zeros({n, ceil_div(k, kMomentBlock)}, options)};
}

std::vector<PackedWeight> packed_weights(const torch::nn::Module& module) {
  std::vector<PackedWeight> out;
  auto take = [&out](const torch::nn::Module& m) {
    auto add = [&out](const auto* layer) {
      if (layer != nullptr) out.push_back((layer->handle(), layer->weight()));  // the copy shares the handle that now exists
    };
    add(dynamic_cast<const nn::LinearImpl*>(&m));
    add(dynamic_cast<const nn::EmbeddingImpl*>(&m));
    add(dynamic_cast<const nn::EmbeddingBagImpl*>(&m));
    add(dynamic_cast<const nn::MPQLinearImpl*>(&m));
  };
  for (const std::shared_ptr<torch::nn::Module>& m : module.modules(/*include_self=*/false)) take(*m);
  take(module);
  return out;
}

}  // namespace subbyte::optim
