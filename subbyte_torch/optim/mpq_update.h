// The update rule of MPQ layers: Adam-like moments on the dense gradient, a step of the dequantized values, codes encoded
// again.
//
//   m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2;   r = project_back(m / (sqrt(v) + eps))
//   eta = lr * (correct_bias ? sqrt(1 - beta2^t) / (1 - beta1^t) : 1)
//   W <- W - eta r;   W <- W - lr weight_decay W
//   where t mod zeros_every = 0: the zero of each group follows the mean of its values' steps, mean(eta r) over the group's
//   rows:
//     offsets (w = s q + o):   o <- o - mean            rounded to the offsets' type
//     zeros (w = s (q - z)):   z <- z + mean / s        rounded to an integer as the codes are, within [zeros_low, zeros_low +
//                                                       2^bits - 1]; groups of scale 0 keep theirs
//   codes <- W on the scales and the *new* zeros, to nearest or stochastically
//
// Moving a zero shifts the grid under values that stay where the step put them; what it changes is which values are clamped.
// Nearest rounding drops every step below half a level, so that low-bit weights do not train; stochastic rounding is unbiased.
// eps is added to the uncorrected sqrt(v). Deviations from the original rule: weight_decay is applied, zeros carry the factor
// 1/s and are rounded, not truncated, and codes are packed with the zeros that the layer then has.
#pragma once
#include <torch/types.h>

#include <functional>
#include <optional>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::ops {

// m / (sqrt(v) + eps) in the moments' type, after updating both with `grad` (any float type, shape of the moments).
at::Tensor mpq_moments_(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& grad, double beta1,
                        double beta2, double eps);
// The part of the rule that writes the weight: W <- (1 - decay) (W - delta), delta [N, K] = eta r. parent: see ops/mpq.h; where
// it is given and zeros move, a CUDA device is waited for. integer_zeros false: zeros keep fractions. rounding "nearest" or
// "stochastic" with seed and offset (ops/quantize).
void mpq_apply_(SB_PACKED_PARAMS, const OptionalTensor& parent, const at::Tensor& delta, double decay, bool move_zeros,
                bool integer_zeros = true, int64_t zeros_low = 1, std::string_view rounding = "stochastic", int64_t seed = 0,
                int64_t offset = 0);

}  // namespace subbyte::ops

namespace subbyte::optim {

struct MpqUpdateOptions {
  double lr = 1e-4, weight_decay = 0.0, beta1 = 0.99, beta2 = 0.9999, eps = 1e-6;
  bool correct_bias = true;
  int64_t zeros_every = 5;  // 0: zeros are fixed
  bool integer_zeros = true;
  int64_t zeros_low = 1;  // smallest zero that the layer's layout can say: 1 for GPTQ v1 and GBA, 0 for GPTQ v2
  bool stochastic = true;
  int64_t seed = 0;
  std::optional<int64_t> offset;  // of the random bits; none: the step
};

// One step. `step` is t, 1 at the first call. grad has the moments' shape: [N, K], or what a projector made of it, and then
// project_back takes r to [N, K]. parent [G'] or undefined as an import gave it. Throws c10::ValueError naming the argument.
// A NaN or infinite gradient on the CPU throws after the moments have taken it; the weight is then as it was.
void mpq_update_(PackedWeight& weight, const torch::Tensor& grad, const torch::Tensor& exp_avg, const torch::Tensor& exp_avg_sq,
                 int64_t step, const MpqUpdateOptions& options = {},
                 const std::function<torch::Tensor(const torch::Tensor&)>& project_back = {}, const torch::Tensor& parent = {});

}  // namespace subbyte::optim
