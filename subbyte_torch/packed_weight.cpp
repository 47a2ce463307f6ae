#include "subbyte_torch/packed_weight.h"

#include <torch/utils.h>

#include <algorithm>

#include "subbyte/formats/format.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/embedding.h"
#include "subbyte_torch/ops/fine_grid.h"

namespace subbyte {
namespace {

OptionalTensor optional(const torch::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

OptionalTensor handle_for(const PackedWeight& w, bool with_gradient) {
  return with_gradient && torch::GradMode::is_enabled() ? OptionalTensor(w.handle()) : std::nullopt;
}

}  // namespace

QuantizeOptions QuantizeOptions::resolved(int64_t in_features) const {
  QuantizeOptions out = *this;
  if (out.format.empty()) out.format = translated([&] { return format_name(format_from_bits(bits)); });
  TORCH_CHECK_VALUE(group_size >= 0, "quantize: group_size is ", group_size, ", expected at least 0");
  if (out.group_size == 0) out.group_size = std::max<int64_t>(1, in_features);
  const bool few_levels = out.format == "sign" || out.format == "ternary";
  if (out.scheme.empty() && residual_bits > 0 && !sym) out.scheme = "midrise";
  if (out.scheme == "midrise" || out.scheme == "fan_in") {
    TORCH_CHECK_VALUE(!sym || few_levels, "quantize: scheme '", out.scheme, "' puts the zero of ", out.format,
                      " in the middle of its levels, and sym is true, which means the format's fixed zero");
    out.sym = few_levels;
    out.zero_kind = few_levels ? "fixed" : "zeros";
    return out;
  }
  out.sym = sym || few_levels;
  if (out.scheme.empty()) out.scheme = !out.sym ? "minmax" : few_levels ? "absmean" : "absmax";
  if (out.sym) out.zero_kind = "fixed";
  return out;
}

PackedWeight PackedWeight::quantize(const torch::Tensor& w, const QuantizeOptions& options, bool stochastic, int64_t seed,
                                    int64_t offset) {
  TORCH_CHECK_VALUE(w.dim() == 2, "quantize: w has ", w.dim(), " dimensions, expected [N, K]");
  const torch::NoGradGuard no_grad;
  const QuantizeOptions o = options.resolved(w.size(1));
  PackedWeight out;
  torch::Tensor third;
  std::tie(out.codes, out.scales, third) =
      ops::quantize(w.detach(), o.format, o.group_size, o.scheme, o.zero_kind, o.scale_dtype, optional(o.perm),
                    stochastic ? "stochastic" : "nearest", seed, offset);
  if (o.zero_kind == "zeros") out.zeros = third;
  if (o.zero_kind == "offsets") out.offsets = third;
  out.perm = o.perm;
  out.format = o.format;
  out.in_features = w.size(1);
  out.group_size = o.group_size;
  if (o.residual_bits != 0) {
    const std::string plane =
        translated([&] { return std::string(format_name(format_from_bits(std::clamp(o.residual_bits, 1, 8)))); });
    out.residual_bits = o.residual_bits;
    out.residual = ops::pack(torch::zeros({w.size(0), w.size(1)}, out.codes.options()), plane);
    out.encode_(w.detach(), stochastic, seed, offset);
  }
  return out;
}

torch::Tensor PackedWeight::dequantize_fine(std::optional<torch::ScalarType> dtype) const {
  if (!residual.defined()) return dequantize(dtype);
  return ops::dequantize_fine(codes, scales, optional(zeros), optional(offsets), optional(perm), format, in_features,
                              group_size, residual, residual_bits, dtype);
}

PackedWeight PackedWeight::drop_residual() const {
  PackedWeight out = *this;
  out.residual = torch::Tensor();
  out.residual_bits = 0;
  out.handle_ = torch::Tensor();
  return out;
}

torch::Tensor PackedWeight::dequantize(std::optional<torch::ScalarType> dtype) const {
  return ops::dequantize(codes, scales, optional(zeros), optional(offsets), optional(perm), format, in_features, group_size,
                         dtype);
}

void PackedWeight::encode_(const torch::Tensor& w, bool stochastic, int64_t seed, int64_t offset) {
  const torch::NoGradGuard no_grad;
  if (residual.defined()) {
    ops::encode_fine_(codes, scales, optional(zeros), optional(offsets), optional(perm), format, in_features, group_size,
                      residual, residual_bits, w, stochastic ? "stochastic" : "nearest", seed, offset);
    return;
  }
  ops::encode_(codes, w, scales, optional(zeros), optional(offsets), optional(perm), format, group_size,
               stochastic ? "stochastic" : "nearest", seed, offset);
}

void PackedWeight::apply_update_(const torch::Tensor& delta, int64_t seed, int64_t offset) {
  const torch::NoGradGuard no_grad;
  encode_(dequantize_fine(torch::kFloat).add_(delta), /*stochastic=*/true, seed, offset);
}

PackedWeight PackedWeight::to(torch::Device device) const {
  auto moved = [&](const torch::Tensor& t) { return t.defined() ? t.to(device) : t; };
  PackedWeight out = *this;
  out.codes = moved(codes);
  out.scales = moved(scales);
  out.zeros = moved(zeros);
  out.offsets = moved(offsets);
  out.perm = moved(perm);
  out.residual = moved(residual);
  out.handle_ = torch::Tensor();
  return out;
}

PackedWeight PackedWeight::clone() const {
  auto copied = [](const torch::Tensor& t) { return t.defined() ? t.detach().clone() : t; };
  PackedWeight out = *this;
  out.codes = copied(codes);
  out.scales = copied(scales);
  out.zeros = copied(zeros);
  out.offsets = copied(offsets);
  out.perm = copied(perm);
  out.residual = copied(residual);
  out.handle_ = torch::Tensor();
  return out;
}

int64_t PackedWeight::bytes() const {
  int64_t sum = 0;
  for (const torch::Tensor* t : {&codes, &scales, &zeros, &offsets, &perm, &residual})
    if (t->defined()) sum += int64_t(t->nbytes());
  return sum;
}

const torch::Tensor& PackedWeight::handle() const {
  if (!handle_.defined() || handle_.device() != codes.device()) {
    const torch::NoGradGuard no_grad;
    handle_ = torch::zeros({}, scales.options().requires_grad(false)).expand({out_features(), in_features}).detach();
    handle_.requires_grad_(true);
  }
  return handle_;
}

torch::Tensor linear(const torch::Tensor& x, const PackedWeight& w, const OptionalTensor& bias, bool with_gradient) {
  return ops::linear(x, handle_for(w, with_gradient), w.codes, w.scales, optional(w.zeros), optional(w.offsets),
                     optional(w.perm), w.format, w.in_features, w.group_size, bias);
}

torch::Tensor linear_a8(const torch::Tensor& x, const PackedWeight& w, const OptionalTensor& bias, const std::string& x_scale,
                        bool with_gradient) {
  return ops::linear_a8(x, handle_for(w, with_gradient), w.codes, w.scales, optional(w.zeros), optional(w.offsets),
                        optional(w.perm), w.format, w.in_features, w.group_size, bias, x_scale);
}

torch::Tensor embedding(const torch::Tensor& indices, const PackedWeight& w, int64_t padding_idx, bool with_gradient,
                        bool sparse) {
  return ops::embedding(indices, handle_for(w, with_gradient), w.codes, w.scales, optional(w.zeros), optional(w.offsets),
                        optional(w.perm), w.format, w.in_features, w.group_size, padding_idx, sparse);
}

}  // namespace subbyte
