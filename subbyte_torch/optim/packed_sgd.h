// torch::optim::SGD on packed weights: momentum, dampening, Nesterov, weight decay added to the gradient; see
// packed_optimizer.h.
#pragma once
#include "subbyte_torch/optim/packed_optimizer.h"

namespace subbyte::optim {

struct PackedSGDOptions : public torch::optim::OptimizerCloneableOptions<PackedSGDOptions> {
  PackedSGDOptions(double lr = 1e-3);  // NOLINT: as torch::optim's options, made from a rate
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(double, momentum) = 0;
  TORCH_ARG(double, dampening) = 0;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, nesterov) = false;
  // Of packed weights, kept when there is momentum: "float32", "bfloat16", "8bit" or "4bit".
  TORCH_ARG(std::string, moment) = "8bit";
  TORCH_ARG(bool, maximize) = false;
  TORCH_ARG(int64_t, seed) = 0;

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(const double lr) override;
};

class PackedSGD : public PackedOptimizer {
 public:
  PackedSGD(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedSGDOptions defaults = {});
  explicit PackedSGD(const std::vector<PackedParamGroup<PackedSGDOptions>>& groups, PackedSGDOptions defaults = {});

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  void update_packed(const torch::optim::OptimizerOptions& options, const PackedWeight& w, const torch::Tensor& grad,
                     PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) override;
  void update_dense(const torch::optim::OptimizerOptions& options, torch::Tensor& param, const torch::Tensor& grad,
                    PackedParamState& state) override;
};

}  // namespace subbyte::optim
