// Steps by the sign of an averaged gradient, with one moment (Lion: Chen et al., 2023), on packed weights and ordinary
// parameters; see packed_optimizer.h.
//
//   c = beta1 m + (1 - beta1) g;   m <- beta2 m + (1 - beta2) g;   w <- w (1 - lr weight_decay) - lr sign(c) where |c| >
//   threshold
//
// With equal betas it steps by the sign of momentum. On 1-bit weights a step of one level or more (lr at least the scale, 2 s)
// flips every weight whose average exceeds the threshold and points the other way (Bop: Helwegen et al., 2019).
#pragma once
#include <tuple>

#include "subbyte_torch/optim/packed_optimizer.h"

namespace subbyte::optim {

struct PackedLionOptions : public torch::optim::OptimizerCloneableOptions<PackedLionOptions> {
  PackedLionOptions(double lr = 1e-4);  // NOLINT: as torch::optim's options, made from a rate
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-4;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.99);
  TORCH_ARG(double, weight_decay) = 0;
  // Averages of at most this size do not step.
  TORCH_ARG(double, threshold) = 0;
  // Of packed weights: "float32", "bfloat16", "8bit" or "4bit".
  TORCH_ARG(std::string, moment) = "8bit";
  TORCH_ARG(bool, maximize) = false;
  TORCH_ARG(int64_t, seed) = 0;

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(const double lr) override;
};

class PackedLion : public PackedOptimizer {
 public:
  PackedLion(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedLionOptions defaults = {});
  explicit PackedLion(const std::vector<PackedParamGroup<PackedLionOptions>>& groups, PackedLionOptions defaults = {});

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  void update_packed(const torch::optim::OptimizerOptions& options, const PackedWeight& w, const torch::Tensor& grad,
                     PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) override;
  void update_dense(const torch::optim::OptimizerOptions& options, torch::Tensor& param, const torch::Tensor& grad,
                    PackedParamState& state) override;
};

}  // namespace subbyte::optim
