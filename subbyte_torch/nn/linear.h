// torch::nn::Linear with a packed weight: y = x W^T + b.
#pragma once
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <iosfwd>

#include "subbyte_torch/nn/packed_module.h"

namespace subbyte::nn {

struct LinearOptions {
  LinearOptions(int64_t in_features_, int64_t out_features_) : in_features(in_features_), out_features(out_features_) {}
  int64_t in_features, out_features;
  bool bias = true;
  QuantizeOptions quantize;
  // 0: x keeps its precision. 8: x is rounded to int8 on the way in (linear_a8), straight-through gradient.
  int activation_bits = 0;
  std::string x_scale = "row";  // or "row_group"; with activation_bits = 8
};

class LinearImpl : public PackedModule<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features) : LinearImpl(LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const LinearOptions& options);
  // Takes the weight as it is; `bias` may be undefined.
  LinearImpl(PackedWeight weight, torch::Tensor bias, int activation_bits = 0, std::string x_scale = "row");

  // Fresh weights, initialised as torch::nn::Linear's and packed.
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  LinearOptions options;
  torch::Tensor bias;
};

// Linear: a module holder, as torch::nn's.
class Linear : public torch::nn::ModuleHolder<LinearImpl> {
 public:
  using torch::nn::ModuleHolder<LinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = LinearImpl;
  // Packs the weight of a float layer; the bias is copied. The float layer is left alone. in_features and out_features of
  // `options` are the layer's.
  static Linear from_float(const torch::nn::Linear& layer, const QuantizeOptions& quantize = {}, int activation_bits = 0);
  // A module on the same codes, scales and bias without the residual: what is deployed.
  Linear drop_residual() const;
};

}  // namespace subbyte::nn
