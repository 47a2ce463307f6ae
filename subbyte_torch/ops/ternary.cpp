// Ternary ops: subbyte::activation_quant, ternary_decompose, ternarize, bitlinear, multi_ternary_linear, pack_base3 and
// unpack_base3. Formulas: ternary.h beside this file, subbyte/ops/ternary/ternary.h.
#include "subbyte/ops/ternary/ternary.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/round.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "subbyte/formats/base3.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/linear_gradient.h"
#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/ternary.h"

namespace subbyte {
namespace {

using Decomposition = std::tuple<at::Tensor, at::Tensor>;

bool is_half(const at::Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(is_half(t) || t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", name, " is ",
                    t.scalar_type(), ", expected float32, float16, bfloat16 or float64");
}

// ---- activation_quant

constexpr const char* kActivationSchema = "activation_quant(Tensor x, int bits=8, bool straight_through=True) -> Tensor";

at::Tensor activation_quant_shape(const at::Tensor& x, int64_t bits, bool) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 24, "activation_quant: bits is ", bits, ", expected 2 to 24");
  TORCH_CHECK_VALUE(x.dim() >= 1, "activation_quant: x has no dimensions, expected [..., K]");
  check_floating("activation_quant", "x", x);
  return at::empty_like(x);
}

// Differentiable as it stands; in-place steps act on its own intermediate.
at::Tensor rounded_tokens(const at::Tensor& x, int64_t bits) {
  if (x.sym_numel() == 0) return x.clone();
  const double q = double((int64_t(1) << (bits - 1)) - 1);
  const at::Tensor v = is_half(x) ? x.to(at::kFloat) : x;
  const at::Tensor s = at::amax(v.abs(), {-1}, /*keepdim=*/true).clamp_min(1e-5);
  return (v / s).mul_(q).round_().clamp_(-q, q).mul_(s).div_(q).to(x.scalar_type());
}

at::Tensor activation_quant_dense(const at::Tensor& x, int64_t bits, bool straight_through) {
  activation_quant_shape(x, bits, straight_through);
  return rounded_tokens(x, bits);
}

// y = f(x) whose gradient is gy.
struct ActivationQuantFn : torch::autograd::Function<ActivationQuantFn> {
  static constexpr bool is_traceable = true;
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x, int64_t bits) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::activation_quant(x, bits);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0], at::Tensor()};
  }
};

at::Tensor activation_quant_autograd(const at::Tensor& x, int64_t bits, bool straight_through) {
  if (needs_gradient({&x}, {})) {
    activation_quant_shape(x, bits, straight_through);
    return straight_through ? ActivationQuantFn::apply(x, bits) : rounded_tokens(x, bits);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::activation_quant(x, bits, straight_through);
}

// ---- ternary_decompose, ternarize

constexpr const char* kDecomposeSchema =
    "ternary_decompose(Tensor w, int terms=1, str method=\"threshold\", bool per_channel=True, float threshold=0.7) -> "
    "(Tensor, Tensor)";
constexpr const char* kTernarizeSchema =
    "ternarize(Tensor w, int terms=1, str method=\"absmean\", bool per_channel=False, float threshold=0.7) -> Tensor";

void check_decomposition(const char* op, const at::Tensor& w, int64_t terms, std::string_view method, double threshold) {
  TORCH_CHECK_VALUE(w.dim() == 2, op, ": w has ", w.dim(), " dimensions, expected [N, K]");
  check_floating(op, "w", w);
  TORCH_CHECK_VALUE(terms >= 1, op, ": terms is ", terms, ", expected at least 1");
  TORCH_CHECK_VALUE(threshold >= 0 && std::isfinite(float(threshold)), op, ": threshold is ", threshold,
                    ", expected a finite number of at least 0");
  translated([&] { ternary_method_from_name(method); });
}

Decomposition ternary_decompose_shape(const at::Tensor& w, int64_t terms, std::string_view method, bool, double threshold) {
  check_decomposition("ternary_decompose", w, terms, method, threshold);
  return {at::empty_symint({terms, w.sym_size(0), w.sym_size(1)}, w.options().dtype(at::kChar).requires_grad(std::nullopt)),
          at::empty_symint({terms, w.sym_size(0)}, w.options().dtype(at::kFloat).requires_grad(std::nullopt))};
}

Decomposition ternary_decompose_cpu(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel,
                                    double threshold) {
  Decomposition out = ternary_decompose_shape(w, terms, method, per_channel, threshold);
  const Rows rows = rows_of("ternary_decompose", "w", w);
  TernaryDecomposeParams p;
  p.w = rows.data();
  p.dtype = rows.dtype;
  p.n = w.size(0);
  p.k = w.size(1);
  p.w_stride = rows.stride;
  p.terms = terms;
  p.method = ternary_method_from_name(method);
  p.scale = per_channel ? TernaryScale::kPerRow : TernaryScale::kPerMatrix;
  p.threshold = float(threshold);
  p.trits = static_cast<int8_t*>(mutable_data_of(std::get<0>(out)));
  p.gamma = static_cast<float*>(mutable_data_of(std::get<1>(out)));
  translated([&] { ternary_decompose(p); });
  return out;
}

#if SB_CUDA
// The same rule in ATen's operations: memory-bound sweeps, which a kernel of our own would not shorten much.
Decomposition ternary_decompose_cuda(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel,
                                     double threshold) {
  Decomposition out = ternary_decompose_shape(w, terms, method, per_channel, threshold);
  auto& [trits, gammas] = out;
  if (w.numel() == 0) {
    gammas.zero_();
    return out;
  }
  const bool by_mean = ternary_method_from_name(method) == TernaryMethod::kAbsMean;
  const std::vector<int64_t> axes = per_channel ? std::vector<int64_t>{-1} : std::vector<int64_t>{0, 1};
  at::Tensor residual = w.to(at::kFloat);
  for (int64_t t = 0; t < terms; ++t) {
    const at::Tensor magnitude = residual.abs(), mean = magnitude.mean(axes, /*keepdim=*/true, at::kDouble);
    at::Tensor gamma, trit;
    if (by_mean) {
      gamma = mean.to(at::kFloat);
      const at::Tensor q = residual / gamma;  // NaN where gamma is 0, which neither comparison takes
      trit = q.gt(0.5).to(at::kChar) - q.lt(-0.5).to(at::kChar);
    } else {
      const at::Tensor keep = magnitude.gt(mean * double(float(threshold)));
      const at::Tensor count = keep.sum(axes, /*keepdim=*/true);
      const at::Tensor kept = at::where(keep, magnitude, 0).sum(axes, /*keepdim=*/true, at::kDouble);
      gamma = at::where(count > 0, kept / count, 0).to(at::kFloat);
      trit = (keep & residual.gt(0)).to(at::kChar) - (keep & residual.lt(0)).to(at::kChar);
    }
    gamma = gamma + (mean * 0).to(at::kFloat);  // NaN where w is not finite
    trits.select(0, t).copy_(trit);
    gammas.select(0, t).copy_(gamma.squeeze(-1));
    if (t + 1 < terms) residual = residual - gamma * trit;
  }
  return out;
}
#endif

at::Tensor ternarize_shape(const at::Tensor& w, int64_t terms, std::string_view method, bool, double threshold) {
  check_decomposition("ternarize", w, terms, method, threshold);
  return at::empty_like(w, at::MemoryFormat::Contiguous);
}

at::Tensor ternarize_dense(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel, double threshold) {
  check_decomposition("ternarize", w, terms, method, threshold);
  const auto [trits, gamma] = ops::ternary_decompose(w, terms, method, per_channel, threshold);
  at::Tensor sum = trits.select(0, 0) * gamma.select(0, 0).unsqueeze(-1);
  for (int64_t t = 1; t < terms; ++t) sum.add_(trits.select(0, t) * gamma.select(0, t).unsqueeze(-1));
  return sum.to(w.scalar_type());
}

struct TernarizeFn : torch::autograd::Function<TernarizeFn> {
  static constexpr bool is_traceable = true;
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& w, int64_t terms, const std::string& method,
                            bool per_channel, double threshold) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::ternarize(w, terms, method, per_channel, threshold);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0], at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor ternarize_autograd(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel, double threshold) {
  if (needs_gradient({&w}, {})) return TernarizeFn::apply(w, terms, std::string(method), per_channel, threshold);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::ternarize(w, terms, method, per_channel, threshold);
}

// ---- bitlinear of a dense ternary matrix: composed of ATen operations, which know gradients, devices and autocast

constexpr const char* kBitlinearSchema = "bitlinear(Tensor x, Tensor trits, Tensor gamma, Tensor? bias=None) -> Tensor";

at::Tensor bitlinear_composed(const at::Tensor& x, const at::Tensor& trits, const at::Tensor& gamma,
                              const OptionalTensor& bias) {
  const int64_t dims = trits.dim();
  TORCH_CHECK_VALUE(dims == 2 || dims == 3, "bitlinear: W has ", dims, " dimensions, expected [N, K] or [terms, N, K]");
  TORCH_CHECK_VALUE(trits.scalar_type() == at::kChar || trits.is_floating_point(), "bitlinear: W is ", trits.scalar_type(),
                    ", expected int8 or floating point");
  check_features("bitlinear", "x", x, trits.sym_size(-1));
  const c10::SymInt n = trits.sym_size(-2);
  if (dims == 2) {
    TORCH_CHECK_VALUE(gamma.is_floating_point() && (gamma.dim() == 0 || (gamma.dim() == 1 && gamma.sym_size(0) == n) ||
                                                    (gamma.dim() == 2 && gamma.sym_size(0) == 1 && gamma.sym_size(1) == n)),
                      "bitlinear: gamma is ", gamma.scalar_type(), " ", gamma.sym_sizes(),
                      ", expected floating point [], [N] or [1, N] with N = ", n);
  } else {
    TORCH_CHECK_VALUE(
        gamma.is_floating_point() && gamma.dim() == 2 && gamma.sym_size(0) == trits.sym_size(0) && gamma.sym_size(1) == n,
        "bitlinear: gamma is ", gamma.scalar_type(), " ", gamma.sym_sizes(), ", expected floating point [terms, N] = [",
        trits.sym_size(0), ", ", n, "]");
  }
  if (given(bias))
    TORCH_CHECK_VALUE(bias->is_floating_point() && bias->dim() == 1 && bias->sym_size(0) == n, "bitlinear: bias is ",
                      bias->scalar_type(), " ", bias->sym_sizes(), ", expected floating point [N] = [", n, "]");
  const at::Tensor rows = dims == 2 ? trits : trits.flatten(0, 1);
  const at::Tensor product = at::linear(x, rows.to(x.scalar_type()));
  at::Tensor y;
  if (dims == 2) {
    y = product * (gamma.dim() == 2 ? gamma.squeeze(0) : gamma);
  } else {
    auto sizes = product.sym_sizes().vec();
    sizes.back() = trits.sym_size(0);
    sizes.push_back(n);
    y = (product.view_symint(sizes) * gamma).sum(-2);
  }
  if (given(bias)) y = y + *bias;
  return y.to(product.scalar_type());
}

// ---- multi_ternary_linear of a packed matrix

constexpr const char* kMultiSchema = "multi_ternary_linear(Tensor x, Tensor? weight, " SB_PACKED_SCHEMA
                                     ", int terms, Tensor? bias=None, int activation_bits=0) -> Tensor";

at::Tensor multi_shape(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                       const OptionalTensor& bias, int64_t activation_bits) {
  constexpr const char* op = "multi_ternary_linear";
  check_packed(op, {SB_PACKED});
  check_features(op, "x", x, in_features);
  check_handle(op, weight, codes.sym_size(0), in_features);
  TORCH_CHECK_VALUE(activation_bits == 0 || activation_bits == 8, op, ": activation_bits is ", activation_bits,
                    ", expected 0 or 8");
  TORCH_CHECK_VALUE(activation_bits == 0 || x.scalar_type() != at::kDouble, op,
                    ": x is float64 with activation_bits = 8, expected float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(terms >= 1 && codes.sym_size(0) % terms == 0, op, ": terms is ", terms,
                    ", expected at least 1 and a divisor of the ", codes.sym_size(0), " packed rows");
  const c10::SymInt n = codes.sym_size(0) / terms;
  if (given(bias))
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == n && bias->scalar_type() == x.scalar_type(), op, ": bias is ",
                      bias->scalar_type(), " ", bias->sym_sizes(), ", expected ", x.scalar_type(), " [N] = [", n, "] as x");
  auto sizes = x.sym_sizes().vec();
  sizes.back() = n;
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

at::Tensor multi_dense(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                       const OptionalTensor& bias, int64_t activation_bits) {
  multi_shape(x, weight, SB_PACKED, terms, bias, activation_bits);
  const OptionalTensor& late_bias = terms == 1 ? bias : OptionalTensor();
  const at::Tensor products = activation_bits == 8 ? ops::linear_a8(x, std::nullopt, SB_PACKED, late_bias)
                                                   : ops::linear(x, std::nullopt, SB_PACKED, late_bias);
  if (terms == 1) return products;
  auto sizes = x.sizes().vec();
  sizes.back() = terms;
  sizes.push_back(codes.size(0) / terms);
  at::Tensor y = products.view(sizes).sum(-2);
  return given(bias) ? y.add_(*bias) : y;
}

// As LinearFn of linear.cpp. Every term sees the same gradient of y, so the product over the batch is formed once.
struct MultiTernaryFn : torch::autograd::Function<MultiTernaryFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scales,
                            const OptionalTensor& weight, const OptionalTensor& zeros, const OptionalTensor& offsets,
                            const OptionalTensor& bias, const PackedRest& rest, int64_t terms, int64_t activation_bits) {
    auto wants = [](const OptionalTensor& t) { return given(t) && t->requires_grad(); };
    const bool need_x = wants(weight) || scales.requires_grad() || wants(zeros) || wants(offsets);
    rest.save(ctx, {need_x ? x : at::Tensor(), scales, wants(weight) ? *weight : at::Tensor(), zeros.value_or(at::Tensor()),
                    offsets.value_or(at::Tensor())});
    ctx->saved_data["terms"] = terms;
    ctx->saved_data["inputs"] =
        int64_t(given(weight)) | int64_t(given(zeros)) << 1 | int64_t(given(offsets)) << 2 | int64_t(given(bias)) << 3;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::multi_ternary_linear(x, std::nullopt, rest.codes, scales, zeros, offsets, rest.perm, rest.format,
                                     rest.in_features, rest.group_size, terms, bias, activation_bits);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const at::Tensor& gy = grads[0];
    const SavedPacked saved(ctx, 5);
    const at::Tensor &x = saved.tensors[0], &scales = saved.tensors[1];
    const OptionalTensor weight = optional_of(saved.tensors[2]), zeros = optional_of(saved.tensors[3]),
                         offsets = optional_of(saved.tensors[4]);
    const int64_t inputs = ctx->saved_data["inputs"].toInt(), terms = ctx->saved_data["terms"].toInt();
    size_t edge = 2;
    auto need = [&](int bit) { return (inputs >> bit & 1) != 0 && ctx->needs_input_grad(edge++); };
    const bool need_x = ctx->needs_input_grad(0), need_scales = ctx->needs_input_grad(1);
    const bool need_weight = need(0), need_zeros = need(1), need_offsets = need(2), need_bias = need(3);

    const PackedRest& r = saved.rest;
    const c10::SymInt rows = r.codes.sym_size(0), n = rows / terms;
    at::Tensor gx, gw, gb;
    AffineGradients affine;
    if (need_x) {
      auto sizes = gy.sym_sizes().vec();
      sizes.back() = terms;
      sizes.push_back(n);
      const at::Tensor repeated = gy.unsqueeze(-2).expand_symint(sizes).flatten(-2);
      gx = recorded_linear_grad_input(repeated, weight, r.codes, scales, zeros, offsets, r.perm, r.format, r.in_features,
                                      r.group_size);
    }
    if (need_weight || need_scales || need_zeros || need_offsets)
      gw = ops::linear_grad_weight(gy, x)
               .unsqueeze(0)
               .expand_symint({terms, n, c10::SymInt(r.in_features)})
               .reshape_symint({rows, c10::SymInt(r.in_features)});
    if (need_scales || need_zeros || need_offsets)
      affine = affine_gradients(gw, saved.args(scales, zeros, offsets), need_scales, need_zeros, need_offsets);
    if (need_bias) gb = gy.dim() == 1 ? gy : gy.flatten(0, -2).sum(0);
    return {gx,           affine.scales, need_weight ? gw : at::Tensor(), affine.zeros, affine.offsets, gb, at::Tensor(),
            at::Tensor(), at::Tensor()};
  }
};

at::Tensor multi_autograd(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                          const OptionalTensor& bias, int64_t activation_bits) {
  if (needs_gradient({&x, &scales}, {&weight, &zeros, &offsets, &bias})) {
    check_handle("multi_ternary_linear", weight, codes.sym_size(0), in_features);
    return MultiTernaryFn::apply(x, scales, weight, zeros, offsets, bias,
                                 PackedRest{codes, perm, std::string(format), in_features, group_size}, terms, activation_bits);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::multi_ternary_linear(x, std::nullopt, SB_PACKED, terms, bias, activation_bits);
}

template <at::DeviceType device>
at::Tensor multi_autocast(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                          const OptionalTensor& bias, int64_t activation_bits) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::multi_ternary_linear(at::autocast::cached_cast(type, x, device), weight, SB_PACKED, terms,
                                   at::autocast::cached_cast(type, bias, device), activation_bits);
}

// ---- base 3

constexpr const char* kPackSchema = "pack_base3(Tensor trits) -> Tensor";
constexpr const char* kUnpackSchema = "unpack_base3(Tensor packed, SymInt[] shape) -> Tensor";

at::Tensor pack_base3_shape(const at::Tensor& trits) {
  TORCH_CHECK_VALUE(trits.scalar_type() == at::kChar || trits.is_floating_point(), "pack_base3: trits is ", trits.scalar_type(),
                    ", expected int8 or floating point");
  return at::empty_symint({(trits.sym_numel() + (kTritsPerByte - 1)) / kTritsPerByte},
                          trits.options().dtype(at::kByte).requires_grad(std::nullopt));
}

at::Tensor unpack_base3_shape(const at::Tensor& packed, at::SymIntArrayRef shape) {
  c10::SymInt count = 1;
  for (const c10::SymInt& size : shape) {
    TORCH_CHECK_VALUE(size >= 0, "unpack_base3: shape is ", shape, ", expected sizes of at least 0");
    count = count * size;
  }
  const c10::SymInt bytes = (count + (kTritsPerByte - 1)) / kTritsPerByte;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.sym_size(0) == bytes,
                    "unpack_base3: packed is ", packed.scalar_type(), " ", packed.sym_sizes(), ", expected uint8 [", bytes,
                    "] for the shape ", shape);
  return at::empty_symint(shape, packed.options().dtype(at::kChar));
}

// As int8, after making sure that nothing is lost.
at::Tensor int8_trits(const char* op, const at::Tensor& trits) {
  ops::check_ternary(op, trits);
  return trits.to(at::kChar).contiguous();
}

at::Tensor pack_base3_cpu(const at::Tensor& trits) {
  at::Tensor out = pack_base3_shape(trits);
  const at::Tensor flat = int8_trits("pack_base3", trits);
  translated([&] { pack_base3(static_cast<const int8_t*>(data_of(flat)), flat.numel(), mutable_bytes_of(out)); });
  return out;
}

at::Tensor unpack_base3_cpu(const at::Tensor& packed, at::SymIntArrayRef shape) {
  at::Tensor out = unpack_base3_shape(packed, shape);
  const at::Tensor bytes = packed.contiguous();
  translated([&] { unpack_base3(bytes_of(bytes), bytes.numel(), static_cast<int8_t*>(mutable_data_of(out)), out.numel()); });
  return out;
}

#if SB_CUDA
at::Tensor digit_weights(const at::Tensor& like) { return at::tensor({1, 3, 9, 27, 81}, at::kInt).to(like.device()); }

at::Tensor pack_base3_cuda(const at::Tensor& trits) {
  at::Tensor out = pack_base3_shape(trits);
  const at::Tensor flat = int8_trits("pack_base3", trits).flatten();
  const at::Tensor digits = at::constant_pad_nd(flat, {0, out.numel() * kTritsPerByte - flat.numel()}, 0).to(at::kInt) + 1;
  return out.copy_((digits.view({-1, kTritsPerByte}) * digit_weights(flat)).sum(-1));
}

at::Tensor unpack_base3_cuda(const at::Tensor& packed, at::SymIntArrayRef shape) {
  at::Tensor out = unpack_base3_shape(packed, shape);
  if (out.numel() == 0) return out;
  const int64_t highest = packed.max().item<int64_t>();
  TORCH_CHECK_VALUE(highest < kBase3Levels, "unpack_base3: a byte is ", highest, ", expected below ", kBase3Levels);
  const at::Tensor shifted = at::div(packed.to(at::kInt).unsqueeze(-1), digit_weights(packed), "floor");
  return out.copy_((shifted.remainder(3) - 1).flatten().slice(0, 0, out.numel()).view(out.sizes()));
}
#endif

// ---- registration

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kActivationSchema);
  m.def(kDecomposeSchema);
  m.def(kTernarizeSchema);
  m.def(kBitlinearSchema, bitlinear_composed);
  m.def(kMultiSchema);
  m.def(kPackSchema);
  m.def(kUnpackSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("activation_quant", activation_quant_shape);
  m.impl("ternary_decompose", ternary_decompose_shape);
  m.impl("ternarize", ternarize_shape);
  m.impl("multi_ternary_linear", multi_shape);
  m.impl("pack_base3", pack_base3_shape);
  m.impl("unpack_base3", unpack_base3_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("activation_quant", activation_quant_dense);
  m.impl("ternary_decompose", ternary_decompose_cpu);
  m.impl("ternarize", ternarize_dense);
  m.impl("multi_ternary_linear", multi_dense);
  m.impl("pack_base3", pack_base3_cpu);
  m.impl("unpack_base3", unpack_base3_cpu);
}
#if SB_CUDA
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("activation_quant", activation_quant_dense);
  m.impl("ternary_decompose", ternary_decompose_cuda);
  m.impl("ternarize", ternarize_dense);
  m.impl("multi_ternary_linear", multi_dense);
  m.impl("pack_base3", pack_base3_cuda);
  m.impl("unpack_base3", unpack_base3_cuda);
}
#endif
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("activation_quant", activation_quant_autograd);
  m.impl("ternary_decompose", torch::autograd::autogradNotImplementedFallback());
  m.impl("ternarize", ternarize_autograd);
  m.impl("multi_ternary_linear", multi_autograd);
  m.impl("pack_base3", torch::autograd::autogradNotImplementedFallback());
  m.impl("unpack_base3", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl("multi_ternary_linear", multi_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl("multi_ternary_linear", multi_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::activation_quant(const at::Tensor& x, int64_t bits, bool straight_through) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::activation_quant", "").typed<decltype(activation_quant_shape)>();
  return op.call(x, bits, straight_through);
}

Decomposition ops::ternary_decompose(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel,
                                     double threshold) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("subbyte::ternary_decompose", "")
                             .typed<decltype(ternary_decompose_shape)>();
  return op.call(w, terms, method, per_channel, threshold);
}

at::Tensor ops::ternarize(const at::Tensor& w, int64_t terms, std::string_view method, bool per_channel, double threshold) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::ternarize", "").typed<decltype(ternarize_shape)>();
  return op.call(w, terms, method, per_channel, threshold);
}

at::Tensor ops::bitlinear(const at::Tensor& x, const at::Tensor& trits, const at::Tensor& gamma, const OptionalTensor& bias) {
  return bitlinear_composed(x, trits, gamma, bias);
}

void ops::check_ternary(const char* op, const at::Tensor& trits) {
  if (trits.numel() == 0) return;
  const at::Tensor wrong = trits.ne(-1).logical_and_(trits.ne(0)).logical_and_(trits.ne(1)).flatten();
  if (!wrong.any().item<bool>()) return;
  const int64_t position = wrong.to(at::kInt).argmax().item<int64_t>();
  TORCH_CHECK_VALUE(false, op, ": value ", trits.flatten()[position].item<double>(), " at position ", position,
                    ", expected -1, 0 or 1");
}

at::Tensor ops::multi_ternary_linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t terms,
                                     const OptionalTensor& bias, int64_t activation_bits) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::multi_ternary_linear", "").typed<decltype(multi_shape)>();
  return op.call(x, weight, SB_PACKED, terms, bias, activation_bits);
}

at::Tensor ops::pack_base3(const at::Tensor& trits) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::pack_base3", "").typed<decltype(pack_base3_shape)>();
  return op.call(trits);
}

at::Tensor ops::unpack_base3(const at::Tensor& packed, at::IntArrayRef shape) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::unpack_base3", "").typed<decltype(unpack_base3_shape)>();
  return op.call(packed, c10::fromIntArrayRefSlow(shape));
}

}  // namespace subbyte
