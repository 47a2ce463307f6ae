#include "subbyte_torch/nn/binary.h"

#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "subbyte_torch/ops/binary.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte::nn {
namespace {

torch::Tensor first_scale(const torch::Tensor& x, bool symmetric) {
  return (x.detach().to(torch::kFloat).abs().mean() * (symmetric ? 2.0 : 4.0)).clamp_min(1e-5);
}

bool flag_of(const torch::Tensor& t) { return t.item<bool>(); }

std::optional<torch::Tensor> if_defined(const torch::Tensor& t) {
  return t.defined() ? std::optional<torch::Tensor>(t) : std::nullopt;
}

void assign(torch::Tensor& to, const torch::Tensor& from, const std::optional<torch::Device>& device) {
  if (from.defined())
    to.set_data(device.has_value() ? from.detach().to(*device, from.scalar_type(), false, true) : from.detach().clone());
}

}  // namespace

// ---- what linear and conv2d share

BinaryWeightModule::BinaryWeightModule(std::string name, std::vector<int64_t> weight_shape, int64_t shift_size, bool with_bias,
                                       bool symmetric)
    : torch::nn::Module(std::move(name)), weight_shape_(std::move(weight_shape)), symmetric_(symmetric) {
  weight = register_parameter("weight", torch::empty(weight_shape_));
  bias_a = register_parameter("bias_a", torch::zeros({shift_size}));
  scale_a = register_parameter("scale_a", torch::ones({}));
  bias = register_parameter("bias", with_bias ? torch::zeros({weight_shape_[0]}) : torch::Tensor(), with_bias);
  scale_w = register_buffer("scale_w", torch::ones({}));
  qweight = register_buffer("qweight", torch::empty({0}, torch::kByte));
  prepared = register_buffer("prepared", torch::zeros({}, torch::kBool));
  scale_initialized = register_buffer("scale_initialized", torch::zeros({}, torch::kBool));
  reset();
}

void BinaryWeightModule::reset() {
  TORCH_CHECK_VALUE(float_weight_, name(), ": there is no float weight to reset, only its packed signs are kept");
  const torch::NoGradGuard no_grad;
  if (weight.numel() > 0) torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  bias_a.zero_();
  if (bias.defined()) bias.zero_();
  scale_a.fill_(1.0);
  set_weight_scale();
  prepared.fill_(false);
  scale_initialized.fill_(false);
  prepared_ = scale_known_ = false;
}

void BinaryWeightModule::prepare_params() {
  if (!float_weight_ || prepared_) return;
  const torch::NoGradGuard no_grad;
  set_weight_scale();
  if (weight.numel() > 0) weight.sub_(weight.mean());
  prepared.fill_(true);
  prepared_ = true;
}

void BinaryWeightModule::set_weight_scale() {
  scale_w.copy_(weight.numel() > 0 ? weight.to(torch::kFloat).abs().mean().clamp_min(1e-12) : torch::ones({}));
}

void BinaryWeightModule::initialize_scale(const torch::Tensor& x) {
  if (x.numel() == 0) return;
  const torch::NoGradGuard no_grad;
  scale_a.copy_(first_scale(x, symmetric_));
  scale_initialized.fill_(true);
  scale_known_ = true;
}

void BinaryWeightModule::start(const torch::Tensor& x) {
  if (is_training() && !scale_known_) initialize_scale(x);
}

void BinaryWeightModule::generate_quantized_weight(bool qweight_only) {
  if (!float_weight_) return;
  const torch::NoGradGuard no_grad;
  qweight.set_data(ops::pack(weight.detach().flatten(1).ge(0).to(torch::kByte), "sign"));
  packed_from_ = weight.detach();
  packed_version_ = int64_t(weight._version());
  if (!qweight_only) return;
  weight.set_data(torch::empty({0}, weight.options()));
  weight.mutable_grad() = torch::Tensor();
  float_weight_ = false;
  packed_from_ = torch::Tensor();
}

BinaryWeightModule::Operands BinaryWeightModule::operands() {
  Operands out;
  out.bias = if_defined(bias);
  if (!float_weight_) {
    out.codes = qweight;
    return out;
  }
  out.weight = weight;
  if (is_training()) return out;
  const bool current =
      packed_from_.defined() && packed_from_.is_alias_of(weight) && packed_version_ == int64_t(weight._version());
  if (!current) generate_quantized_weight();
  out.codes = qweight;
  return out;
}

void BinaryWeightModule::train(bool on) {
  torch::nn::Module::train(on);
  if (!on || !float_weight_) return;
  qweight.set_data(torch::empty({0}, qweight.options()));
  packed_from_ = torch::Tensor();
}

void BinaryWeightModule::read_flags() {
  prepared_ = flag_of(prepared);
  scale_known_ = flag_of(scale_initialized);
}

void BinaryWeightModule::load(torch::serialize::InputArchive& archive) {
  const torch::NoGradGuard no_grad;
  // Read apart first: an archive of other shapes leaves the module as it was.
  const auto stored = [&](const char* key, bool is_buffer) {
    torch::Tensor t;
    archive.read(key, t, is_buffer);
    return t;
  };
  const torch::Tensor w = stored("weight", false), codes = stored("qweight", true), shift = stored("bias_a", false);
  int64_t k = 1;
  for (size_t i = 1; i < weight_shape_.size(); ++i) k *= weight_shape_[i];
  const std::vector<int64_t> code_shape = {weight_shape_[0], (k + 7) / 8}, none = {0};
  TORCH_CHECK_VALUE(
      w.sizes() == at::IntArrayRef(weight_shape_) || (w.numel() == 0 && codes.sizes() == at::IntArrayRef(code_shape)),
      "load: weight is ", w.sizes(), " and qweight ", codes.sizes(), " in the archive, expected ",
      at::IntArrayRef(weight_shape_), " or ", at::IntArrayRef(code_shape));
  TORCH_CHECK_VALUE(shift.sizes() == bias_a.sizes(), "load: bias_a is ", shift.sizes(), " in the archive, ", bias_a.sizes(),
                    " in the module");
  const bool had_weight = w.sizes() == at::IntArrayRef(weight_shape_);
  torch::nn::Module::load(archive);
  float_weight_ = had_weight;
  if (float_weight_) qweight.set_data(torch::empty({0}, qweight.options()));
  packed_from_ = torch::Tensor();
  read_flags();
}

void BinaryWeightModule::convert(std::optional<torch::Device> device, std::optional<torch::Dtype> dtype, bool non_blocking) {
  const auto moved = [&](const torch::Tensor& t) {
    return t.to(device.value_or(t.device()), dtype.has_value() && t.is_floating_point() ? *dtype : t.scalar_type(),
                non_blocking);
  };
  for (auto& parameter : named_parameters(/*recurse=*/false)) parameter->set_data(moved(*parameter));
  for (auto& buffer : named_buffers(/*recurse=*/false)) buffer->set_data(moved(*buffer));
  packed_from_ = torch::Tensor();
}

void BinaryWeightModule::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  convert(device, dtype, non_blocking);
}
void BinaryWeightModule::to(torch::Dtype dtype, bool non_blocking) { convert(std::nullopt, dtype, non_blocking); }
void BinaryWeightModule::to(torch::Device device, bool non_blocking) { convert(device, std::nullopt, non_blocking); }

void BinaryWeightModule::copy_from(const BinaryWeightModule& other, const std::optional<torch::Device>& device) {
  const torch::NoGradGuard no_grad;
  assign(weight, other.weight, device);
  assign(bias_a, other.bias_a, device);
  assign(scale_a, other.scale_a, device);
  if (bias.defined()) assign(bias, other.bias, device);
  assign(scale_w, other.scale_w, device);
  assign(qweight, other.qweight, device);
  assign(prepared, other.prepared, device);
  assign(scale_initialized, other.scale_initialized, device);
  weight.set_requires_grad(other.weight.requires_grad());
  float_weight_ = other.float_weight_;
  prepared_ = other.prepared_;
  scale_known_ = other.scale_known_;
  torch::nn::Module::train(other.is_training());
}

void BinaryWeightModule::copy_float(const torch::Tensor& float_weight, const torch::Tensor& float_bias) {
  const torch::NoGradGuard no_grad;
  to(float_weight.device(), float_weight.scalar_type());
  weight.copy_(float_weight);
  if (float_bias.defined()) bias.copy_(float_bias);
  prepare_params();
}

// ---- linear

BinaryLinearImpl::BinaryLinearImpl(const BinaryLinearOptions& o)
    : BinaryWeightModule("BinaryLinear", {o.out_features, o.in_features}, o.in_features, o.bias, o.symmetric), options(o) {}

void BinaryLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::BinaryLinear(in_features=" << options.in_features << ", out_features=" << options.out_features
         << ", bias=" << std::boolalpha << options.bias << (has_float_weight() ? ")" : ", packed)");
}

std::shared_ptr<torch::nn::Module> BinaryLinearImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<BinaryLinearImpl>(options);
  copy->copy_from(*this, device);
  return copy;
}

torch::Tensor BinaryLinearImpl::forward(const torch::Tensor& x) {
  start(x);
  const Operands o = operands();
  return ops::binary_linear(x, o.weight, o.codes, bias_a, scale_a, scale_w, o.bias);
}

BinaryLinear BinaryLinear::from_float(const torch::nn::Linear& layer, bool symmetric) {
  BinaryLinearOptions o(layer->options.in_features(), layer->options.out_features());
  o.bias = layer->bias.defined();
  o.symmetric = symmetric;
  BinaryLinear out(o);
  out->copy_float(layer->weight, layer->bias);
  out->train(layer->is_training());
  return out;
}

// ---- conv2d

BinaryConv2dImpl::BinaryConv2dImpl(const BinaryConv2dOptions& o)
    : BinaryWeightModule("BinaryConv2d",
                         {o.out_channels, o.in_channels / std::max<int64_t>(o.groups, 1), o.kernel_size[0], o.kernel_size[1]},
                         o.in_channels, o.bias, o.symmetric),
      options(o) {
  TORCH_CHECK_VALUE(o.groups >= 1 && o.in_channels % o.groups == 0 && o.out_channels % o.groups == 0,
                    "BinaryConv2d: groups is ", o.groups, ", expected a divisor of in_channels = ", o.in_channels,
                    " and out_channels = ", o.out_channels);
  TORCH_CHECK_VALUE(o.pad_value >= -1 && o.pad_value <= 1, "BinaryConv2d: pad_value is ", o.pad_value, ", expected -1, 0 or 1");
}

void BinaryConv2dImpl::pretty_print(std::ostream& stream) const {
  const auto pair = [](const std::array<int64_t, 2>& v) { return at::IntArrayRef(v); };
  stream << "subbyte::nn::BinaryConv2d(" << options.in_channels << ", " << options.out_channels
         << ", kernel_size=" << pair(options.kernel_size) << ", stride=" << pair(options.stride)
         << ", padding=" << pair(options.padding) << ", dilation=" << pair(options.dilation) << ", groups=" << options.groups
         << ", pad_value=" << options.pad_value << ", bias=" << std::boolalpha << options.bias
         << (has_float_weight() ? ")" : ", packed)");
}

std::shared_ptr<torch::nn::Module> BinaryConv2dImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<BinaryConv2dImpl>(options);
  copy->copy_from(*this, device);
  return copy;
}

torch::Tensor BinaryConv2dImpl::forward(const torch::Tensor& x) {
  start(x);
  const Operands o = operands();
  return ops::binary_conv2d(x, o.weight, o.codes, bias_a, scale_a, scale_w, o.bias, options.kernel_size, options.stride,
                            options.padding, options.dilation, options.groups, options.pad_value);
}

BinaryConv2d BinaryConv2d::from_float(const torch::nn::Conv2d& layer, int pad_value, bool symmetric) {
  const auto& from = layer->options;
  const auto pair = [](const torch::ExpandingArray<2>& v) { return std::array<int64_t, 2>{(*v)[0], (*v)[1]}; };
  TORCH_CHECK_VALUE(std::holds_alternative<torch::ExpandingArray<2>>(from.padding()) &&
                        std::holds_alternative<torch::enumtype::kZeros>(from.padding_mode()),
                    "BinaryConv2d: the layer pads by name or not with zeros, expected numbers of zeros");
  BinaryConv2dOptions o(from.in_channels(), from.out_channels(), pair(from.kernel_size()));
  o.stride = pair(from.stride());
  o.padding = pair(std::get<torch::ExpandingArray<2>>(from.padding()));
  o.dilation = pair(from.dilation());
  o.groups = from.groups();
  o.pad_value = pad_value;
  o.bias = layer->bias.defined();
  o.symmetric = symmetric;
  BinaryConv2d out(o);
  out->copy_float(layer->weight, layer->bias);
  out->train(layer->is_training());
  return out;
}

// ---- matmul

BinaryMatmulImpl::BinaryMatmulImpl(bool symmetric) : torch::nn::Module("BinaryMatmul"), symmetric_(symmetric) {
  x_clip = register_parameter("x_clip", torch::ones({}));
  z_clip = register_parameter("z_clip", torch::ones({}));
  clip_initialized = register_buffer("clip_initialized", torch::zeros({}, torch::kBool));
}

void BinaryMatmulImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::BinaryMatmul(symmetric=" << std::boolalpha << symmetric_ << ")";
}

std::shared_ptr<torch::nn::Module> BinaryMatmulImpl::clone(const std::optional<torch::Device>& device) const {
  const torch::NoGradGuard no_grad;
  auto copy = std::make_shared<BinaryMatmulImpl>(symmetric_);
  assign(copy->x_clip, x_clip, device);
  assign(copy->z_clip, z_clip, device);
  assign(copy->clip_initialized, clip_initialized, device);
  copy->clips_known_ = clips_known_;
  copy->train(is_training());
  return copy;
}

void BinaryMatmulImpl::load(torch::serialize::InputArchive& archive) {
  torch::nn::Module::load(archive);
  clips_known_ = flag_of(clip_initialized);
}

void BinaryMatmulImpl::initialize_clips(const torch::Tensor& x, const torch::Tensor& z) {
  if (x.numel() == 0 || z.numel() == 0) return;
  const torch::NoGradGuard no_grad;
  x_clip.copy_(first_scale(x, symmetric_));
  z_clip.copy_(first_scale(z, symmetric_));
  clip_initialized.fill_(true);
  clips_known_ = true;
}

torch::Tensor BinaryMatmulImpl::forward(const torch::Tensor& x, const torch::Tensor& z) {
  if (is_training() && !clips_known_) initialize_clips(x, z);
  return ops::binary_matmul(x, z, x_clip, z_clip);
}

// ---- attention

BinaryAttentionImpl::BinaryAttentionImpl(const BinaryAttentionOptions& o) : torch::nn::Module("BinaryAttention"), options(o) {
  TORCH_CHECK_VALUE(o.num_heads >= 1 && o.hidden_dim % o.num_heads == 0, "BinaryAttention: hidden_dim is ", o.hidden_dim,
                    ", expected a multiple of num_heads = ", o.num_heads);
  BinaryLinearOptions in(o.input_dim, o.hidden_dim), out(o.hidden_dim, o.hidden_dim);
  in.symmetric = out.symmetric = o.symmetric;
  q_linear = register_module("q_linear", BinaryLinear(in));
  k_linear = register_module("k_linear", BinaryLinear(in));
  v_linear = register_module("v_linear", BinaryLinear(in));
  out_linear = register_module("out_linear", BinaryLinear(out));
  if (o.binary_scores) scores = register_module("scores", BinaryMatmul(o.symmetric));
  dropout = register_module("dropout", torch::nn::Dropout(o.dropout));
}

void BinaryAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::BinaryAttention(input_dim=" << options.input_dim << ", hidden_dim=" << options.hidden_dim
         << ", num_heads=" << options.num_heads << ", dropout=" << options.dropout << ")";
}

std::shared_ptr<torch::nn::Module> BinaryAttentionImpl::clone(const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<BinaryAttentionImpl>(options);
  const auto cloned = [&](const BinaryLinear& layer) {
    return std::dynamic_pointer_cast<BinaryLinearImpl>(layer->clone(device));
  };
  copy->q_linear = BinaryLinear(copy->replace_module("q_linear", cloned(q_linear)));
  copy->k_linear = BinaryLinear(copy->replace_module("k_linear", cloned(k_linear)));
  copy->v_linear = BinaryLinear(copy->replace_module("v_linear", cloned(v_linear)));
  copy->out_linear = BinaryLinear(copy->replace_module("out_linear", cloned(out_linear)));
  if (!scores.is_empty())
    copy->scores =
        BinaryMatmul(copy->replace_module("scores", std::dynamic_pointer_cast<BinaryMatmulImpl>(scores->clone(device))));
  copy->train(is_training());
  return copy;
}

void BinaryAttentionImpl::prepare_params() {
  for (BinaryLinear* layer : {&q_linear, &k_linear, &v_linear, &out_linear}) (*layer)->prepare_params();
}

void BinaryAttentionImpl::generate_quantized_weight(bool qweight_only) {
  for (BinaryLinear* layer : {&q_linear, &k_linear, &v_linear, &out_linear}) (*layer)->generate_quantized_weight(qweight_only);
}

std::tuple<torch::Tensor, torch::Tensor> BinaryAttentionImpl::forward(const torch::Tensor& x, const torch::Tensor& mask) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == options.input_dim, "BinaryAttention: x is ", x.sizes(),
                    ", expected [batch, seq, ", options.input_dim, "]");
  const int64_t batch = x.size(0), seq = x.size(1), head_dim = options.hidden_dim / options.num_heads;
  if (mask.defined())
    TORCH_CHECK_VALUE(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == batch) && mask.size(1) == 1 &&
                          (mask.size(2) == 1 || mask.size(2) == seq) && mask.size(3) == seq,
                      "BinaryAttention: mask is ", mask.sizes(), ", expected [", batch, ", 1, 1, ", seq, "] or [", batch,
                      ", 1, ", seq, ", ", seq, "]");
  const auto heads = [&](BinaryLinear& layer) {
    return layer->forward(x).reshape({batch, seq, options.num_heads, head_dim}).transpose(1, 2);
  };
  const torch::Tensor q = heads(q_linear), k = heads(k_linear), v = heads(v_linear);
  torch::Tensor s = scores.is_empty() ? torch::matmul(q, k.transpose(-2, -1)) : scores->forward(q, k);
  s = s.to(torch::kFloat) / std::sqrt(double(head_dim));
  if (mask.defined()) s = s.masked_fill(mask == 0, -1e9);
  const torch::Tensor probabilities = dropout->forward(torch::softmax(s, -1).to(v.scalar_type()));
  const torch::Tensor context = torch::matmul(probabilities, v).transpose(1, 2).reshape({batch, seq, options.hidden_dim});
  return {out_linear->forward(context), probabilities};
}

}  // namespace subbyte::nn
