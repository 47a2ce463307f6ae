#include "subbyte_torch/nn/quantized.h"

#include <ATen/autocast_mode.h>
#include <torch/nn/functional/dropout.h>
#include <torch/nn/init.h>

#include <cmath>
#include <limits>
#include <ostream>

#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/quantized.h"

namespace subbyte::nn {
namespace {

// d of the initial step 2 mean|v| / d.
double divisor_of(const StepOptions& options, bool weight) {
  if (options.init == "bie") return weight && options.bits == 4 ? 5.6345 : 11.269;
  return std::sqrt(double((int64_t(1) << (options.bits - 1)) - 1));
}

void set_step(const torch::Tensor& step, const torch::Tensor& v, double divisor, double eps) {
  const torch::NoGradGuard no_grad;
  torch::Tensor target = step;
  target.copy_((v.detach().to(torch::kFloat).abs().mean() * (2 / divisor)).clamp_min(eps));
}

std::string format_of(int64_t bits) { return "uint" + std::to_string(bits); }

std::ostream& operator<<(std::ostream& stream, const StepOptions& options) {
  return stream << "bits=" << options.bits << ", init=" << options.init;
}

}  // namespace

// ---- steps of activations

template <class Derived>
void StepModule<Derived>::check_options(const char* op, const StepOptions& options) const {
  TORCH_CHECK_VALUE(options.bits >= 2 && options.bits <= 8, op, ": bits is ", options.bits, ", expected 2 to 8");
  TORCH_CHECK_VALUE(options.init == "lsq" || options.init == "bie", op, ": init is '", options.init, "', expected lsq or bie");
  TORCH_CHECK_VALUE(options.init == "lsq" || options.bits == 4 || options.bits == 8, op, ": bits is ", options.bits,
                    ", expected 4 or 8 with init bie, which has no constant for others");
  TORCH_CHECK_VALUE(std::isfinite(options.eps) && options.eps > 0, op, ": eps is ", options.eps,
                    ", expected a positive number");
}

template <class Derived>
void StepModule<Derived>::initialise(const StepOptions& options,
                                     std::initializer_list<std::pair<torch::Tensor, torch::Tensor>> steps) {
  for (const auto& [step, v] : steps) set_step(step, v, divisor_of(options, /*weight=*/false), options.eps);
  activation_initialised_ = true;
}

template <class Derived>
void StepModule<Derived>::make_ready(const StepOptions& options,
                                     std::initializer_list<std::pair<torch::Tensor, torch::Tensor>> steps) {
  if (activation_initialised_) return;
  TORCH_CHECK(this->is_training(), this->name(), ": the activation step is not initialised: run a batch in training, set it ",
              "with set_activation, or load an archive");
  for (const auto& [step, v] : steps)
    if (v.numel() == 0) return;
  initialise(options, steps);
}

template <class Derived>
void StepModule<Derived>::save(torch::serialize::OutputArchive& archive) const {
  torch::nn::Module::save(archive);
  archive.write("activation_initialised", c10::IValue(activation_initialised_));
}

template <class Derived>
void StepModule<Derived>::load(torch::serialize::InputArchive& archive) {
  c10::IValue initialised;
  archive.read("activation_initialised", initialised);
  torch::nn::Module::load(archive);
  activation_initialised_ = initialised.toBool();
}

// ---- weights

// Member and registry hold one tensor.
template <class Derived>
void QuantizedWeightModule<Derived>::place_weight(torch::Tensor value) {
  weight_dropped_ = !value.defined();
  weight = value;
  this->parameters_["weight"] = std::move(value);
}

// A registered buffer cannot be exchanged, but its content can: no elements while there is nothing.
template <class Derived>
void QuantizedWeightModule<Derived>::place_codes(const torch::Tensor& value) {
  qweight.set_data(value.defined() ? value : torch::empty({0}, torch::TensorOptions(torch::kByte).device(scale_w.device())));
}

template <class Derived>
int64_t QuantizedWeightModule<Derived>::columns() const {
  int64_t k = 1;
  const auto sizes = weight_sizes();
  for (size_t i = 1; i < sizes.size(); ++i) k *= sizes[i];
  return k;
}

template <class Derived>
void QuantizedWeightModule<Derived>::reset() {
  const auto sizes = weight_sizes();
  const auto options = weight.defined() ? weight.detach().options() : torch::TensorOptions();
  const bool was_packed = qweight.defined() && packed();
  const torch::Tensor codes = qweight;
  weight =
      this->register_parameter("weight", weight_dropped_ ? torch::Tensor() : torch::empty(sizes, options), !weight_dropped_);
  bias_a = this->register_parameter("bias_a", torch::zeros({shift_count()}, options));
  scale_a = this->register_parameter("scale_a", torch::ones({}, options.dtype(torch::kFloat)));
  scale_w = this->register_parameter("scale_w", torch::ones({}, options.dtype(torch::kFloat)));
  bias = this->register_parameter("bias", wants_bias() ? torch::empty({sizes[0]}, options) : torch::Tensor(), wants_bias());
  qweight =
      this->register_buffer("qweight", was_packed ? torch::empty_like(codes) : torch::empty({0}, options.dtype(torch::kByte)));
  packed_from_.reset();
  const torch::NoGradGuard no_grad;
  if (weight.defined() && weight.numel() > 0) torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (bias.defined()) {
    const double limit = columns() > 0 ? 1.0 / std::sqrt(double(columns())) : 0.0;
    bias.uniform_(-limit, limit);
  }
  if (weight.defined() && weight.numel() > 0) set_step(scale_w, weight, divisor_of(step_options(), true), step_options().eps);
}

template <class Derived>
void QuantizedWeightModule<Derived>::need_weight(const char* what) const {
  TORCH_CHECK(weight.defined(), this->name(), ": ", what, " needs the float weight, which has been dropped");
}

template <class Derived>
void QuantizedWeightModule<Derived>::prepare_params() {
  need_weight("prepare_params");
  if (weight.numel() > 0) set_step(scale_w, weight, divisor_of(step_options(), true), step_options().eps);
  forget_packed();
}

template <class Derived>
void QuantizedWeightModule<Derived>::set_weight_data(const torch::Tensor& w) {
  need_weight("set_weight_data");
  TORCH_CHECK_VALUE(w.sizes() == weight.sizes(), "set_weight_data: w is ", w.sizes(), ", expected ", weight.sizes());
  {
    const torch::NoGradGuard no_grad;
    weight.copy_(w);
  }
  prepare_params();
}

template <class Derived>
void QuantizedWeightModule<Derived>::set_quantized_weight_data(const torch::Tensor& codes) {
  const int64_t n = weight_sizes()[0], bytes = (columns() * step_options().bits + 7) / 8;
  TORCH_CHECK_VALUE(codes.scalar_type() == torch::kByte && codes.sizes() == torch::IntArrayRef({n, bytes}),
                    "set_quantized_weight_data: codes is ", codes.scalar_type(), " ", codes.sizes(), ", expected uint8 [", n,
                    ", ", bytes, "]");
  place_codes(codes.detach().to(scale_w.device()).clone());
  place_weight({});
}

template <class Derived>
void QuantizedWeightModule<Derived>::generate_quantized_weight(bool qweight_only) {
  if (!weight.defined()) {
    TORCH_CHECK(packed(), this->name(), ": there is neither a weight nor a qweight");
    return;
  }
  const torch::NoGradGuard no_grad;
  const double middle = double(int64_t(1) << (step_options().bits - 1));
  const torch::Tensor step = scale_w.detach().to(torch::kFloat).clamp_min(step_options().eps);
  const torch::Tensor q = (weight.detach().to(torch::kFloat).flatten(1) / step).round_().clamp_(-middle, middle - 1);
  place_codes(ops::pack((q + middle).to(torch::kByte), format_of(step_options().bits)));
  packed_from_ = versions();
  if (qweight_only) place_weight({});
}

template <class Derived>
torch::Tensor QuantizedWeightModule<Derived>::set_activation(const torch::Tensor& x) {
  if (!this->activation_initialised_ && x.numel() > 0) this->initialise(step_options(), {{scale_a, x}});
  return x + shift_of(x);
}

template <class Derived>
PackedWeight QuantizedWeightModule<Derived>::packed_weight() {
  refresh_packed();
  const int64_t k = columns();
  PackedWeight w;
  w.codes = qweight;
  w.scales = scale_w.detach().to(torch::kFloat).clamp_min(step_options().eps).expand({weight_sizes()[0], k > 0}).contiguous();
  w.format = format_of(step_options().bits);
  w.in_features = k;
  w.group_size = std::max<int64_t>(k, 1);
  return w;
}

// None for inference tensors, of whose changes PyTorch keeps no count.
template <class Derived>
auto QuantizedWeightModule<Derived>::versions() const -> std::optional<Versions> {
  if (weight.is_inference() || scale_w.is_inference()) return std::nullopt;
  return Versions{weight.unsafeGetTensorImpl(), scale_w.unsafeGetTensorImpl(), uint32_t(weight._version()),
                  uint32_t(scale_w._version())};
}

template <class Derived>
void QuantizedWeightModule<Derived>::forget_packed() {
  if (!weight.defined()) return;
  packed_from_.reset();
  place_codes({});
}

template <class Derived>
void QuantizedWeightModule<Derived>::refresh_packed() {
  if (weight.defined() && (!packed() || !packed_from_.has_value() || packed_from_ != versions())) generate_quantized_weight();
}

template <class Derived>
std::pair<OptionalTensor, OptionalTensor> QuantizedWeightModule<Derived>::operands() {
  if (!weight.defined()) {
    if (this->is_training()) need_weight("training");
    return {std::nullopt, qweight};
  }
  const bool wanted = torch::GradMode::is_enabled() && (weight.requires_grad() || scale_w.requires_grad());
  if (this->is_training() || wanted) return {weight, std::nullopt};
  refresh_packed();
  return {std::nullopt, qweight};
}

template <class Derived>
OptionalTensor QuantizedWeightModule<Derived>::like(const torch::Tensor& v, const torch::Tensor& x) {
  if (!v.defined()) return std::nullopt;
  return at::autocast::is_autocast_enabled(x.device().type()) ? v : v.to(x.scalar_type());
}

template <class Derived>
void QuantizedWeightModule<Derived>::train(bool on) {
  forget_packed();
  torch::nn::Module::train(on);
}

// Module::to would turn bytes of codes into floats: they move, and keep their type.
template <class Derived>
void QuantizedWeightModule<Derived>::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const torch::Tensor codes = weight.defined() ? torch::Tensor() : qweight.detach();
  packed_from_.reset();
  torch::nn::Module::to(device, dtype, non_blocking);
  place_codes(codes.defined() ? codes.to(device, non_blocking) : codes);
}
template <class Derived>
void QuantizedWeightModule<Derived>::to(torch::Dtype dtype, bool non_blocking) {
  to(scale_w.device(), dtype, non_blocking);
}
template <class Derived>
void QuantizedWeightModule<Derived>::to(torch::Device device, bool non_blocking) {
  packed_from_.reset();
  torch::nn::Module::to(device, non_blocking);
}

// Takes the form of the archive: with a float weight or without.
template <class Derived>
void QuantizedWeightModule<Derived>::load(torch::serialize::InputArchive& archive) {
  torch::Tensor stored, codes;
  const bool has_weight = archive.try_read("weight", stored),
             has_codes = archive.try_read("qweight", codes, /*is_buffer=*/true) && codes.dim() == 2;
  const std::vector<int64_t> sizes = weight_sizes();
  TORCH_CHECK_VALUE(!has_weight || stored.sizes() == torch::IntArrayRef(sizes), "load: weight is ", stored.sizes(),
                    " in the archive, ", torch::IntArrayRef(sizes), " in the module");
  const int64_t bytes = (columns() * step_options().bits + 7) / 8;
  TORCH_CHECK_VALUE(!has_codes || codes.sizes() == torch::IntArrayRef({sizes[0], bytes}), "load: qweight is ", codes.sizes(),
                    " in the archive, [", sizes[0], ", ", bytes, "] in the module of ", step_options().bits, " bits");
  TORCH_CHECK_VALUE(has_weight || has_codes, "load: the archive holds neither weight nor qweight");
  const torch::Device device = scale_w.device();
  if (has_weight && !weight.defined()) place_weight(torch::empty(sizes, stored.options().device(device)).requires_grad_());
  if (!has_weight) place_weight({});
  packed_from_.reset();
  StepModule<Derived>::load(archive);
}

// ---- QuantizedLinear

QuantizedLinearImpl::QuantizedLinearImpl(const QuantizedLinearOptions& options_) : options(options_) {
  check_options("QuantizedLinear", options);
  reset();
}

void QuantizedLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::QuantizedLinear(in_features=" << options.in_features << ", out_features=" << options.out_features
         << ", " << static_cast<const StepOptions&>(options) << ", bias=" << std::boolalpha << options.bias
         << (weight.defined() ? ")" : ", packed)");
}

torch::Tensor QuantizedLinearImpl::forward(const torch::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == options.in_features, "QuantizedLinear: x is ", x.sizes(),
                    ", expected [..., in_features = ", options.in_features, "]");
  make_ready(options, {{scale_a, x}});
  const auto [w, codes] = operands();
  return ops::quantized_linear(x, w, codes, scale_a, scale_w, like(bias_a, x), like(bias, x), options.bits, options.eps,
                               options.clip_weight_gradient);
}

QuantizedLinear QuantizedLinear::from_float(const torch::nn::Linear& layer, const StepOptions& steps) {
  QuantizedLinearOptions options(layer->weight.size(1), layer->weight.size(0));
  static_cast<StepOptions&>(options) = steps;
  options.bias = layer->bias.defined();
  QuantizedLinear made(options);
  made->to(layer->weight.device(), layer->weight.scalar_type());
  made->scale_a.set_data(made->scale_a.to(torch::kFloat));
  made->scale_w.set_data(made->scale_w.to(torch::kFloat));
  made->set_weight_data(layer->weight.detach());
  const torch::NoGradGuard no_grad;
  if (options.bias) made->bias.copy_(layer->bias);
  made->train(layer->is_training());
  return made;
}

// ---- QuantizedConv2d

QuantizedConv2dImpl::QuantizedConv2dImpl(const QuantizedConv2dOptions& options_) : options(options_) {
  check_options("QuantizedConv2d", options);
  TORCH_CHECK_VALUE(
      options.groups >= 1 && options.in_channels % options.groups == 0 && options.out_channels % options.groups == 0,
      "QuantizedConv2d: groups is ", options.groups, ", expected a divisor of in_channels = ", options.in_channels,
      " and out_channels = ", options.out_channels);
  reset();
}

void QuantizedConv2dImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::QuantizedConv2d(" << options.in_channels << ", " << options.out_channels
         << ", kernel_size=" << options.kernel_size << ", stride=" << options.stride << ", padding=" << options.padding
         << ", dilation=" << options.dilation << ", groups=" << options.groups << ", "
         << static_cast<const StepOptions&>(options) << ", bias=" << std::boolalpha << options.bias
         << (weight.defined() ? ")" : ", packed)");
}

torch::Tensor QuantizedConv2dImpl::forward(const torch::Tensor& x) {
  TORCH_CHECK_VALUE((x.dim() == 3 || x.dim() == 4) && x.size(-3) == options.in_channels, "QuantizedConv2d: x is ", x.sizes(),
                    ", expected [N, in_channels = ", options.in_channels, ", H, W]");
  make_ready(options, {{scale_a, x}});
  const auto [w, codes] = operands();
  const torch::Tensor y =
      ops::quantized_conv2d(x.dim() == 4 ? x : x.unsqueeze(0), w, codes, scale_a, scale_w, like(bias_a, x), like(bias, x),
                            options.kernel_size, options.stride, options.padding, options.dilation, options.groups,
                            options.bits, options.eps, options.clip_weight_gradient);
  return x.dim() == 4 ? y : y.squeeze(0);
}

QuantizedConv2d QuantizedConv2d::from_float(const torch::nn::Conv2d& layer, const StepOptions& steps) {
  const auto& from = layer->options;
  TORCH_CHECK_VALUE(std::holds_alternative<torch::enumtype::kZeros>(from.padding_mode()) &&
                        std::holds_alternative<torch::ExpandingArray<2>>(from.padding()),
                    "QuantizedConv2d: the layer's padding is a mode or a word, expected numbers of zeros");
  QuantizedConv2dOptions options(from.in_channels(), from.out_channels(), from.kernel_size());
  static_cast<StepOptions&>(options) = steps;
  options.stride = from.stride();
  options.padding = std::get<torch::ExpandingArray<2>>(from.padding());
  options.dilation = from.dilation();
  options.groups = from.groups();
  options.bias = layer->bias.defined();
  QuantizedConv2d made(options);
  made->to(layer->weight.device(), layer->weight.scalar_type());
  made->scale_a.set_data(made->scale_a.to(torch::kFloat));
  made->scale_w.set_data(made->scale_w.to(torch::kFloat));
  made->set_weight_data(layer->weight.detach());
  const torch::NoGradGuard no_grad;
  if (options.bias) made->bias.copy_(layer->bias);
  made->train(layer->is_training());
  return made;
}

// ---- QuantizedMatmul

QuantizedMatmulImpl::QuantizedMatmulImpl(const StepOptions& options_) : options(options_) {
  check_options("QuantizedMatmul", options);
  reset();
}

void QuantizedMatmulImpl::reset() {
  scale_x = register_parameter("scale_x", torch::ones({}, torch::kFloat));
  scale_z = register_parameter("scale_z", torch::ones({}, torch::kFloat));
}

void QuantizedMatmulImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::QuantizedMatmul(" << options << ")";
}

void QuantizedMatmulImpl::set_activation_scale(const torch::Tensor& x, const torch::Tensor& z) {
  if (!activation_initialised_ && x.numel() > 0 && z.numel() > 0) initialise(options, {{scale_x, x}, {scale_z, z}});
}

torch::Tensor QuantizedMatmulImpl::forward(const torch::Tensor& x, const torch::Tensor& z) {
  make_ready(options, {{scale_x, x}, {scale_z, z}});
  return ops::quantized_matmul(x, z, scale_x, scale_z, options.bits, options.eps);
}

// ---- QuantizedAttention

QuantizedAttentionImpl::QuantizedAttentionImpl(const QuantizedAttentionOptions& options_) : options(options_) {
  TORCH_CHECK_VALUE(options.num_heads >= 1 && options.embed_dim % options.num_heads == 0, "QuantizedAttention: num_heads is ",
                    options.num_heads, ", expected a divisor of embed_dim = ", options.embed_dim);
  reset();
}

void QuantizedAttentionImpl::reset() {
  QuantizedLinearOptions linear(options.embed_dim, options.embed_dim);
  static_cast<StepOptions&>(linear) = options;
  linear.bias = options.bias;
  q_proj = register_module("q_proj", QuantizedLinear(linear));
  k_proj = register_module("k_proj", QuantizedLinear(linear));
  v_proj = register_module("v_proj", QuantizedLinear(linear));
  out_proj = register_module("out_proj", QuantizedLinear(linear));
  scores = register_module("scores", QuantizedMatmul(static_cast<const StepOptions&>(options)));
  context = register_module("context", QuantizedMatmul(static_cast<const StepOptions&>(options)));
}

void QuantizedAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::QuantizedAttention(embed_dim=" << options.embed_dim << ", num_heads=" << options.num_heads << ", "
         << static_cast<const StepOptions&>(options) << ")";
}

torch::Tensor QuantizedAttentionImpl::forward(const torch::Tensor& query, torch::Tensor key, torch::Tensor value,
                                              const torch::Tensor& mask, bool is_causal) {
  if (!key.defined()) key = query;
  if (!value.defined()) value = key;
  const int64_t head_dim = options.embed_dim / options.num_heads;
  const auto heads = [&](const torch::Tensor& v) { return v.unflatten(-1, {options.num_heads, head_dim}).transpose(-3, -2); };
  torch::Tensor s = scores(heads(q_proj(query)), heads(k_proj(key))) / std::sqrt(double(head_dim));
  const double none = -std::numeric_limits<double>::infinity();
  if (is_causal) s = s.masked_fill(torch::ones({s.size(-2), s.size(-1)}, s.options().dtype(torch::kBool)).triu(1), none);
  if (mask.defined()) s = mask.scalar_type() == torch::kBool ? s.masked_fill(mask.logical_not(), none) : s + mask;
  const torch::Tensor p = torch::nn::functional::dropout(
      s.softmax(-1), torch::nn::functional::DropoutFuncOptions().p(options.dropout).training(is_training()));
  return out_proj(context(p, heads(v_proj(value)).transpose(-2, -1)).transpose(-3, -2).flatten(-2));
}

template class StepModule<QuantizedLinearImpl>;
template class StepModule<QuantizedConv2dImpl>;
template class StepModule<QuantizedMatmulImpl>;
template class QuantizedWeightModule<QuantizedLinearImpl>;
template class QuantizedWeightModule<QuantizedConv2dImpl>;

}  // namespace subbyte::nn
