// Modules whose weights and activations are signs: training keeps a float weight, deployment one bit a weight. Formulas and
// gradients: subbyte_torch/ops/binary.h.
#pragma once
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/archive.h>

#include <array>
#include <iosfwd>
#include <tuple>

namespace subbyte::nn {

// What BinaryLinear and BinaryConv2d share.
//   parameters  weight [N, ...] (no elements once only the signs are kept), bias_a (shift of the input), scale_a, bias
//   buffers     scale_w, qweight (uint8 [N, ceil(K/8)], canonical "sign" rows; no elements until packed), prepared and
//               scale_initialized (one bool each)
// torch::save and torch::load keep all of it; an archive without a float weight loads into a module that has one, and back.
class BinaryWeightModule : public torch::nn::Module {
 public:
  // Fresh weights, kaiming_uniform(sqrt(5)), scale_w = mean|W|, scale_a 1.
  void reset();
  // Once, before training, after the weight has been written to: scale_w = mean|W|, then W - mean(W). Later calls do nothing.
  void prepare_params();
  // scale_a = 2 mean|x|, 4 mean|x| when not symmetric. forward does it with the first batch in training.
  void initialize_scale(const torch::Tensor& x);
  // Packs the signs; with qweight_only the float weight goes.
  void generate_quantized_weight(bool qweight_only = false);
  bool has_float_weight() const { return float_weight_; }

  void train(bool on = true) override;
  void load(torch::serialize::InputArchive& archive) override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  torch::Tensor weight, bias_a, scale_a, bias;
  torch::Tensor scale_w, qweight, prepared, scale_initialized;

 protected:
  BinaryWeightModule(std::string name, std::vector<int64_t> weight_shape, int64_t shift_size, bool with_bias, bool symmetric);
  // The values of another module of the same options.
  void copy_from(const BinaryWeightModule& other, const std::optional<torch::Device>& device);
  void copy_float(const torch::Tensor& float_weight, const torch::Tensor& float_bias);

  // What the op takes: in training the float weight, else the packed signs, packed anew when the weight has changed since.
  struct Operands {
    std::optional<torch::Tensor> weight, codes, bias;
  };
  Operands operands();
  void start(const torch::Tensor& x);

 private:
  void convert(std::optional<torch::Device> device, std::optional<torch::Dtype> dtype, bool non_blocking);
  void set_weight_scale();
  void read_flags();

  std::vector<int64_t> weight_shape_;
  bool symmetric_, float_weight_ = true, prepared_ = false, scale_known_ = false;
  // The weight that qweight was made of; holds its storage, so that the address cannot be another's.
  torch::Tensor packed_from_;
  int64_t packed_version_ = -1;
};

struct BinaryLinearOptions {
  BinaryLinearOptions(int64_t in_features_, int64_t out_features_) : in_features(in_features_), out_features(out_features_) {}
  int64_t in_features, out_features;
  bool bias = false;
  bool symmetric = true;
};

class BinaryLinearImpl : public BinaryWeightModule {
 public:
  BinaryLinearImpl(int64_t in_features, int64_t out_features)
      : BinaryLinearImpl(BinaryLinearOptions(in_features, out_features)) {}
  explicit BinaryLinearImpl(const BinaryLinearOptions& options);
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  // x [..., in_features] -> [..., out_features].
  torch::Tensor forward(const torch::Tensor& x);

  BinaryLinearOptions options;

 private:
  friend class BinaryLinear;
};

class BinaryLinear : public torch::nn::ModuleHolder<BinaryLinearImpl> {
 public:
  using torch::nn::ModuleHolder<BinaryLinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = BinaryLinearImpl;
  // Copies weight and bias, then calls prepare_params().
  static BinaryLinear from_float(const torch::nn::Linear& layer, bool symmetric = true);
};

struct BinaryConv2dOptions {
  BinaryConv2dOptions(int64_t in_channels_, int64_t out_channels_, std::array<int64_t, 2> kernel_size_)
      : in_channels(in_channels_), out_channels(out_channels_), kernel_size(kernel_size_) {}
  int64_t in_channels, out_channels;
  std::array<int64_t, 2> kernel_size, stride = {1, 1}, padding = {0, 0}, dilation = {1, 1};
  int64_t groups = 1;
  int pad_value = 0;  // what positions outside the image count as: -1, 0 or 1
  bool bias = false;
  bool symmetric = true;
};

class BinaryConv2dImpl : public BinaryWeightModule {
 public:
  explicit BinaryConv2dImpl(const BinaryConv2dOptions& options);
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  // x [B, in_channels, H, W] -> [B, out_channels, OH, OW].
  torch::Tensor forward(const torch::Tensor& x);

  BinaryConv2dOptions options;

 private:
  friend class BinaryConv2d;
};

class BinaryConv2d : public torch::nn::ModuleHolder<BinaryConv2dImpl> {
 public:
  using torch::nn::ModuleHolder<BinaryConv2dImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = BinaryConv2dImpl;
  // Copies weight and bias, then calls prepare_params(). Throws c10::ValueError unless the padding is by numbers of zeros.
  static BinaryConv2d from_float(const torch::nn::Conv2d& layer, int pad_value = 0, bool symmetric = true);
};

// Trained clips x_clip and z_clip, set by the first batch in training to 2 mean|operand|.
class BinaryMatmulImpl : public torch::nn::Module {
 public:
  explicit BinaryMatmulImpl(bool symmetric = true);
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  void load(torch::serialize::InputArchive& archive) override;
  void initialize_clips(const torch::Tensor& x, const torch::Tensor& z);
  // x [..., M, K], z [..., N, K] -> [..., M, N].
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& z);

  torch::Tensor x_clip, z_clip, clip_initialized;

 private:
  bool symmetric_, clips_known_ = false;
};
TORCH_MODULE(BinaryMatmul);

struct BinaryAttentionOptions {
  BinaryAttentionOptions(int64_t input_dim_, int64_t hidden_dim_, int64_t num_heads_)
      : input_dim(input_dim_), hidden_dim(hidden_dim_), num_heads(num_heads_) {}
  int64_t input_dim, hidden_dim, num_heads;
  double dropout = 0.1;
  bool binary_scores = false;  // Q K^T is a product of signs too
  bool symmetric = true;
};

// Multi-head self-attention whose projections are binary: out(dropout(softmax(Q K^T / sqrt(head_dim))) V).
class BinaryAttentionImpl : public torch::nn::Module {
 public:
  explicit BinaryAttentionImpl(const BinaryAttentionOptions& options);
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  void prepare_params();
  void generate_quantized_weight(bool qweight_only = false);
  // x [batch, seq, input_dim]; mask [batch, 1, 1, seq] or [batch, 1, seq, seq], 0 hides (score -1e9). Returns the output
  // [batch, seq, hidden_dim] and the probabilities [batch, heads, seq, seq] after dropout.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x, const torch::Tensor& mask = {});

  BinaryAttentionOptions options;
  BinaryLinear q_linear{nullptr}, k_linear{nullptr}, v_linear{nullptr}, out_linear{nullptr};
  BinaryMatmul scores{nullptr};
  torch::nn::Dropout dropout{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(BinaryAttention);

}  // namespace subbyte::nn
