// DiodeMix: one optimizer for ordinary, binary and n-bit weights (Guo et al., "Diode", 2024). t counts the steps of a
// parameter, g is its gradient.
//
//   ordinary  (floating point tensors)
//             m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
//             eta = lr sqrt(1 - beta2^t) / (1 - beta1^t), or lr without correct_bias
//             w <- w - eta m / (sqrt(v) + eps);  then w <- w - lr weight_decay w, on the updated w
//   n-bit     (packed weights)  the same step on the values, which are encoded again on the weight's own grid
//   binary    (packed weights of format "sign" without zeros, offsets or residual; tensors in a group whose options say so)
//             l <- l + (1 - beta1)(g - l);  s <- s + (1 - beta2)(lr sign(l) - s);  where -sign(s) is not sign(w), w <- -w
//             s starts at -sign(w) delta, delta uniform in [0, 0.001); sign(0) of a weight and of -s is +1
//   table     (binary with a sparse gradient)  s <- s + (1 - beta2)(lr sign(g) - s) and the flips, on the gradient's rows alone
// eps is added to the uncorrected sqrt(v). With galore.rank > 0 the gradients of matrices are projected (galore.h), and
// m / (sqrt(v) + eps), or l, is taken back. weight_decay has no effect on binary weights, for which it warns. A gradient
// element that is NaN or infinite changes neither value nor state of packed and binary weights; where it is projected it counts
// as 0.
//
// State is float32 (float64 for float64 parameters), or of 16 or 8 bits (moments.h), the step a number on the host: nothing
// waits for the device but the singular vectors of GaLore and the touched rows of a sparse gradient.
#pragma once
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "subbyte_torch/optim/galore.h"
#include "subbyte_torch/packed_weight.h"

namespace subbyte::optim {

struct DiodeMixOptions : public torch::optim::OptimizerCloneableOptions<DiodeMixOptions> {
  explicit DiodeMixOptions(double lr = 1e-4) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-4;
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.99, 0.9999);
  TORCH_ARG(double, eps) = 1e-6;
  TORCH_ARG(double, weight_decay) = 0.0;
  TORCH_ARG(bool, correct_bias) = true;
  // Tensors of the group are binary weights: their sign is the weight.
  TORCH_ARG(bool, binary) = false;
  // Of packed n-bit weights: stochastic rounding, whose seed is drawn from PyTorch's default CPU generator; otherwise nearest.
  TORCH_ARG(bool, stochastic) = true;
  // Bits of each moment: 32, 16 (bfloat16) or 8 (blocks of 256). For l, s, m and v of 1-bit weights 64 bits a weight, or 32, or
  // 16.
  TORCH_ARG(int64_t, state_bits) = 32;
  // rank 0: no projection.
  TORCH_ARG(int64_t, rank) = 0;
  TORCH_ARG(int64_t, update_proj_gap) = 200;
  TORCH_ARG(double, scale) = 1.0;
  TORCH_ARG(std::string, proj_type) = "std";

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override { return lr(); }
  void set_lr(double lr) override { lr_ = lr; }
};

struct DiodeMixParamState : public torch::optim::OptimizerCloneableParamState<DiodeMixParamState> {
  TORCH_ARG(int64_t, step) = 0;
  TORCH_ARG(torch::Tensor, exp_avg_l);  // m, or l
  TORCH_ARG(torch::Tensor, exp_avg_s);  // v, or s
  TORCH_ARG(torch::Tensor, exp_avg_l_absmax);
  TORCH_ARG(torch::Tensor, exp_avg_s_absmax);
  TORCH_ARG(double, bound) = 0;  // what 127 stands for in the int8 state of a table
  TORCH_ARG(torch::Tensor, galore_left);
  TORCH_ARG(torch::Tensor, galore_right);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

class DiodeMix : public torch::optim::Optimizer {
 public:
  // Throws c10::ValueError for lr, eps or weight_decay below 0, betas outside [0, 1) and what GaLoreProjector refuses; groups
  // added later are checked at their first step.
  explicit DiodeMix(const std::vector<torch::optim::OptimizerParamGroup>& groups, DiodeMixOptions defaults = DiodeMixOptions());
  explicit DiodeMix(std::vector<torch::Tensor> params, DiodeMixOptions defaults = DiodeMixOptions())
      : DiodeMix(std::vector<torch::optim::OptimizerParamGroup>{torch::optim::OptimizerParamGroup(std::move(params))},
                 std::move(defaults)) {}

  // Adds a packed weight to a group: its handle becomes a parameter of the group. The weight must outlive the optimizer and
  // keep its handle (do not move it to another device after that).
  void add_packed(PackedWeight& weight, size_t group = 0);

  // Returns the closure's loss, or an undefined tensor. Throws c10::Error for a sparse gradient of anything but a binary table.
  torch::Tensor step(LossClosure closure = nullptr) override;
  // State and options, by the order of parameters: load into an optimizer that was built alike.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void step_one(const torch::Tensor& parameter, const DiodeMixOptions& options);

  std::map<void*, PackedWeight*> packed_;
};

}  // namespace subbyte::optim
