#include "subbyte_torch/nn/mpq_linear.h"

#include <torch/nn/functional/padding.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "subbyte/formats/format.h"
#include "subbyte_torch/convert.h"

namespace subbyte::nn {
namespace {

constexpr const char* kLayoutNames[] = {"gba", "gptq", "mbwq", "exl2"};

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

bool in_input_order(MPQLayout layout) { return layout == MPQLayout::kGba || layout == MPQLayout::kGptq; }

}  // namespace

MPQLinearImpl::MPQLinearImpl(const MPQLinearOptions& options_) : options(options_) {
  check_options();
  reset();
}

MPQLinearImpl::MPQLinearImpl(const MPQLinearOptions& options_, const torch::Tensor& weight, torch::Tensor bias_,
                             const torch::Tensor& perm)
    : options(options_) {
  check_options();
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == options.out_features && weight.size(1) == options.in_features,
                    "MPQLinear: weight is ", weight.sizes(), ", expected [N, K] = [", options.out_features, ", ",
                    options.in_features, "]");
  options.bias = bias_.defined();
  pack(weight, perm);
  bias = register_parameter("bias", std::move(bias_), options.bias);
  if (options.channel_scale)
    place("channel_scale", &channel_scale, torch::ones({options.in_features}, weight_.scales.options()));
}

void MPQLinearImpl::check_options() {
  TORCH_CHECK_VALUE(options.in_features >= 0 && options.out_features >= 0, "MPQLinear: in_features is ", options.in_features,
                    " and out_features ", options.out_features, ", expected at least 0");
  TORCH_CHECK_VALUE(options.bits >= 1 && options.bits <= 8, "MPQLinear: bits is ", options.bits, ", expected 1 to 8");
  TORCH_CHECK_VALUE(options.group_size == -1 || options.group_size >= 1, "MPQLinear: group_size is ", options.group_size,
                    ", expected a positive number, or -1 for a whole row");
  TORCH_CHECK_VALUE(options.dq_group_size == -1 || options.dq_group_size >= 1, "MPQLinear: dq_group_size is ",
                    options.dq_group_size, ", expected a positive number, or -1 for all");
  TORCH_CHECK_VALUE(options.dq_mode == 1 || options.dq_mode == 2, "MPQLinear: dq_mode is ", options.dq_mode,
                    ", expected 1 or 2");
  TORCH_CHECK_VALUE(!options.asym || in_input_order(options.layout), "MPQLinear: asym with layout ",
                    kLayoutNames[int(options.layout)], ", whose zeros are values, expected asym = false");
  TORCH_CHECK_VALUE(options.format.empty() || options.layout == MPQLayout::kExl2, "MPQLinear: format with layout ",
                    kLayoutNames[int(options.layout)], ", which has one width: give bits");
  if (options.layout == MPQLayout::kGptq) options.asym = true;
  if (options.group_size == -1) options.group_size = std::max<int64_t>(1, options.in_features);
  if (options.dq_group_size == -1) options.dq_group_size = std::max<int64_t>(1, options.out_features);
}

std::string MPQLinearImpl::made_format() const {
  return options.format.empty() ? format_name(format_from_bits(options.bits)) : options.format;
}

void MPQLinearImpl::pack(const torch::Tensor& dense, const torch::Tensor& perm) {
  const std::string format = made_format();
  const torch::NoGradGuard no_grad;
  PackedWeight w;
  torch::Tensor third;
  std::tie(w.codes, w.scales, third) = ops::quantize(dense.detach(), format, options.group_size, "minmax",
                                                     options.asym ? "zeros" : "offsets", options.dtype, optional(perm));
  (options.asym ? w.zeros : w.offsets) = third;
  w.perm = perm;
  w.format = format;
  w.in_features = options.in_features;
  w.group_size = options.group_size;
  if (options.asym) {
    // GPTQ v1 cannot say a zero of 0, which groups without negative values get: zero 1 and a step wider by one level.
    const torch::Tensor low = w.zeros == 0;
    // Of one bit the zeros are 1 and 2: such a layer can be loaded, but says no positive value.
    const double levels = std::max(3.0, double(1 << options.bits));
    w.scales = torch::where(low, w.scales.to(torch::kFloat) * ((levels - 1) / (levels - 2)), w.scales.to(torch::kFloat))
                   .to(w.scales.scalar_type());
    w.zeros.masked_fill_(low, 1);
    w.encode_(dense.detach());
  }
  set_weight(std::move(w));
  groups_ = weight_.scales.size(1);
}

void MPQLinearImpl::reset() {
  const torch::NoGradGuard no_grad;
  torch::Tensor dense = torch::empty({options.out_features, options.in_features});
  if (dense.numel() > 0) torch::nn::init::kaiming_uniform_(dense, std::sqrt(5.0));
  const bool loaded = weight_.codes.defined() && (parent_.defined() || weight_.perm.defined() ||
                                                  weight_.group_size != options.group_size || weight_.format != made_format());
  if (loaded) {  // the grid and the structure of the file stay; clone() rests on this
    PackedWeight w = weight_.clone();
    w.encode_(dense.to(w.codes.device()));
    set_weight(std::move(w));
  } else {
    pack(dense, {});
  }
  if (parent_.defined()) place("parent", &parent_, parent_.clone());
  if (options.bias) {
    const double limit = options.in_features > 0 ? 1.0 / std::sqrt(double(options.in_features)) : 0.0;
    bias = register_parameter("bias", torch::empty({options.out_features}).uniform_(-limit, limit).to(options.dtype));
  } else {
    bias = register_parameter("bias", {}, /*requires_grad=*/false);
  }
  if (options.channel_scale || channel_scale.defined())
    place("channel_scale", &channel_scale, torch::ones({options.in_features}, weight_.scales.options()));
}

void MPQLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "subbyte::nn::MPQLinear(in_features=" << options.in_features << ", out_features=" << options.out_features
         << ", bias=" << std::boolalpha << options.bias << ", format=" << weight_.format
         << ", group_size=" << weight_.group_size << ", layout=" << kLayoutNames[int(options.layout)]
         << ", asym=" << options.asym;
  if (channel_scale.defined()) stream << ", channel_scale";
  stream << ")";
}

torch::Tensor MPQLinearImpl::forward(const torch::Tensor& x) {
  const torch::Tensor scaled = channel_scale.defined() ? x * channel_scale.to(x.scalar_type()) : x;
  return linear(scaled, weight_, bias.defined() ? OptionalTensor(bias.to(x.scalar_type())) : std::nullopt);
}

void MPQLinearImpl::place(const char* name, torch::Tensor* member, const torch::Tensor& value) {
  auto present = named_buffers(/*recurse=*/false);
  if (torch::Tensor* buffer = present.find(name)) {
    buffer->set_data(value);
    *member = *buffer;
  } else {
    *member = register_buffer(name, value);
  }
}

void MPQLinearImpl::adopt(const ops::ImportedWeight& imported) {
  TORCH_CHECK_VALUE(imported.codes.size(0) == options.out_features, "MPQLinear: the checkpoint has ", imported.codes.size(0),
                    " output features, expected N = ", options.out_features);
  const torch::NoGradGuard no_grad;
  const torch::Device device = weight_.codes.device();
  const torch::ScalarType type = weight_.scales.scalar_type();
  auto moved = [&](const torch::Tensor& t) {
    return t.defined() ? t.to(device, t.is_floating_point() ? type : t.scalar_type()) : t;
  };
  PackedWeight w;
  w.codes = moved(imported.codes);
  w.scales = moved(imported.scales);
  w.zeros = moved(imported.zeros);
  w.offsets = moved(imported.offsets);
  w.perm = moved(imported.perm);
  // Buffers cannot be taken back: where there was an order or a map, the identity stands.
  if (!w.perm.defined() && weight_.perm.defined())
    w.perm = torch::arange(options.in_features, torch::TensorOptions(device).dtype(torch::kInt));
  w.format = imported.format;
  w.in_features = options.in_features;
  w.group_size = imported.group_size;
  const int64_t pieces = w.scales.size(1);
  if (imported.parent.defined()) place("parent", &parent_, moved(imported.parent));
  else if (parent_.defined())
    place("parent", &parent_, torch::arange(pieces, torch::TensorOptions(device).dtype(torch::kLong)));
  set_weight(std::move(w));
}

void MPQLinearImpl::load(torch::serialize::InputArchive& archive) {
  // Rows may be permuted or cut, and widths differ, from what this layer was made with: the structure is taken first.
  c10::IValue format, group_size;
  archive.read("format", format);
  archive.read("group_size", group_size);
  ops::ImportedWeight stored;
  archive.read("codes", stored.codes, /*is_buffer=*/true);
  archive.read("scales", stored.scales, /*is_buffer=*/true);
  archive.read(options.asym ? "zeros" : "offsets", options.asym ? stored.zeros : stored.offsets, /*is_buffer=*/true);
  archive.try_read("perm", stored.perm, /*is_buffer=*/true);
  archive.try_read("parent", stored.parent, /*is_buffer=*/true);
  stored.format = format.toStringRef();
  stored.group_size = group_size.toInt();
  torch::Tensor scale, b;
  archive.try_read("channel_scale", scale, /*is_buffer=*/true);
  if (options.bias) {
    archive.read("bias", b);
    TORCH_CHECK_VALUE(b.dim() == 1 && b.size(0) == options.out_features, "load: bias is ", b.sizes(), " in the archive, [",
                      options.out_features, "] in the module");
  }
  TORCH_CHECK_VALUE(!scale.defined() || scale.numel() == options.in_features, "load: channel_scale has ",
                    scale.defined() ? scale.numel() : 0, " entries in the archive, expected K = ", options.in_features);
  // The shape rule of the op is the check.
  ops::dequantize(stored.codes.to(torch::kMeta), stored.scales.to(torch::kMeta),
                  stored.zeros.defined() ? OptionalTensor(stored.zeros.to(torch::kMeta)) : std::nullopt,
                  stored.offsets.defined() ? OptionalTensor(stored.offsets.to(torch::kMeta)) : std::nullopt,
                  stored.perm.defined() ? OptionalTensor(stored.perm.to(torch::kMeta)) : std::nullopt, stored.format,
                  options.in_features, stored.group_size);
  adopt(stored);
  const torch::NoGradGuard no_grad;
  kept_.clear();
  groups_ = !stored.parent.defined()     ? weight_.scales.size(1)
            : stored.parent.numel() == 0 ? 0
                                         : stored.parent.max().item<int64_t>() + 1;
  const torch::TensorOptions to = weight_.scales.options();
  if (scale.defined()) place("channel_scale", &channel_scale, scale.to(to));
  else if (channel_scale.defined()) channel_scale.fill_(1);
  if (options.bias) bias.copy_(b);
  weight_.forget_handle();
}

void MPQLinearImpl::load_original(const State& state) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = weight_.codes.device();
  const torch::ScalarType type = weight_.scales.scalar_type();
  auto value = [&](const std::string& name) {
    const torch::Tensor* t = state.find(name);
    return t == nullptr || !t->defined() ? torch::Tensor() : t->to(device, t->is_floating_point() ? type : t->scalar_type());
  };
  auto required = [&](const std::string& name) {
    torch::Tensor t = value(name);
    TORCH_CHECK_VALUE(t.defined(), "MPQLinear: ", name, " is missing from the checkpoint of a ",
                      kLayoutNames[int(options.layout)], " layer");
    return t;
  };
  std::map<std::string, SecondLevel> kept;
  auto expanded = [&](const torch::Tensor& codes, const std::string& what) {
    const SecondLevel level{required("q" + what + "_zeros"), required("q" + what + "_scales")};
    kept[what] = level;
    return ops::expand_second_level(codes, level.zeros, level.scales, options.out_features, options.dq_group_size);
  };

  ops::ImportedWeight imported;
  const torch::Tensor qweight = required("qweight");
  int64_t groups = 0;
  if (options.layout == MPQLayout::kExl2) {
    const torch::Tensor scales = required("scales");
    groups = scales.size(0);
    imported = ops::exl2_import(qweight, required("q_groups"), scales, required("zeros"), optional(value("q_perm")),
                                options.in_features);
  } else {
    const bool twice = options.layout == MPQLayout::kGba && options.group_size < 256;
    torch::Tensor scales, zeros, qzeros;
    if (options.asym) {
      qzeros = value("qzeros");
      if (!qzeros.defined()) qzeros = required("zeros");
      if (const torch::Tensor codes = value("qscales"); twice && codes.defined()) scales = expanded(codes, "scales");
    } else if (const torch::Tensor bytes = value("qstatistic"); twice && bytes.defined()) {
      const auto [scale_codes, zero_codes] = ops::unpack_statistic(bytes);
      scales = expanded(scale_codes, "scales");
      zeros = expanded(zero_codes, "zeros");
    } else {
      zeros = required("zeros");
    }
    if (!scales.defined()) scales = required("scales");
    groups = scales.size(0);
    imported = ops::gptq_import(qweight, scales, optional(zeros), optional(qzeros),
                                options.layout == MPQLayout::kMbwq ? std::nullopt : optional(value("g_idx")),
                                optional(value("q_perm")), options.bits, options.in_features, options.group_size);
  }
  const torch::Tensor b = value("bias");
  torch::Tensor scale = value("channel_scale");
  TORCH_CHECK_VALUE(!scale.defined() || scale.numel() == options.in_features, "MPQLinear: channel_scale has ",
                    scale.defined() ? scale.numel() : 0, " entries, expected K = ", options.in_features);
  TORCH_CHECK_VALUE(!b.defined() || (b.dim() == 1 && b.size(0) == options.out_features), "MPQLinear: bias is ",
                    b.defined() ? b.sizes() : torch::IntArrayRef(), ", expected [N] = [", options.out_features, "]");
  TORCH_CHECK_VALUE(options.bias || !b.defined() || !b.any().item<bool>(),
                    "MPQLinear: the checkpoint has a bias, the layer was made without");
  TORCH_CHECK_VALUE(!options.bias || b.defined(), "MPQLinear: bias is missing from the checkpoint");
  adopt(imported);
  kept_ = std::move(kept);
  groups_ = groups;
  if (options.bias) bias.copy_(b);
  if (scale.defined() && (channel_scale.defined() || !(scale == 1).all().item<bool>()))
    place("channel_scale", &channel_scale, scale.reshape({-1}).clone());
  weight_.forget_handle();
}

std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> MPQLinearImpl::second_level(const torch::Tensor& values, int64_t levels,
                                                                                    const std::string& what) const {
  const auto found = kept_.find(what);
  const bool kept = found != kept_.end();
  const OptionalTensor zeros = kept ? OptionalTensor(found->second.zeros.to(values.options())) : std::nullopt;
  const OptionalTensor scales = kept ? OptionalTensor(found->second.scales.to(values.options())) : std::nullopt;
  if (options.dq_mode == 2) return ops::requantize_second_level(values, levels, options.dq_group_size, false, zeros, scales);
  auto [codes, z, s] = ops::requantize_second_level(values, levels, 1, true, zeros, scales);
  const int64_t size = options.dq_group_size, blocks = ceil_div(options.out_features, size);
  codes = torch::constant_pad_nd(codes.flatten(1), {0, blocks * size - options.out_features});
  return {codes.view({codes.size(0), blocks, size}), z, s};
}

MPQLinearImpl::State MPQLinearImpl::export_original(bool raw) const {
  const torch::NoGradGuard no_grad;
  const bool in_order = in_input_order(options.layout), gba = options.layout == MPQLayout::kGba;
  const ops::ExportedWeight w = ops::export_columns(
      weight_.codes, weight_.scales, optional(weight_.zeros), optional(weight_.offsets), optional(weight_.perm), weight_.format,
      weight_.in_features, weight_.group_size, optional(parent_), groups_, options.asym, in_order);
  State out;
  out.insert("qweight", w.qweight);
  if (in_order) {
    out.insert("g_idx", w.row_groups);
  } else {
    const torch::TensorOptions index = weight_.codes.options().dtype(torch::kInt);
    torch::Tensor perm = weight_.perm;
    // All zero is the original's way to say: as they come.
    if (!perm.defined() || torch::equal(perm, torch::arange(options.in_features, index)))
      perm = torch::zeros({options.in_features}, index);
    out.insert("q_perm", options.in_features <= 32768 ? perm.to(torch::kShort) : perm);
    const torch::Tensor scale =
        channel_scale.defined() ? channel_scale : torch::ones({options.in_features}, w.scales.options());
    out.insert("channel_scale", scale.view({1, 1, -1}));
  }
  if (bias.defined()) out.insert("bias", bias.detach());
  if (options.layout == MPQLayout::kExl2) out.insert("q_groups", ops::q_groups_of(w.row_groups, weight_.format));
  torch::Tensor packed_zeros;
  if (options.asym) {
    TORCH_CHECK_VALUE(torch::equal(w.zeros, w.zeros.round()), "MPQLinear: zeros has fractions, the layout holds integers");
    packed_zeros = ops::gptq_pack_zeros(w.zeros, options.bits);
    out.insert("qzeros", packed_zeros);
  }
  if (raw && in_order && 32 % options.bits == 0)
    out.insert("wf", torch::arange(0, 32, options.bits, weight_.codes.options().dtype(torch::kInt)).unsqueeze(0));
  if (raw && gba && options.group_size < 256) {
    out.insert("scales", torch::ones_like(w.scales));
    out.insert("zeros", torch::zeros_like(w.scales));
    const auto [scale_codes, scale_zeros, scale_scales] = second_level(w.scales, options.asym ? 256 : 16, "scales");
    out.insert("qscales_zeros", scale_zeros);
    out.insert("qscales_scales", scale_scales);
    if (options.asym) {
      out.insert("qscales",
                 options.bits == 4 ? scale_codes : scale_codes.flatten(1).narrow(1, 0, options.out_features).contiguous());
    } else {
      const auto [zero_codes, zero_zeros, zero_scales] = second_level(w.zeros, 16, "zeros");
      out.insert("qzeros_zeros", zero_zeros);
      out.insert("qzeros_scales", zero_scales);
      out.insert("qstatistic", ops::pack_statistic(scale_codes, zero_codes));
    }
    return out;
  }
  out.insert("scales", w.scales);
  if (!options.asym) out.insert("zeros", w.zeros);
  else if (gba) out.insert("zeros", raw ? torch::zeros_like(w.scales) : packed_zeros);
  return out;
}

MPQLinear MPQLinear::from_linear(const torch::nn::Linear& layer, MPQLinearOptions options, const torch::Tensor& perm) {
  options.in_features = layer->weight.size(1);
  options.out_features = layer->weight.size(0);
  options.bias = layer->bias.defined();
  TORCH_CHECK_VALUE(options.bits > 1 || !(options.asym || options.layout == MPQLayout::kGptq),
                    "MPQLinear: bits is 1 with asym, whose zeros of 1 and 2 leave no positive value, expected asym = false");
  return MPQLinear(std::make_shared<MPQLinearImpl>(options, layer->weight.detach(),
                                                   options.bias ? layer->bias.detach().clone() : torch::Tensor(), perm));
}

}  // namespace subbyte::nn
