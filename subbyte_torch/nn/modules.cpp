#include <torch/nn/init.h>
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <ostream>

#include "subbyte_torch/nn/binary_embedding.h"
#include "subbyte_torch/nn/embedding.h"
#include "subbyte_torch/nn/linear.h"
#include "subbyte_torch/nn/mpq_linear.h"
#include "subbyte_torch/nn/quantize.h"
#include "subbyte_torch/ops/embedding.h"

namespace subbyte::nn {
namespace {

// Options that make a weight of the same parts, which is what clone() fills.
QuantizeOptions options_of(const PackedWeight& w) {
  QuantizeOptions out;
  out.format = w.format;
  out.group_size = w.group_size;
  out.sym = !w.zeros.defined() && !w.offsets.defined();
  if (!out.sym) out.scheme = "minmax";
  out.zero_kind = w.zeros.defined() ? "zeros" : "offsets";
  out.scale_dtype = w.scales.scalar_type();
  out.perm = w.perm;
  out.residual_bits = w.residual_bits;
  return out;
}

}  // namespace

// ---- packed module

template <class Derived>
void PackedModule<Derived>::set_weight(PackedWeight w) {
  weight_ = std::move(w);
  auto present = this->named_buffers(/*recurse=*/false);
  auto place = [&](const char* name, torch::Tensor& part) {
    if (torch::Tensor* buffer = present.find(name)) {
      buffer->set_data(part);
      part = *buffer;
    } else if (part.defined()) {
      part = this->register_buffer(name, part);
    }
  };
  place("codes", weight_.codes);
  place("scales", weight_.scales);
  place("zeros", weight_.zeros);
  place("offsets", weight_.offsets);
  place("perm", weight_.perm);
  place("residual", weight_.residual);
}

template <class Derived>
void PackedModule<Derived>::convert(std::optional<torch::Device> device, std::optional<torch::Dtype> dtype, bool non_blocking) {
  const bool scales_too = dtype == torch::kFloat || dtype == torch::kHalf || dtype == torch::kBFloat16;
  auto moved = [&](const torch::Tensor& t, bool convertible) {
    return t.to(device.value_or(t.device()), convertible && dtype.has_value() ? *dtype : t.scalar_type(), non_blocking);
  };
  for (auto& parameter : this->named_parameters(/*recurse=*/false)) parameter->set_data(moved(*parameter, true));
  for (auto& buffer : this->named_buffers(/*recurse=*/false))
    buffer->set_data(moved(*buffer, scales_too && buffer->is_floating_point()));
  weight_.forget_handle();
}

template <class Derived>
void PackedModule<Derived>::load(torch::serialize::InputArchive& archive) {
  c10::IValue format, group_size;
  archive.read("format", format);
  archive.read("group_size", group_size);
  TORCH_CHECK_VALUE(format.toStringRef() == weight_.format && group_size.toInt() == weight_.group_size,
                    "load: the archive holds ", format.toStringRef(), " in groups of ", group_size.toInt(), ", the module is ",
                    weight_.format, " in groups of ", weight_.group_size);
  c10::IValue residual_bits(int64_t(0));  // archives of before there were residuals do not say
  archive.try_read("residual_bits", residual_bits);
  TORCH_CHECK_VALUE(residual_bits.toInt() == weight_.residual_bits, "load: the archive holds a residual of ",
                    residual_bits.toInt(), " bits, the module one of ", weight_.residual_bits);
  const torch::NoGradGuard no_grad;
  // Read apart first: an archive of other shapes leaves the module as it was.
  for (auto& buffer : this->named_buffers(/*recurse=*/false)) {
    torch::Tensor stored;
    archive.read(buffer.key(), stored, /*is_buffer=*/true);
    TORCH_CHECK_VALUE(stored.sizes() == buffer->sizes(), "load: ", buffer.key(), " is ", stored.sizes(), " in the archive, ",
                      buffer->sizes(), " in the module");
  }
  torch::nn::Module::load(archive);
  weight_.forget_handle();
}

// ---- Linear

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) { reset(); }

LinearImpl::LinearImpl(PackedWeight weight, torch::Tensor bias_, int activation_bits, std::string x_scale)
    : options(weight.in_features, weight.out_features()) {
  options.bias = bias_.defined();
  options.activation_bits = activation_bits;
  options.x_scale = std::move(x_scale);
  options.quantize = options_of(weight);
  TORCH_CHECK_VALUE(activation_bits == 0 || activation_bits == 8, "Linear: activation_bits is ", activation_bits,
                    ", expected 0 or 8");
  set_weight(std::move(weight));
  bias = register_parameter("bias", std::move(bias_), options.bias);
}

void LinearImpl::reset() {
  TORCH_CHECK_VALUE(options.activation_bits == 0 || options.activation_bits == 8, "Linear: activation_bits is ",
                    options.activation_bits, ", expected 0 or 8");
  const torch::NoGradGuard no_grad;
  // One row block at a time would save memory, but a float matrix of one layer is what a float model has anyway.
  torch::Tensor dense = torch::empty({options.out_features, options.in_features});
  if (dense.numel() > 0) torch::nn::init::kaiming_uniform_(dense, std::sqrt(5.0));
  set_weight(PackedWeight::quantize(dense, options.quantize));
  if (options.bias) {
    const double limit = options.in_features > 0 ? 1.0 / std::sqrt(double(options.in_features)) : 0.0;
    bias = register_parameter("bias", torch::empty({options.out_features}).uniform_(-limit, limit));
  } else {
    bias = register_parameter("bias", {}, /*requires_grad=*/false);
  }
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::Linear(in_features=" << options.in_features << ", out_features=" << options.out_features
         << ", bias=" << std::boolalpha << options.bias << ", format=" << weight_.format
         << ", group_size=" << weight_.group_size;
  if (weight_.residual_bits > 0) stream << ", residual_bits=" << weight_.residual_bits;
  if (options.activation_bits != 0) stream << ", activation_bits=" << options.activation_bits;
  stream << ")";
}

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  const OptionalTensor b = bias.defined() ? OptionalTensor(bias) : std::nullopt;
  return options.activation_bits == 8 ? linear_a8(x, weight_, b, options.x_scale) : linear(x, weight_, b);
}

Linear Linear::from_float(const torch::nn::Linear& layer, const QuantizeOptions& quantize, int activation_bits) {
  return Linear(std::make_shared<LinearImpl>(PackedWeight::quantize(layer->weight, quantize),
                                             layer->bias.defined() ? layer->bias.detach().clone() : torch::Tensor(),
                                             activation_bits));
}

Linear Linear::drop_residual() const {
  const LinearImpl& own = *get();
  Linear out(
      std::make_shared<LinearImpl>(own.weight().drop_residual(), own.bias, own.options.activation_bits, own.options.x_scale));
  out->train(own.is_training());
  return out;
}

// ---- Embedding

namespace {

PackedWeight fresh_table(const EmbeddingOptions& options) {
  const torch::NoGradGuard no_grad;
  torch::Tensor dense = torch::randn({options.num_embeddings, options.embedding_dim});
  if (options.padding_idx >= 0 && options.padding_idx < options.num_embeddings) dense[options.padding_idx].zero_();
  return PackedWeight::quantize(dense, options.quantize);
}

void print_table(std::ostream& stream, const char* name, const EmbeddingOptions& options, const PackedWeight& weight) {
  stream << "subbyte::nn::" << name << "(num_embeddings=" << options.num_embeddings
         << ", embedding_dim=" << options.embedding_dim;
  if (options.padding_idx >= 0) stream << ", padding_idx=" << options.padding_idx;
  if (options.sparse) stream << ", sparse=true";
  stream << ", format=" << weight.format << ", group_size=" << weight.group_size;
}

template <class Options>
void refuse_options(const char* name, const Options& options) {
  TORCH_CHECK_VALUE(!options.max_norm().has_value(), name, ": the layer has max_norm, which packed tables do not apply");
  TORCH_CHECK_VALUE(!options.scale_grad_by_freq(), name, ": the layer has scale_grad_by_freq, which packed tables do not have");
}

OptionalTensor present(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

}  // namespace

EmbeddingImpl::EmbeddingImpl(const EmbeddingOptions& options_) : options(options_) { reset(); }

EmbeddingImpl::EmbeddingImpl(PackedWeight weight, int64_t padding_idx, bool sparse)
    : options(weight.out_features(), weight.in_features) {
  options.padding_idx = padding_idx;
  options.sparse = sparse;
  options.quantize = options_of(weight);
  set_weight(std::move(weight));
}

void EmbeddingImpl::reset() { set_weight(fresh_table(options)); }

void EmbeddingImpl::pretty_print(std::ostream& stream) const {
  print_table(stream, "Embedding", options, weight_);
  stream << ")";
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& indices) {
  return embedding(indices, weight_, options.padding_idx, /*with_gradient=*/true, options.sparse);
}

Embedding Embedding::from_float(const torch::nn::Embedding& layer, const QuantizeOptions& quantize) {
  refuse_options("Embedding", layer->options);
  return Embedding(std::make_shared<EmbeddingImpl>(PackedWeight::quantize(layer->weight, quantize),
                                                   layer->options.padding_idx().value_or(-1), layer->options.sparse()));
}

Embedding Embedding::drop_residual() const {
  Embedding out(
      std::make_shared<EmbeddingImpl>(get()->weight().drop_residual(), get()->options.padding_idx, get()->options.sparse));
  out->train(get()->is_training());
  return out;
}

// ---- EmbeddingBag

EmbeddingBagImpl::EmbeddingBagImpl(const EmbeddingBagOptions& options_) : options(options_) { reset(); }

EmbeddingBagImpl::EmbeddingBagImpl(PackedWeight weight, const EmbeddingBagOptions& options_) : options(options_) {
  TORCH_CHECK_VALUE(options.mode == "sum" || options.mode == "mean", "EmbeddingBag: mode is '", options.mode,
                    "', expected sum or mean");
  options.num_embeddings = weight.out_features();
  options.embedding_dim = weight.in_features;
  options.quantize = options_of(weight);
  set_weight(std::move(weight));
}

void EmbeddingBagImpl::reset() {
  TORCH_CHECK_VALUE(options.mode == "sum" || options.mode == "mean", "EmbeddingBag: mode is '", options.mode,
                    "', expected sum or mean");
  set_weight(fresh_table(options));
}

void EmbeddingBagImpl::pretty_print(std::ostream& stream) const {
  print_table(stream, "EmbeddingBag", options, weight_);
  stream << ", mode=" << options.mode << ")";
}

torch::Tensor EmbeddingBagImpl::forward(const torch::Tensor& indices, const torch::Tensor& offsets,
                                        const torch::Tensor& per_sample_weights) {
  return ops::embedding_bag(
      indices, present(offsets), present(torch::GradMode::is_enabled() ? weight_.handle() : torch::Tensor()), weight_.codes,
      weight_.scales, present(weight_.zeros), present(weight_.offsets), present(weight_.perm), weight_.format,
      weight_.in_features, weight_.group_size, options.mode, present(per_sample_weights), options.padding_idx, options.sparse);
}

EmbeddingBag EmbeddingBag::from_float(const torch::nn::EmbeddingBag& layer, const QuantizeOptions& quantize) {
  refuse_options("EmbeddingBag", layer->options);
  TORCH_CHECK_VALUE(!layer->options.include_last_offset(),
                    "EmbeddingBag: the layer has include_last_offset, which packed tables "
                    "do not have");
  EmbeddingBagOptions options(layer->options.num_embeddings(), layer->options.embedding_dim());
  const auto& mode = layer->options.mode();
  options.mode = std::holds_alternative<torch::enumtype::kSum>(mode)    ? "sum"
                 : std::holds_alternative<torch::enumtype::kMean>(mode) ? "mean"
                                                                        : "max";
  options.padding_idx = layer->options.padding_idx().value_or(-1);
  options.sparse = layer->options.sparse();
  return EmbeddingBag(std::make_shared<EmbeddingBagImpl>(PackedWeight::quantize(layer->weight, quantize), options));
}

template class PackedModule<LinearImpl>;
template class PackedModule<EmbeddingImpl>;
template class PackedModule<EmbeddingBagImpl>;
template class PackedModule<MPQLinearImpl>;
template class PackedModule<BinaryEmbeddingImpl>;
template class PackedModule<BinaryEmbeddingBagImpl>;

// ---- quantize_

namespace {

bool skipped(const std::string& name, const std::vector<std::string>& skip) {
  for (const std::string& s : skip)
    if (name == s) return true;
  return false;
}

void quantize_children(torch::nn::Module& module, const std::string& prefix, const QuantizeModuleOptions& options,
                       QuantizeReport& report) {
  if (auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&module)) {
    int64_t i = 0;
    for (torch::nn::AnyModule& child : *sequential) {
      const std::string index = std::to_string(i++), name = prefix + index;
      const std::shared_ptr<torch::nn::Module> pointer = child.ptr();
      const auto replace = [&, sequential](auto packed) {
        packed->train(pointer->is_training());
        child = torch::nn::AnyModule(packed.ptr());
        sequential->replace_module(index, packed.ptr());
        report.replaced.push_back(name);
      };
      const bool wanted = !skipped(name, options.skip), table_wanted = wanted && options.embeddings;
      if (const auto linear = std::dynamic_pointer_cast<torch::nn::LinearImpl>(pointer); linear && wanted) {
        replace(Linear::from_float(torch::nn::Linear(linear), options.quantize, options.activation_bits));
      } else if (const auto table = std::dynamic_pointer_cast<torch::nn::EmbeddingImpl>(pointer); table && table_wanted) {
        replace(Embedding::from_float(torch::nn::Embedding(table), options.quantize));
      } else if (const auto bag = std::dynamic_pointer_cast<torch::nn::EmbeddingBagImpl>(pointer); bag && table_wanted) {
        replace(EmbeddingBag::from_float(torch::nn::EmbeddingBag(bag), options.quantize));
      } else {
        quantize_children(*pointer, name + ".", options, report);
      }
    }
    return;
  }
  for (const auto& child : module.named_children()) {
    const std::string name = prefix + child.key();
    const bool is_linear = std::dynamic_pointer_cast<torch::nn::LinearImpl>(child.value()) != nullptr;
    const bool is_table =
        options.embeddings && (std::dynamic_pointer_cast<torch::nn::EmbeddingImpl>(child.value()) != nullptr ||
                               std::dynamic_pointer_cast<torch::nn::EmbeddingBagImpl>(child.value()) != nullptr);
    if ((is_linear || is_table) && !skipped(name, options.skip)) report.out_of_reach.push_back(name);
    else quantize_children(*child.value(), name + ".", options, report);
  }
}

// The layer without its residual, or null where there is nothing to drop.
std::optional<torch::nn::AnyModule> deployed(const std::shared_ptr<torch::nn::Module>& module) {
  if (const auto linear = std::dynamic_pointer_cast<LinearImpl>(module); linear && linear->weight().residual.defined())
    return torch::nn::AnyModule(Linear(linear).drop_residual().ptr());
  if (const auto table = std::dynamic_pointer_cast<EmbeddingImpl>(module); table && table->weight().residual.defined())
    return torch::nn::AnyModule(Embedding(table).drop_residual().ptr());
  return std::nullopt;
}

void drop_residuals_of_children(torch::nn::Module& module, const std::string& prefix, QuantizeReport& report) {
  auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&module);
  for (const auto& child : module.named_children()) {
    const std::string name = prefix + child.key();
    std::optional<torch::nn::AnyModule> replacement = deployed(child.value());
    if (!replacement.has_value()) {
      drop_residuals_of_children(*child.value(), name + ".", report);
    } else if (sequential == nullptr) {
      report.out_of_reach.push_back(name);
    } else {
      for (torch::nn::AnyModule& held : *sequential)
        if (held.ptr() == child.value()) held = *replacement;
      sequential->replace_module(child.key(), replacement->ptr());
      report.replaced.push_back(name);
    }
  }
}

}  // namespace

QuantizeReport drop_residuals_(torch::nn::Module& module) {
  QuantizeReport report;
  drop_residuals_of_children(module, "", report);
  return report;
}

QuantizeReport quantize_(torch::nn::Module& module, const QuantizeModuleOptions& options) {
  QuantizeReport report;
  quantize_children(module, "", options, report);
  return report;
}

}  // namespace subbyte::nn
