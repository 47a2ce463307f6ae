// Layers whose weights and activations are integers of 2 to 8 bits on learned steps, trained from a float master weight.
// Formulas and gradients: subbyte_torch/ops/quantized.h. Life of a layer: construct (or from_float), train,
// generate_quantized_weight(true), save, run.
//
// Steps start at 2 mean|v| / d: d = sqrt(2^(bits-1) - 1) with init "lsq", or with "bie" (4 and 8 bits) bitorch-engine's 11.269
// for activations and 5.6345 (4 bits) or 11.269 for weights. The weight's step is set with the weight, those of activations by
// the first batch in training. Whether that has happened is part of the archive, so that a step which training drives to 0
// stays.
#pragma once
#include <torch/expanding_array.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/archive.h>

#include <array>
#include <iosfwd>
#include <string>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::nn {

struct StepOptions {
  int64_t bits = 4;
  std::string init = "lsq";  // or "bie"
  double eps = 1e-5;         // a step below it counts as eps
};

// The part that concerns the steps of activations.
template <class Derived>
class StepModule : public torch::nn::Cloneable<Derived> {
 public:
  bool activation_initialised() const { return activation_initialised_; }
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  // Throws ValueError naming `op` for options that mean nothing.
  void check_options(const char* op, const StepOptions& options) const;
  // In training, the first values; in evaluation, c10::Error when there are none yet.
  void make_ready(const StepOptions& options, std::initializer_list<std::pair<torch::Tensor, torch::Tensor>> steps);
  void initialise(const StepOptions& options, std::initializer_list<std::pair<torch::Tensor, torch::Tensor>> steps);

  bool activation_initialised_ = false;
};

// What QuantizedLinear and QuantizedConv2d share.
template <class Derived>
class QuantizedWeightModule : public StepModule<Derived> {
 public:
  torch::Tensor weight;  // float; undefined once dropped
  // uint8 [N, ceil(K bits / 8)], or [0] while not packed; made again when the weight has changed.
  torch::Tensor qweight;
  torch::Tensor scale_a, scale_w;  // float32 scalars
  torch::Tensor bias_a;            // shift of the input
  torch::Tensor bias;              // may be undefined

  void reset() override;
  // The weight's step for the weight as it is; construction, from_float and set_weight_data have called it.
  void prepare_params();
  // Takes values of the weight's shape; the weight stays trainable.
  void set_weight_data(const torch::Tensor& w);
  // Takes codes and drops the float weight.
  void set_quantized_weight_data(const torch::Tensor& codes);
  // Packs the weight; with qweight_only the float weight goes, and the layer runs but trains no more.
  void generate_quantized_weight(bool qweight_only = false);
  bool packed() const { return qweight.dim() == 2; }
  // x + bias_a; gives scale_a its first value from x if it has none.
  torch::Tensor set_activation(const torch::Tensor& x);
  // [N, K], one scale a row.
  PackedWeight packed_weight();

  void train(bool on = true) override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  // {weight, none} or {none, codes}: a float weight that is trained or wants a gradient is used as it is; both give the same
  // bits.
  std::pair<OptionalTensor, OptionalTensor> operands();
  // A shift or bias in x's type; autocast casts it itself.
  static OptionalTensor like(const torch::Tensor& v, const torch::Tensor& x);
  void place_weight(torch::Tensor value);
  void place_codes(const torch::Tensor& value);
  void forget_packed();
  void refresh_packed();
  virtual const StepOptions& step_options() const = 0;
  virtual bool wants_bias() const = 0;
  virtual std::vector<int64_t> weight_sizes() const = 0;
  virtual int64_t shift_count() const = 0;
  virtual torch::Tensor shift_of(const torch::Tensor& x) const = 0;  // bias_a, to be added to x
  int64_t columns() const;

 private:
  struct Versions {
    const void *weight, *step;
    uint32_t weight_version, step_version;
    bool operator==(const Versions&) const = default;
  };
  std::optional<Versions> versions() const;
  void need_weight(const char* what) const;

  bool weight_dropped_ = false;
  std::optional<Versions> packed_from_;
};

struct QuantizedLinearOptions : StepOptions {
  QuantizedLinearOptions(int64_t in_features_, int64_t out_features_)
      : in_features(in_features_), out_features(out_features_) {}
  int64_t in_features, out_features;
  bool bias = false;
  bool clip_weight_gradient = true;
};

// y = scale_a scale_w q(x + bias_a) q(weight)^T + bias, [..., K] -> [..., N].
class QuantizedLinearImpl : public QuantizedWeightModule<QuantizedLinearImpl> {
 public:
  QuantizedLinearImpl(int64_t in_features, int64_t out_features)
      : QuantizedLinearImpl(QuantizedLinearOptions(in_features, out_features)) {}
  explicit QuantizedLinearImpl(const QuantizedLinearOptions& options);
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  QuantizedLinearOptions options;

 protected:
  const StepOptions& step_options() const override { return options; }
  bool wants_bias() const override { return options.bias; }
  std::vector<int64_t> weight_sizes() const override { return {options.out_features, options.in_features}; }
  int64_t shift_count() const override { return options.in_features; }
  torch::Tensor shift_of(const torch::Tensor&) const override { return bias_a; }
};

class QuantizedLinear : public torch::nn::ModuleHolder<QuantizedLinearImpl> {
 public:
  using torch::nn::ModuleHolder<QuantizedLinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = QuantizedLinearImpl;
  // A quantized copy. Sizes and bias of `options` are the layer's.
  static QuantizedLinear from_float(const torch::nn::Linear& layer, const StepOptions& options = {});
};

struct QuantizedConv2dOptions : StepOptions {
  QuantizedConv2dOptions(int64_t in_channels_, int64_t out_channels_, torch::ExpandingArray<2> kernel_size_)
      : in_channels(in_channels_), out_channels(out_channels_), kernel_size(kernel_size_) {}
  int64_t in_channels, out_channels;
  torch::ExpandingArray<2> kernel_size, stride = 1, padding = 0, dilation = 1;
  int64_t groups = 1;
  bool bias = false;
  bool clip_weight_gradient = true;
};

// The same as a convolution, [N, C, H, W] or [C, H, W]; padding is zeros around x + bias_a.
class QuantizedConv2dImpl : public QuantizedWeightModule<QuantizedConv2dImpl> {
 public:
  QuantizedConv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
      : QuantizedConv2dImpl(QuantizedConv2dOptions(in_channels, out_channels, kernel_size)) {}
  explicit QuantizedConv2dImpl(const QuantizedConv2dOptions& options);
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  QuantizedConv2dOptions options;

 protected:
  const StepOptions& step_options() const override { return options; }
  bool wants_bias() const override { return options.bias; }
  std::vector<int64_t> weight_sizes() const override {
    return {options.out_channels, options.in_channels / options.groups, (*options.kernel_size)[0], (*options.kernel_size)[1]};
  }
  int64_t shift_count() const override { return options.in_channels; }
  torch::Tensor shift_of(const torch::Tensor&) const override { return bias_a.reshape({-1, 1, 1}); }
};

class QuantizedConv2d : public torch::nn::ModuleHolder<QuantizedConv2dImpl> {
 public:
  using torch::nn::ModuleHolder<QuantizedConv2dImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = QuantizedConv2dImpl;
  // A quantized copy of a convolution with zero padding.
  static QuantizedConv2d from_float(const torch::nn::Conv2d& layer, const StepOptions& options = {});
};

// x [..., M, K] times z [..., N, K] transposed, each on its own learned step.
class QuantizedMatmulImpl : public StepModule<QuantizedMatmulImpl> {
 public:
  explicit QuantizedMatmulImpl(const StepOptions& options = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  // Gives both steps their first values if they have none.
  void set_activation_scale(const torch::Tensor& x, const torch::Tensor& z);
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& z);

  StepOptions options;
  torch::Tensor scale_x, scale_z;  // float32 scalars
};
TORCH_MODULE(QuantizedMatmul);

struct QuantizedAttentionOptions : StepOptions {
  QuantizedAttentionOptions(int64_t embed_dim_, int64_t num_heads_) : embed_dim(embed_dim_), num_heads(num_heads_) {}
  int64_t embed_dim, num_heads;
  bool bias = true;
  double dropout = 0;
};

// Multi-head attention: projections are QuantizedLinear, scores and context QuantizedMatmul.
class QuantizedAttentionImpl : public torch::nn::Cloneable<QuantizedAttentionImpl> {
 public:
  QuantizedAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : QuantizedAttentionImpl(QuantizedAttentionOptions(embed_dim, num_heads)) {}
  explicit QuantizedAttentionImpl(const QuantizedAttentionOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  // [batch, seq, embed_dim]. key and value, when undefined, are query and key. mask broadcasts to [batch, heads, queries,
  // keys]: bool, where true may be attended to, or numbers added to the scores.
  torch::Tensor forward(const torch::Tensor& query, torch::Tensor key = {}, torch::Tensor value = {},
                        const torch::Tensor& mask = {}, bool is_causal = false);

  QuantizedAttentionOptions options;
  QuantizedLinear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, out_proj{nullptr};
  QuantizedMatmul scores{nullptr}, context{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())},
                           {3, torch::nn::AnyValue(torch::Tensor())}, {4, torch::nn::AnyValue(false)})
};
TORCH_MODULE(QuantizedAttention);

}  // namespace subbyte::nn
