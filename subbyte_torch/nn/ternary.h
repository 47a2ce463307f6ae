// Linear layers of ternary weights that train, pack and run: BitLinear (Ma et al., "The era of 1-bit LLMs", 2024) and
// MultiTernaryLinear, whose weight is a sum of ternary terms.
//   y = sum_i (x T_i^T) * gamma_i + bias        T_i [N, K] in {-1, 0, 1}, gamma_i [N]
#pragma once
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/archive.h>

#include <iosfwd>
#include <string>
#include <utility>
#include <vector>

#include "subbyte_torch/nn/linear.h"
#include "subbyte_torch/nn/quantize.h"
#include "subbyte_torch/ops/ternary.h"

namespace subbyte {

// Ternary values [N, K] or [terms, N, K], int8 or floating point, and their scales [N] or [terms, N] as a 2-bit packed weight
// of terms * N rows. Throws c10::ValueError for other values, for which it waits for the device.
PackedWeight pack_ternary(const torch::Tensor& trits, const torch::Tensor& gamma);

}  // namespace subbyte

namespace subbyte::nn {

// kLatent  a float weight that every forward pass makes ternary, x rounded by activation_quant, straight-through gradients:
//          quantization aware training.
// kPacked  a packed weight that trains as it is: its dense gradient is packed_weight().handle().grad(), its step
//          packed_weight().apply_update_().
// kFrozen  the same without gradient: inference. With 8 activation bits both packed states round x to int8 and multiply
//          integers (linear_a8).
enum class TernaryState { kLatent, kPacked, kFrozen };

struct TernaryLinearOptions {
  TernaryLinearOptions(int64_t in_features_, int64_t out_features_) : in_features(in_features_), out_features(out_features_) {}
  int64_t in_features, out_features;
  bool bias = true;
  int64_t terms = 1;
  TernaryState state = TernaryState::kLatent;
  // The rule of ternary_decompose: "absmean" or "threshold", one scale a row or one for the matrix.
  std::string method = "absmean";
  bool per_channel = false;
  double threshold = 0.7;
  // 0: x keeps its precision. Otherwise 2 to 24; 8 in the packed states.
  int64_t activation_bits = 8;
};

// Latent: parameter `weight` [N, K]. Packed and frozen: a child module `packed` that holds the codes and scales of terms * N
// rows. Parameter `bias` [N] or none. torch::save and torch::load keep what is there; loading needs a module in the same state.
template <class Derived>
class TernaryLinear : public torch::nn::Cloneable<Derived> {
 public:
  explicit TernaryLinear(TernaryLinearOptions options_) : options(std::move(options_)) { reset(); }

  // Fresh weights, initialised as torch::nn::Linear's.
  void reset() override;
  torch::Tensor forward(const torch::Tensor& x);
  void pretty_print(std::ostream& stream) const override;
  // c10::ValueError for values of another shape, which leave the module as it was.
  void load(torch::serialize::InputArchive& archive) override;

  // Changes the state; latent values are packed, or made of the packed ones. Parameters are other tensors from then on.
  void enter(TernaryState state);
  // [terms, N, K] int8 and [terms, N] float32, in every state.
  std::pair<torch::Tensor, torch::Tensor> ternary_parts() const;
  torch::Tensor W_ternary() const { return without_single_term(ternary_parts().first); }
  torch::Tensor gamma() const { return without_single_term(ternary_parts().second); }
  // In the packed states.
  PackedWeight& packed_weight();

  TernaryLinearOptions options;
  torch::Tensor weight;  // latent state only
  torch::Tensor bias;

 protected:
  static const char* module_name() { return Derived::kModuleName; }  // Derived is complete only inside functions

 private:
  torch::Tensor without_single_term(const torch::Tensor& t) const { return Derived::kShowsTerms ? t : t.select(0, 0); }
  void check_options() const;
  void set_packed(PackedWeight packed);

  Linear packed_{nullptr};
};

class BitLinearImpl : public TernaryLinear<BitLinearImpl> {
 public:
  static constexpr const char* kModuleName = "BitLinear";
  static constexpr bool kShowsTerms = false;
  BitLinearImpl(int64_t in_features, int64_t out_features) : BitLinearImpl(TernaryLinearOptions(in_features, out_features)) {}
  // options.terms must be 1.
  explicit BitLinearImpl(TernaryLinearOptions options_);
};

// Its W_ternary() is [terms, N, K], its gamma() [terms, N]. Terms are found greedily, each a scale a row, by default.
class MultiTernaryLinearImpl : public TernaryLinear<MultiTernaryLinearImpl> {
 public:
  static constexpr const char* kModuleName = "MultiTernaryLinear";
  static constexpr bool kShowsTerms = true;
  MultiTernaryLinearImpl(int64_t in_features, int64_t out_features, int64_t terms)
      : MultiTernaryLinearImpl(default_options(in_features, out_features, terms)) {}
  explicit MultiTernaryLinearImpl(TernaryLinearOptions options_) : TernaryLinear(std::move(options_)) {}

  static TernaryLinearOptions default_options(int64_t in_features, int64_t out_features, int64_t terms);
};

class BitLinear : public torch::nn::ModuleHolder<BitLinearImpl> {
 public:
  using torch::nn::ModuleHolder<BitLinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = BitLinearImpl;
  // Copies weight and bias; sizes and bias of `options` are the layer's.
  static BitLinear from_linear(const torch::nn::Linear& layer, TernaryLinearOptions options = {0, 0});
};

class MultiTernaryLinear : public torch::nn::ModuleHolder<MultiTernaryLinearImpl> {
 public:
  using torch::nn::ModuleHolder<MultiTernaryLinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = MultiTernaryLinearImpl;
  static MultiTernaryLinear from_linear(const torch::nn::Linear& layer, int64_t terms,
                                        TernaryState state = TernaryState::kLatent, int64_t activation_bits = 8);
};

// Replaces torch::nn::Linear by BitLinear in every torch::nn::Sequential inside `module`. What else holds such layers cannot be
// exchanged from outside: those are named in out_of_reach (see quantize_).
QuantizeReport convert_linear_to_bitlinear(torch::nn::Module& module, const TernaryLinearOptions& options = {0, 0},
                                           const std::vector<std::string>& skip = {});

}  // namespace subbyte::nn
