// torch::nn::Embedding with a packed table.
#pragma once
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
  // The gradient is a sparse tensor of the looked-up rows.
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
  // Throws c10::ValueError for a layer with max_norm: renormalising packed rows on look-up is not done.
  static Embedding from_float(const torch::nn::Embedding& layer, const QuantizeOptions& quantize = {});
  // A module on the same codes and scales without the residual: what is deployed.
  Embedding drop_residual() const;
};

}  // namespace subbyte::nn
