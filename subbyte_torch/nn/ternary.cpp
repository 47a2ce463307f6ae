#include "subbyte_torch/nn/ternary.h"

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/sequential.h>

#include <algorithm>
#include <cmath>
#include <ostream>

namespace subbyte {

PackedWeight pack_ternary(const torch::Tensor& trits, const torch::Tensor& gamma) {
  const torch::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(trits.dim() == 2 || trits.dim() == 3, "pack_ternary: W has ", trits.dim(),
                    " dimensions, expected [N, K] or [terms, N, K]");
  ops::check_ternary("pack_ternary", trits);
  const int64_t k = trits.size(-1), rows = trits.dim() == 2 ? trits.size(0) : trits.size(0) * trits.size(1);
  TORCH_CHECK_VALUE(gamma.is_floating_point() && gamma.numel() == rows, "pack_ternary: gamma is ", gamma.scalar_type(), " ",
                    gamma.sizes(), ", expected floating point of ", rows, " numbers");
  TORCH_CHECK_VALUE(gamma.isfinite().all().item<bool>(),
                    "pack_ternary: gamma holds a NaN or infinity, expected finite numbers");
  PackedWeight out;
  out.codes = ops::pack(trits.reshape({rows, k}).to(torch::kChar).add(1).to(torch::kByte), "ternary");
  const torch::Tensor scales = gamma.scalar_type() == torch::kDouble ? gamma.to(torch::kFloat) : gamma;
  out.scales = scales.detach().reshape({rows, 1}).slice(1, 0, std::min<int64_t>(k, 1)).clone();
  out.format = "ternary";
  out.in_features = k;
  out.group_size = std::max<int64_t>(k, 1);
  return out;
}

}  // namespace subbyte

namespace subbyte::nn {
namespace {

OptionalTensor given_tensor(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

const char* name_of(TernaryState state) {
  switch (state) {
    case TernaryState::kLatent: return "latent";
    case TernaryState::kPacked: return "packed";
    case TernaryState::kFrozen: return "frozen";
  }
  return "";
}

// The options with the layer's sizes, latent: the layer's values come before another state is entered.
TernaryLinearOptions latent_options_for(const torch::nn::Linear& layer, TernaryLinearOptions options) {
  options.in_features = layer->options.in_features();
  options.out_features = layer->options.out_features();
  options.bias = layer->bias.defined();
  options.state = TernaryState::kLatent;
  return options;
}

template <class Impl>
void take_values(Impl& module, const torch::nn::Linear& layer, TernaryState state) {
  const torch::NoGradGuard no_grad;
  module.weight.set_data(layer->weight.detach().clone());
  if (layer->bias.defined()) module.bias.set_data(layer->bias.detach().clone());
  module.enter(state);
  module.train(layer->is_training());
}

}  // namespace

template <class Derived>
void TernaryLinear<Derived>::check_options() const {
  const bool packed = options.state != TernaryState::kLatent;
  const int64_t bits = options.activation_bits;
  TORCH_CHECK_VALUE(bits == 0 || (packed ? bits == 8 : bits >= 2 && bits <= 24), module_name(), ": activation_bits is ", bits,
                    packed ? ", expected 0 or 8 for packed weights" : ", expected 0 or 2 to 24");
  TORCH_CHECK_VALUE(options.terms >= 1, module_name(), ": terms is ", options.terms, ", expected at least 1");
  TORCH_CHECK_VALUE(options.method == "absmean" || options.method == "threshold", module_name(), ": method is '",
                    options.method, "', expected absmean or threshold");
  TORCH_CHECK_VALUE(options.threshold >= 0, module_name(), ": threshold is ", options.threshold, ", expected at least 0");
  TORCH_CHECK_VALUE(options.in_features >= 0 && options.out_features >= 0, module_name(), ": the weight is [",
                    options.out_features, ", ", options.in_features, "], expected no negative size");
}

template <class Derived>
void TernaryLinear<Derived>::reset() {
  check_options();
  const torch::NoGradGuard no_grad;
  torch::Tensor dense = torch::empty({options.out_features, options.in_features});
  if (dense.numel() > 0) torch::nn::init::kaiming_uniform_(dense, std::sqrt(5.0));
  const TernaryState wanted = options.state;
  options.state = TernaryState::kLatent;
  weight = this->register_parameter("weight", dense);
  if (options.bias) {
    const double limit = options.in_features > 0 ? 1.0 / std::sqrt(double(options.in_features)) : 0.0;
    bias = this->register_parameter("bias", torch::empty({options.out_features}).uniform_(-limit, limit));
  } else {
    bias = this->register_parameter("bias", {}, /*requires_grad=*/false);
  }
  enter(wanted);
}

template <class Derived>
void TernaryLinear<Derived>::set_packed(PackedWeight packed) {
  packed_ = this->register_module("packed", Linear(std::make_shared<LinearImpl>(std::move(packed), torch::Tensor())));
}

template <class Derived>
void TernaryLinear<Derived>::enter(TernaryState state) {
  const TernaryState before = options.state;
  options.state = state;
  try {
    check_options();
  } catch (...) {
    options.state = before;
    throw;
  }
  const torch::NoGradGuard no_grad;
  if (before == TernaryState::kLatent && state != TernaryState::kLatent) {
    auto [trits, scales] =
        ops::ternary_decompose(weight.detach(), options.terms, options.method, options.per_channel, options.threshold);
    PackedWeight packed = pack_ternary(trits, scales.to(weight.scalar_type()));
    this->parameters_.erase("weight");
    weight = torch::Tensor();
    set_packed(std::move(packed));
  } else if (before != TernaryState::kLatent && state == TernaryState::kLatent) {
    const PackedWeight& w = packed_->weight();
    const torch::Tensor dense = w.dequantize().view({options.terms, options.out_features, options.in_features}).sum(0);
    this->unregister_module("packed");
    packed_ = Linear(nullptr);
    weight = this->register_parameter("weight", dense);
  }
}

template <class Derived>
PackedWeight& TernaryLinear<Derived>::packed_weight() {
  TORCH_CHECK_VALUE(options.state != TernaryState::kLatent, module_name(), ": the module is latent, it has no packed weight");
  return packed_->weight();
}

template <class Derived>
std::pair<torch::Tensor, torch::Tensor> TernaryLinear<Derived>::ternary_parts() const {
  const torch::NoGradGuard no_grad;
  if (options.state == TernaryState::kLatent) {
    auto [trits, scales] =
        ops::ternary_decompose(weight.detach(), options.terms, options.method, options.per_channel, options.threshold);
    return {trits, scales};
  }
  const PackedWeight& w = packed_->weight();
  const torch::Tensor trits = ops::unpack(w.codes, w.format, w.in_features).to(torch::kChar).sub_(1);
  const torch::Tensor scales =  // a row without columns has no scale
      w.in_features > 0 ? w.scales.to(torch::kFloat)
                        : torch::zeros({w.out_features()}, w.scales.options().dtype(torch::kFloat));
  return {trits.view({options.terms, options.out_features, options.in_features}),
          scales.view({options.terms, options.out_features})};
}

template <class Derived>
torch::Tensor TernaryLinear<Derived>::forward(const torch::Tensor& x) {
  if (options.state == TernaryState::kLatent) {
    const torch::Tensor rounded = options.activation_bits == 0 ? x : ops::activation_quant(x, options.activation_bits);
    return torch::nn::functional::linear(
        rounded, ops::ternarize(weight, options.terms, options.method, options.per_channel, options.threshold), bias);
  }
  const PackedWeight& w = packed_->weight();
  const bool trains = options.state == TernaryState::kPacked && torch::GradMode::is_enabled();
  return ops::multi_ternary_linear(x, trains ? OptionalTensor(w.handle()) : std::nullopt, w.codes, w.scales,
                                   given_tensor(w.zeros), given_tensor(w.offsets), given_tensor(w.perm), w.format,
                                   w.in_features, w.group_size, options.terms, given_tensor(bias), options.activation_bits);
}

template <class Derived>
void TernaryLinear<Derived>::load(torch::serialize::InputArchive& archive) {
  for (const auto& own : this->named_parameters(/*recurse=*/false)) {  // read apart first
    torch::Tensor stored;
    archive.read(own.key(), stored);
    TORCH_CHECK_VALUE(stored.sizes() == own->sizes(), "load: ", own.key(), " is ", stored.sizes(), " in the archive, ",
                      own->sizes(), " in the module");
  }
  if (options.state != TernaryState::kLatent) {
    torch::serialize::InputArchive child;
    torch::Tensor codes;
    archive.read("packed", child);
    child.read("codes", codes, /*is_buffer=*/true);
    TORCH_CHECK_VALUE(codes.sizes() == packed_->weight().codes.sizes(), "load: packed.codes is ", codes.sizes(),
                      " in the archive, ", packed_->weight().codes.sizes(), " in the module");
  }
  torch::nn::Module::load(archive);
}

template <class Derived>
void TernaryLinear<Derived>::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::" << module_name() << "(in_features=" << options.in_features
         << ", out_features=" << options.out_features;
  if (Derived::kShowsTerms) stream << ", terms=" << options.terms;
  stream << ", bias=" << std::boolalpha << options.bias << ", state=" << name_of(options.state) << ", method=" << options.method
         << ", per_channel=" << options.per_channel << ", activation_bits=" << options.activation_bits << ")";
}

template class TernaryLinear<BitLinearImpl>;
template class TernaryLinear<MultiTernaryLinearImpl>;

BitLinearImpl::BitLinearImpl(TernaryLinearOptions options_) : TernaryLinear(std::move(options_)) {
  TORCH_CHECK_VALUE(options.terms == 1, "BitLinear: terms is ", options.terms, ", expected 1 (MultiTernaryLinear has more)");
}

TernaryLinearOptions MultiTernaryLinearImpl::default_options(int64_t in_features, int64_t out_features, int64_t terms) {
  TernaryLinearOptions o(in_features, out_features);
  o.terms = terms;
  o.method = "threshold";
  o.per_channel = true;
  return o;
}

BitLinear BitLinear::from_linear(const torch::nn::Linear& layer, TernaryLinearOptions options) {
  const TernaryState state = options.state;
  BitLinear out(latent_options_for(layer, std::move(options)));
  take_values(*out, layer, state);
  return out;
}

MultiTernaryLinear MultiTernaryLinear::from_linear(const torch::nn::Linear& layer, int64_t terms, TernaryState state,
                                                   int64_t activation_bits) {
  TernaryLinearOptions options = MultiTernaryLinearImpl::default_options(0, 0, terms);
  options.activation_bits = activation_bits;
  MultiTernaryLinear out(latent_options_for(layer, std::move(options)));
  take_values(*out, layer, state);
  return out;
}

namespace {

void convert_children(torch::nn::Module& module, const std::string& prefix, const TernaryLinearOptions& options,
                      const std::vector<std::string>& skip, QuantizeReport& report) {
  auto skipped = [&](const std::string& name) { return std::find(skip.begin(), skip.end(), name) != skip.end(); };
  if (auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&module)) {
    int64_t i = 0;
    for (torch::nn::AnyModule& child : *sequential) {
      const std::string index = std::to_string(i++), name = prefix + index;
      const std::shared_ptr<torch::nn::Module> pointer = child.ptr();
      const auto linear = std::dynamic_pointer_cast<torch::nn::LinearImpl>(pointer);
      if (!linear) {
        convert_children(*pointer, name + ".", options, skip, report);
      } else if (!skipped(name)) {
        const BitLinear made = BitLinear::from_linear(torch::nn::Linear(linear), options);
        child = torch::nn::AnyModule(made.ptr());
        sequential->replace_module(index, made.ptr());
        report.replaced.push_back(name);
      }
    }
    return;
  }
  for (const auto& child : module.named_children()) {
    const std::string name = prefix + child.key();
    if (!std::dynamic_pointer_cast<torch::nn::LinearImpl>(child.value()))
      convert_children(*child.value(), name + ".", options, skip, report);
    else if (!skipped(name)) report.out_of_reach.push_back(name);
  }
}

}  // namespace

QuantizeReport convert_linear_to_bitlinear(torch::nn::Module& module, const TernaryLinearOptions& options,
                                           const std::vector<std::string>& skip) {
  QuantizeReport report;
  convert_children(module, "", options, skip, report);
  return report;
}

}  // namespace subbyte::nn
