// What PackedAdamW, PackedSGD and PackedLion have in common: optimizers of packed weights and ordinary parameters, as
// torch::optim::Optimizers.
//
//   subbyte::optim::PackedAdamW optimizer(subbyte::optim::packed_weights(*model), model->parameters(), 1e-3);
//   loss.backward(); optimizer.step(); optimizer.zero_grad();
//
// Of a packed weight the optimizer knows the gradient handle (PackedWeight::handle()) as its parameter and writes the codes in
// one fused pass (ops/packed_update.h): stochastic rounding, moments of few bits, gradient elements that are not finite are
// skipped. Ordinary parameters take the step of torch's own optimizer. Random bits are a function of (seed, position among all
// parameters, step, element), the same as those of Python's subbyte.optim. The optimizer shares the tensors of the weights that
// it is given: make it after the model has been moved and loaded.
#pragma once
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::optim {

// Parameters of one group: packed weights first, then the others.
template <class Options>
struct PackedParamGroup {
  std::vector<PackedWeight> weights;
  std::vector<torch::Tensor> params;
  std::optional<Options> options = std::nullopt;  // the optimizer's when none
};

// Moments of a packed weight as packed_update.h lays them out, with absmax where they are blockwise; of another parameter in
// its own shape and type. What an optimizer does not keep is undefined.
struct PackedParamState : public torch::optim::OptimizerCloneableParamState<PackedParamState> {
  TORCH_ARG(int64_t, step) = 0;
  TORCH_ARG(torch::Tensor, m);
  TORCH_ARG(torch::Tensor, m_absmax);
  TORCH_ARG(torch::Tensor, v);
  TORCH_ARG(torch::Tensor, v_absmax);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

class PackedOptimizer : public torch::optim::Optimizer {
 public:
  PackedOptimizer(PackedOptimizer&&) = delete;  // the hooks of update_in_backward point here
  ~PackedOptimizer() override;

  torch::Tensor step(LossClosure closure = nullptr) override;
  // The same, gradients of packed weights and others counting times `grad_factor` (float32, one element, on their device).
  void step_with_factor(const torch::Tensor& grad_factor);
  // From now on a parameter is updated, and its gradient freed, as soon as the backward pass has it; step() then only runs its
  // closure. Accumulation over backward passes and clipping are not possible in this mode.
  void update_in_backward();
  void end_update_in_backward();
  // Bytes of all state tensors, of packed and other parameters.
  int64_t state_bytes() const;

 protected:
  template <class Options>
  PackedOptimizer(const std::vector<PackedParamGroup<Options>>& groups, const Options& defaults)
      : Optimizer(groups_of(groups, defaults), std::make_unique<Options>(defaults)) {
    for (const auto& group : groups)
      for (const PackedWeight& w : group.weights) weights_.emplace(w.handle().unsafeGetTensorImpl(), w);
  }

  // One step of one parameter, whose state.step() counts it already. `offset` chooses the random bits.
  virtual void update_packed(const torch::optim::OptimizerOptions& options, const PackedWeight& w, const torch::Tensor& grad,
                             PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) = 0;
  virtual void update_dense(const torch::optim::OptimizerOptions& options, torch::Tensor& param, const torch::Tensor& grad,
                            PackedParamState& state) = 0;

 private:
  template <class Options>
  static std::vector<torch::optim::OptimizerParamGroup> groups_of(const std::vector<PackedParamGroup<Options>>& groups,
                                                                  const Options& defaults) {
    std::vector<torch::optim::OptimizerParamGroup> out;
    for (const auto& group : groups) {
      std::vector<torch::Tensor> params;
      for (const PackedWeight& w : group.weights) params.push_back(w.handle());
      params.insert(params.end(), group.params.begin(), group.params.end());
      out.emplace_back(std::move(params), std::make_unique<Options>(group.options.value_or(defaults)));
    }
    return out;
  }
  void update(size_t group, int64_t position, torch::Tensor& param, const OptionalTensor& grad_factor);

  std::unordered_map<void*, PackedWeight> weights_;  // by handle
  bool in_backward_ = false;
};

// Throws c10::ValueError naming the optimizer, the option and its value.
void check_option(const char* optimizer, const char* name, double value);        // at least 0
void check_beta(const char* optimizer, const char* name, double value);          // 0 <= value < 1
void check_moment(const char* optimizer, const char* name, const std::string&);  // float32, bfloat16, 8bit or 4bit

// (values, absmax or undefined) of a moment of `kind`, zeros.
std::pair<torch::Tensor, torch::Tensor> fresh_moment(const std::string& kind, const PackedWeight& w);

// The weights of all subbyte::nn::Linear, Embedding, EmbeddingBag and MPQLinear in `module` (also those inside BitLinear and
// MultiTernaryLinear), in order. They share its tensors and handles. Binary embeddings are not among them: their gradients are
// sparse, and their own update_ moves the touched rows.
std::vector<PackedWeight> packed_weights(const torch::nn::Module& module);

}  // namespace subbyte::optim
