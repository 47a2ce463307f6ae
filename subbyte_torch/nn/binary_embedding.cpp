#include "subbyte_torch/nn/binary_embedding.h"

#include <cstring>
#include <limits>
#include <ostream>

#include "subbyte_torch/ops/embedding.h"

namespace subbyte::nn {
namespace {

const BinaryEmbeddingOptions& checked(const char* name, const BinaryEmbeddingOptions& options) {
  TORCH_CHECK_VALUE(options.num_embeddings >= 0 && options.embedding_dim >= 0, name, ": the table is [", options.num_embeddings,
                    ", ", options.embedding_dim, "], expected no negative size");
  TORCH_CHECK_VALUE(options.padding_idx < options.num_embeddings, name, ": padding_idx is ", options.padding_idx,
                    ", expected below num_embeddings = ", options.num_embeddings);
  TORCH_CHECK_VALUE(options.mode == "majority" || options.mode == "sum" || options.mode == "mean", name, ": mode is '",
                    options.mode, "', expected majority, sum or mean");
  TORCH_CHECK_VALUE(!options.train_scale || std::strcmp(name, "BinaryEmbedding") == 0, name,
                    ": train_scale is true, expected false: the scales of bags are not trained");
  return options;
}

int64_t drawn_seed() {
  return torch::randint(std::numeric_limits<int64_t>::max(), {1}, torch::dtype(torch::kLong)).item<int64_t>();
}

PackedWeight packed(const torch::Tensor& w, int64_t padding_idx) {
  const int64_t d = w.size(1);
  torch::Tensor scale = d > 0 ? w.abs().mean(1, /*keepdim=*/true) : torch::zeros({w.size(0), 1}, w.options());
  torch::Tensor bits = w.ge(0).to(torch::kByte);
  if (padding_idx >= 0) {
    scale[padding_idx].zero_();
    bits[padding_idx].fill_(1);
  }
  PackedWeight p;
  p.codes = ops::pack(bits, "sign");
  p.scales = scale.mul(2);  // value = (2 scale) (code - 1/2)
  p.format = "sign";
  p.in_features = d;
  p.group_size = std::max<int64_t>(1, d);
  return p;
}

void print(std::ostream& stream, const char* name, const BinaryEmbeddingOptions& o) {
  stream << "subbyte::nn::" << name << "(num_embeddings=" << o.num_embeddings << ", embedding_dim=" << o.embedding_dim;
  if (o.padding_idx >= 0) stream << ", padding_idx=" << o.padding_idx;
  stream << ", gradient=" << (o.sparse ? "sparse" : "dense");
  if (o.train_scale) stream << ", train_scale=true";
}

}  // namespace

torch::Tensor RowMomentum::slots_of(const torch::Tensor& touched, const torch::Tensor& codes, int64_t embedding_dim) {
  const torch::TensorOptions integers = touched.options(), bytes = integers.dtype(torch::kChar);
  if (!rows.defined()) {
    rows = torch::empty({0}, integers);
    slots = torch::empty({0}, integers);
    momentum = torch::empty({0, embedding_dim}, bytes);
  }
  rows = rows.to(codes.device());
  slots = slots.to(codes.device());
  momentum = momentum.to(codes.device());
  const int64_t first = size();
  torch::Tensor known = torch::zeros(touched.sizes(), integers.dtype(torch::kBool));
  if (first > 0) known = rows.index_select(0, torch::searchsorted(rows, touched).clamp_max(first - 1)).eq(touched);
  const torch::Tensor fresh = touched.masked_select(known.logical_not());
  if (const int64_t count = fresh.size(0); count > 0) {
    if (first + count > momentum.size(0)) {  // room for as many again, so that growing costs a copy now and then
      torch::Tensor grown = torch::zeros({2 * (first + count), embedding_dim}, bytes);
      grown.narrow(0, 0, first).copy_(momentum.narrow(0, 0, first));
      momentum = grown;
    }
    const torch::Tensor bits = ops::unpack(codes.index_select(0, fresh), "sign", embedding_dim);
    momentum.narrow(0, first, count).copy_(bits.to(torch::kFloat).mul(-2).add(1).mul(start * 127).round());
    const auto [sorted, order] = torch::sort(torch::cat({rows, fresh}));
    slots = torch::cat({slots, torch::arange(first, first + count, integers)}).index_select(0, order);
    rows = sorted;
  }
  return slots.index_select(0, torch::searchsorted(rows, touched));
}

template <class Derived>
void BinaryTable<Derived>::place(const torch::Tensor& w) {
  PackedWeight p = packed(w, options.padding_idx);
  if (options.train_scale) {  // the table holds signs, by which the parameter is multiplied
    const torch::Tensor scale = p.scales.div(2);
    if (const torch::Tensor* present = this->parameters_.find("scale")) present->detach().copy_(scale);
    else trained_scale_ = this->register_parameter("scale", scale);
    p.scales.fill_(2);
  }
  if (this->weight_.codes.defined()) {
    this->weight_.codes.copy_(p.codes);
    this->weight_.scales.copy_(p.scales);
  } else {
    this->set_weight(std::move(p));
  }
  momentum = RowMomentum();
}

template <class Derived>
void BinaryTable<Derived>::reset() {
  const torch::NoGradGuard no_grad;
  this->weight_ = PackedWeight();  // a clone registers tensors of its own
  place(torch::randn({options.num_embeddings, options.embedding_dim}));
}

template <class Derived>
void BinaryTable<Derived>::reset_parameters(const torch::Tensor& w) {
  const torch::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(
      w.is_floating_point() && w.dim() == 2 && w.size(0) == options.num_embeddings && w.size(1) == options.embedding_dim,
      "reset_parameters: w is ", w.scalar_type(), " ", w.sizes(), ", expected floating point [", options.num_embeddings, ", ",
      options.embedding_dim, "]");
  torch::Tensor centred = w.detach().to(this->weight_.codes.device(), torch::kFloat);
  const torch::Tensor wrong = centred.isfinite().logical_not_().nonzero();
  TORCH_CHECK_VALUE(wrong.size(0) == 0, "reset_parameters: w[", wrong[0][0].template item<int64_t>(), ", ",
                    wrong[0][1].template item<int64_t>(), "] is not finite, expected finite numbers");
  if (centred.numel() > 0) centred = centred - centred.mean();
  place(centred);
}

template <class Derived>
void BinaryTable<Derived>::update_(const BinaryUpdate& update) {
  const torch::NoGradGuard no_grad;
  torch::Tensor gradient = this->grad();
  if (!gradient.defined()) return;
  torch::Tensor rows, values;
  if (gradient.layout() == torch::kSparse) {
    gradient = gradient.coalesce();
    rows = gradient.indices()[0];
    values = gradient.values();
  } else {
    rows = gradient.ne(0).any(1).nonzero().squeeze(1);
    values = gradient.index_select(0, rows);
  }
  const torch::Tensor signs = ops::pack(values.ge(0).to(torch::kByte), "sign");
  const torch::Tensor mask = ops::pack(values.ne(0).logical_and(values.isfinite()).to(torch::kByte), "sign");
  const torch::Tensor& codes = this->weight_.codes;
  if (update.rule == "momentum") {
    TORCH_CHECK_VALUE(update.lr >= 0 && update.lr <= 1, "update_: lr is ", update.lr, ", expected 0 <= lr <= 1");
    const torch::Tensor slots = momentum.slots_of(rows, codes, options.embedding_dim);
    ops::embedding_update_(codes, rows, signs, options.embedding_dim, update.rule, mask, momentum.momentum, slots,
                           127 * update.lr, update.beta, update.seed.has_value() ? *update.seed : drawn_seed(), update.offset);
  } else {
    ops::embedding_update_(codes, rows, signs, options.embedding_dim, update.rule, mask);
  }
  this->zero_grad();
}

template class BinaryTable<BinaryEmbeddingImpl>;
template class BinaryTable<BinaryEmbeddingBagImpl>;

// ---- BinaryEmbedding

BinaryEmbeddingImpl::BinaryEmbeddingImpl(const BinaryEmbeddingOptions& options_)
    : BinaryTable(checked("BinaryEmbedding", options_)) {
  reset();
}

void BinaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  print(stream, "BinaryEmbedding", options);
  stream << ")";
}

torch::Tensor BinaryEmbeddingImpl::forward(const torch::Tensor& indices) {
  const torch::Tensor y =
      ops::embedding(indices, weight_.handle(), weight_.codes, weight_.scales, std::nullopt, std::nullopt, std::nullopt,
                     weight_.format, weight_.in_features, weight_.group_size, options.padding_idx, options.sparse);
  if (!trained_scale_.defined()) return y;
  return y * torch::embedding(trained_scale_, indices, options.padding_idx, /*scale_grad_by_freq=*/false, options.sparse);
}

BinaryEmbedding BinaryEmbedding::from_float(const torch::nn::Embedding& layer) {
  TORCH_CHECK_VALUE(!layer->options.max_norm().has_value(),
                    "BinaryEmbedding: the layer has max_norm, which packed tables do not apply");
  BinaryEmbeddingOptions options(layer->options.num_embeddings(), layer->options.embedding_dim());
  options.padding_idx = layer->options.padding_idx().value_or(-1);
  BinaryEmbedding result(options);
  result->to(layer->weight.device());
  result->reset_parameters(layer->weight);
  result->train(layer->is_training());
  return result;
}

// ---- BinaryEmbeddingBag

BinaryEmbeddingBagImpl::BinaryEmbeddingBagImpl(const BinaryEmbeddingOptions& options_)
    : BinaryTable(checked("BinaryEmbeddingBag", options_)) {
  reset();
}

void BinaryEmbeddingBagImpl::pretty_print(std::ostream& stream) const {
  print(stream, "BinaryEmbeddingBag", options);
  stream << ", mode=" << options.mode << ")";
}

torch::Tensor BinaryEmbeddingBagImpl::forward(const torch::Tensor& indices, const torch::Tensor& offsets,
                                              const torch::Tensor& per_sample_weights) {
  const auto present = [](const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  return ops::embedding_bag(indices, present(offsets), weight_.handle(), weight_.codes, weight_.scales, std::nullopt,
                            std::nullopt, std::nullopt, weight_.format, weight_.in_features, weight_.group_size, options.mode,
                            present(per_sample_weights), options.padding_idx, options.sparse);
}

}  // namespace subbyte::nn
