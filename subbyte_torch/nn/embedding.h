// torch::nn::Embedding and EmbeddingBag with a packed table. A look-up costs what it looks up.
#pragma once
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>

#include <iosfwd>

#include "subbyte_torch/nn/packed_module.h"

namespace subbyte::nn {

struct EmbeddingOptions {
  EmbeddingOptions(int64_t num_embeddings_, int64_t embedding_dim_)
      : num_embeddings(num_embeddings_), embedding_dim(embedding_dim_) {}
  int64_t num_embeddings, embedding_dim;
  // Its row gets no gradient; none when negative.
  int64_t padding_idx = -1;
  // The gradient is a sparse COO tensor of the rows that the batch named; otherwise dense.
  bool sparse = false;
  QuantizeOptions quantize;
};

class EmbeddingImpl : public PackedModule<EmbeddingImpl> {
 public:
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingImpl(EmbeddingOptions(num_embeddings, embedding_dim)) {}
  explicit EmbeddingImpl(const EmbeddingOptions& options);
  explicit EmbeddingImpl(PackedWeight weight, int64_t padding_idx = -1, bool sparse = false);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& indices);

  EmbeddingOptions options;
};

class Embedding : public torch::nn::ModuleHolder<EmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<EmbeddingImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = EmbeddingImpl;
  // Throws c10::ValueError for a layer with max_norm or scale_grad_by_freq, which packed tables do not have.
  static Embedding from_float(const torch::nn::Embedding& layer, const QuantizeOptions& quantize = {});
  // A module on the same codes and scales without the residual: what is deployed.
  Embedding drop_residual() const;
};

struct EmbeddingBagOptions : EmbeddingOptions {
  using EmbeddingOptions::EmbeddingOptions;
  std::string mode = "mean";  // or "sum"
};

// One row a bag of look-ups: subbyte/ops/embedding_bag/embedding_bag.h. BinaryEmbeddingBag takes majorities of bits.
class EmbeddingBagImpl : public PackedModule<EmbeddingBagImpl> {
 public:
  EmbeddingBagImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingBagImpl(EmbeddingBagOptions(num_embeddings, embedding_dim)) {}
  explicit EmbeddingBagImpl(const EmbeddingBagOptions& options);
  // The sizes of `options` are the weight's.
  EmbeddingBagImpl(PackedWeight weight, const EmbeddingBagOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  // indices [bags, L], or [count] with offsets [bags]; per_sample_weights like indices, mode sum alone. Look-ups of padding_idx
  // are left out.
  torch::Tensor forward(const torch::Tensor& indices, const torch::Tensor& offsets = {},
                        const torch::Tensor& per_sample_weights = {});

  EmbeddingBagOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};

class EmbeddingBag : public torch::nn::ModuleHolder<EmbeddingBagImpl> {
 public:
  using torch::nn::ModuleHolder<EmbeddingBagImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = EmbeddingBagImpl;
  // Throws c10::ValueError for a layer of mode max, with max_norm, scale_grad_by_freq or include_last_offset.
  static EmbeddingBag from_float(const torch::nn::EmbeddingBag& layer, const QuantizeOptions& quantize = {});
};

}  // namespace subbyte::nn
