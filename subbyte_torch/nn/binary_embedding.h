// Embedding tables of one bit a weight, and bags of them, that train by moving the bits of the rows a batch touched.
#pragma once
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>

#include <iosfwd>
#include <string>

#include "subbyte_torch/nn/packed_module.h"

namespace subbyte::nn {

struct BinaryEmbeddingOptions {
  BinaryEmbeddingOptions(int64_t num_embeddings_, int64_t embedding_dim_)
      : num_embeddings(num_embeddings_), embedding_dim(embedding_dim_) {}
  int64_t num_embeddings, embedding_dim;
  // A row of value 0 that gets no gradient (and counts in no bag); none when negative.
  int64_t padding_idx = -1;
  // The gradient is a sparse COO tensor of the touched rows; otherwise dense.
  bool sparse = true;
  // BinaryEmbedding alone: the factors of the rows are a parameter `scale` [V, 1], dL/dscale[t] = sum of G (2 bit - 1).
  bool train_scale = false;
  // BinaryEmbeddingBag alone: "majority", "sum" or "mean".
  std::string mode = "majority";
};

// How update_ moves bits: the rules of embedding_update.h.
struct BinaryUpdate {
  std::string rule = "momentum";  // or "descent", "xor"
  double lr = 1.0, beta = 0.99;   // of the average; lr in [0, 1]
  // Of the rounding of the average; none: drawn from PyTorch's default CPU generator, another one at every step.
  std::optional<int64_t> seed = std::nullopt;
  int64_t offset = 0;
};

// int8 moving averages of the signs of gradients, one row for each table row that was ever touched. A row that comes for the
// first time starts at -sign(w) * start * 127.
struct RowMomentum {
  double start = 0.5;
  torch::Tensor rows, slots;  // int64 [S], rows sorted; undefined before the first use
  torch::Tensor momentum;     // int8 [at least S, D]

  // The row of `momentum` for each of `touched` (int64, sorted, distinct); new ones are made from codes.
  torch::Tensor slots_of(const torch::Tensor& touched, const torch::Tensor& codes, int64_t embedding_dim);
  int64_t size() const { return rows.defined() ? rows.size(0) : 0; }
};

template <class Derived>
class BinaryTable : public PackedModule<Derived> {
 public:
  explicit BinaryTable(const BinaryEmbeddingOptions& options_) : options(options_) {}

  // Fresh bits; a row's scale is what a row of normal values would have.
  void reset() override;
  // Packs float [V, D]: W' = W - mean(W), row padding_idx 0, bit = W' >= 0, scale of a row = mean |W'| over its D columns.
  void reset_parameters(const torch::Tensor& w);
  // The factor of each row [V, 1]: value = scale (2 bit - 1). The parameter itself where it is trained.
  torch::Tensor scale() const { return trained_scale_.defined() ? trained_scale_ : this->weight_.scales.div(2); }
  // Moves the bits of the rows that the gradient touched, and drops the gradient. Elements whose gradient is 0, NaN or infinite
  // stay.
  void update_(const BinaryUpdate& update = {});

  BinaryEmbeddingOptions options;
  // State of rule "momentum"; not part of the archive.
  RowMomentum momentum;

 protected:
  // Puts the table of float values into the module.
  void place(const torch::Tensor& w);
  torch::Tensor trained_scale_;
};

// y[..., d] = scale[t] (2 bit[t, d] - 1), t = indices[...]
class BinaryEmbeddingImpl : public BinaryTable<BinaryEmbeddingImpl> {
 public:
  BinaryEmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : BinaryEmbeddingImpl(BinaryEmbeddingOptions(num_embeddings, embedding_dim)) {}
  explicit BinaryEmbeddingImpl(const BinaryEmbeddingOptions& options);
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& indices);
};

class BinaryEmbedding : public torch::nn::ModuleHolder<BinaryEmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<BinaryEmbeddingImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = BinaryEmbeddingImpl;
  // Throws c10::ValueError for a layer with max_norm.
  static BinaryEmbedding from_float(const torch::nn::Embedding& layer);
};

// One row a bag: +1 where at least half of its bits are 1, else -1 (majority, straight-through gradient), or sum or mean of the
// values. subbyte/ops/embedding_bag/embedding_bag.h.
class BinaryEmbeddingBagImpl : public BinaryTable<BinaryEmbeddingBagImpl> {
 public:
  BinaryEmbeddingBagImpl(int64_t num_embeddings, int64_t embedding_dim)
      : BinaryEmbeddingBagImpl(BinaryEmbeddingOptions(num_embeddings, embedding_dim)) {}
  explicit BinaryEmbeddingBagImpl(const BinaryEmbeddingOptions& options);
  void pretty_print(std::ostream& stream) const override;
  // indices [bags, L], or [count] with offsets [bags]; per_sample_weights like indices, mode sum alone.
  torch::Tensor forward(const torch::Tensor& indices, const torch::Tensor& offsets = {},
                        const torch::Tensor& per_sample_weights = {});

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};
TORCH_MODULE(BinaryEmbeddingBag);

}  // namespace subbyte::nn
