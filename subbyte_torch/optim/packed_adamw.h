// torch::optim::AdamW (Loshchilov and Hutter, 2019) on packed weights, with low-bit moments; see packed_optimizer.h.
#pragma once
#include <tuple>

#include "subbyte_torch/optim/packed_optimizer.h"

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

class PackedAdamW : public PackedOptimizer {
 public:
  PackedAdamW(std::vector<PackedWeight> weights, std::vector<torch::Tensor> params, PackedAdamWOptions defaults = {});
  explicit PackedAdamW(const std::vector<PackedParamGroup<PackedAdamWOptions>>& groups, PackedAdamWOptions defaults = {});

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  void update_packed(const torch::optim::OptimizerOptions& options, const PackedWeight& w, const torch::Tensor& grad,
                     PackedParamState& state, int64_t offset, const OptionalTensor& grad_factor) override;
  void update_dense(const torch::optim::OptimizerOptions& options, torch::Tensor& param, const torch::Tensor& grad,
                    PackedParamState& state) override;
};

}  // namespace subbyte::optim
