// torch.optim.AdamW on packed weights and ordinary parameters, as a torch::optim::Optimizer.
//
//   subbyte::optim::PackedAdamW optimizer(subbyte::optim::packed_weights(*model), model->parameters(), 1e-3);
//   loss.backward(); optimizer.step(); optimizer.zero_grad();
//
// Of a packed weight the optimizer knows the gradient handle (PackedWeight::handle()) as its parameter and writes the codes in
// one fused pass (ops/packed_update.h): stochastic rounding, moments of few bits, gradient elements that are not finite are
// skipped. Ordinary parameters take torch::optim::AdamW's step. Random bits are a function of (seed, position among all
// parameters, step, element), the same as those of Python's subbyte.optim.PackedAdamW. The optimizer shares the tensors of the
// weights that it is given: make it after the model has been moved and loaded.
#pragma once
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>

#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::optim {

struct PackedAdamWOptions : public torch::optim::OptimizerCloneableOptions<PackedAdamWOptions> {
  PackedAdamWOptions(double lr = 1e-3);  // NOLINT: as torch::optim's options, made from a rate
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 1e-2;
  // Of packed weights: "float32", "bfloat16", "8bit" or "4bit".
  TORCH_ARG(std::string, first_moment) = "8bit";
  TORCH_ARG(std::string, second_moment) = "8bit";
  TORCH_ARG(bool, maximize) = false;
  TORCH_ARG(int64_t, seed) = 0;

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(const double lr) override;
};

// m and v of a packed weight as packed_update.h lays them out, with absmax where they are blockwise; of another parameter in
// its own shape and type.
struct PackedAdamWParamState : public torch::optim::OptimizerCloneableParamState<PackedAdamWParamState> {
  TORCH_ARG(int64_t, step) = 0;
  TORCH_ARG(torch::Tensor, m);
  TORCH_ARG(torch::Tensor, m_absmax);
  TORCH_ARG(torch::Tensor, v);
  TORCH_ARG(torch::Tensor, v_absmax);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

// Parameters of one group: packed weights first, then the others.
struct PackedParamGroup {
  std::vector<PackedWeight> weights;
  std::vector<torch::Tensor> params;
  std::optional<PackedAdamWOptions> options = std::nullopt;  // the optimizer's when none
};

class PackedAdamW : public torch::optim::Optimizer {
 public:
  PackedAdamW(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedAdamWOptions defaults = {});
  explicit PackedAdamW(const std::vector<PackedParamGroup>& groups, PackedAdamWOptions defaults = {});
  PackedAdamW(PackedAdamW&&) = delete;  // the hooks of update_in_backward point here
  ~PackedAdamW() override;

  torch::Tensor step(LossClosure closure = nullptr) override;
  // The same, gradients of packed weights and others counting times `grad_factor` (float32, one element, on their device).
  void step_with_factor(const torch::Tensor& grad_factor);
  // From now on a parameter is updated, and its gradient freed, as soon as the backward pass has it; step() then only runs its
  // closure. Accumulation over backward passes and clipping are not possible in this mode.
  void update_in_backward();
  void end_update_in_backward();

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void update(size_t group, int64_t position, torch::Tensor& param, const OptionalTensor& grad_factor);

  std::unordered_map<void*, PackedWeight> weights_;  // by handle
  bool in_backward_ = false;
};

// The weights of all subbyte::nn::Linear and Embedding in `module`, in order. They share its tensors and handles.
std::vector<PackedWeight> packed_weights(const torch::nn::Module& module);

}  // namespace subbyte::optim
