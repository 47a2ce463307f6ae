// subbyte::linear (subbyte/ops/linear/linear.h), and the gradient that it shares with linear_a8.
#include "subbyte/ops/linear/linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/linear/linear_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/linear_gradient.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "linear(Tensor x, Tensor? weight, " SB_PACKED_SCHEMA ", Tensor? bias) -> Tensor";

at::Tensor linear_shape(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  check_packed("linear", {SB_PACKED});
  check_features("linear", "x", x, in_features);
  const c10::SymInt n = codes.sym_size(0);
  check_handle("linear", weight, n, in_features);
  if (given(bias))
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == n && bias->scalar_type() == x.scalar_type(), "linear: bias is ",
                      bias->scalar_type(), " ", bias->sym_sizes(), ", expected ", x.scalar_type(), " [N] = [", n, "] as x");
  auto sizes = x.sym_sizes().vec();
  sizes.back() = n;
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

LinearParams linear_params(const Rows& x, const PackedView& w, const at::Tensor& bias, const at::Tensor& y) {
  LinearParams p;
  p.x = x.data();
  p.dtype = x.dtype;
  p.m = x.m;
  p.x_stride = x.stride;
  p.w = w.matrix;
  p.bias = data_of(bias);
  p.y = mutable_data_of(y);
  p.y_stride = w.matrix.n;
  return p;
}

at::Tensor linear_cpu(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  at::Tensor y = linear_shape(x, weight, SB_PACKED, bias);
  const PackedView w = view_of("linear", {SB_PACKED}, "x", x);
  const Rows rows = rows_of("linear", "x", x);
  const at::Tensor b = bias_of("linear", bias, "x", x);
  LinearParams p = linear_params(rows, w, b, y);
  p.workspace_bytes = linear_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
  p.workspace = mutable_data_of(workspace);
  translated([&] { linear(p); });
  return y;
}

#if SB_CUDA
at::Tensor linear_cuda(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  const c10::DeviceGuard device(codes.device());
  at::Tensor y = linear_shape(x, weight, SB_PACKED, bias);
  const PackedView w = view_of("linear", {SB_PACKED}, "x", x);
  const at::Tensor b = bias_of("linear", bias, "x", x);
  const Rows rows = rows_of("linear", "x", x);
  if (cuda::linear_prefer_dense(rows.m, rows.dtype)) {
    const at::Tensor dense = ops::dequantize(SB_PACKED, x.scalar_type());
    at::Tensor out = y.view({rows.m, w.matrix.n});
    if (b.defined()) at::addmm_out(out, b, rows.tensor, dense.t());
    else at::mm_out(out, rows.tensor, dense.t());
    return y;
  }
  LinearParams p = linear_params(rows, w, b, y);
  p.workspace_bytes = cuda::linear_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
  p.workspace = mutable_data_of(workspace);
  translated([&] { cuda::linear(p, stream_of(x)); });
  return y;
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("linear", linear_cuda); }
#endif

// Backward in terms of ops alone; each is recorded again where second derivatives are wanted.
struct LinearFn : torch::autograd::Function<LinearFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scales,
                            const OptionalTensor& weight, const OptionalTensor& zeros, const OptionalTensor& offsets,
                            const OptionalTensor& bias, const PackedRest& rest, const std::optional<std::string>& x_scale) {
    auto wants = [](const OptionalTensor& t) { return given(t) && t->requires_grad(); };
    const bool need_x = wants(weight) || scales.requires_grad() || wants(zeros) || wants(offsets);
    // x is kept only for the gradient of the weight; the handle only to be connected in second derivatives.
    rest.save(ctx, {need_x ? x : at::Tensor(), scales, wants(weight) ? *weight : at::Tensor(), zeros.value_or(at::Tensor()),
                    offsets.value_or(at::Tensor())});
    ctx->saved_data["inputs"] =
        int64_t(given(weight)) | int64_t(given(zeros)) << 1 | int64_t(given(offsets)) << 2 | int64_t(given(bias)) << 3;
    at::AutoDispatchBelowADInplaceOrView below;
    if (x_scale.has_value())
      return ops::linear_a8(x, std::nullopt, rest.codes, scales, zeros, offsets, rest.perm, rest.format, rest.in_features,
                            rest.group_size, bias, *x_scale);
    return ops::linear(x, std::nullopt, rest.codes, scales, zeros, offsets, rest.perm, rest.format, rest.in_features,
                       rest.group_size, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const at::Tensor& gy = grads[0];
    const SavedPacked saved(ctx, 5);
    const at::Tensor &x = saved.tensors[0], &scales = saved.tensors[1];
    const OptionalTensor weight = optional_of(saved.tensors[2]), zeros = optional_of(saved.tensors[3]),
                         offsets = optional_of(saved.tensors[4]);
    const int64_t inputs = ctx->saved_data["inputs"].toInt();
    // Edges exist for the tensors that were given, in the order of forward's arguments.
    size_t edge = 2;
    auto need = [&](int bit) { return (inputs >> bit & 1) != 0 && ctx->needs_input_grad(edge++); };
    const bool need_x = ctx->needs_input_grad(0), need_scales = ctx->needs_input_grad(1);
    const bool need_weight = need(0), need_zeros = need(1), need_offsets = need(2), need_bias = need(3);

    at::Tensor gx, gw, gb;
    AffineGradients affine;
    const PackedRest& r = saved.rest;
    if (need_x)
      gx = recorded_linear_grad_input(gy, weight, r.codes, scales, zeros, offsets, r.perm, r.format, r.in_features,
                                      r.group_size);
    if (need_weight || need_scales || need_zeros || need_offsets) gw = ops::linear_grad_weight(gy, x);
    if (need_scales || need_zeros || need_offsets)
      affine = affine_gradients(gw, saved.args(scales, zeros, offsets), need_scales, need_zeros, need_offsets);
    if (need_bias) gb = gy.dim() == 1 ? gy : gy.flatten(0, -2).sum(0);
    return {gx, affine.scales, need_weight ? gw : at::Tensor(), affine.zeros, affine.offsets, gb, at::Tensor(), at::Tensor()};
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  if (needs_gradient({&x, &scales}, {&weight, &zeros, &offsets, &bias})) {
    check_handle("linear", weight, codes.sym_size(0), in_features);
    return recorded_linear(x, weight, SB_PACKED, bias, std::nullopt);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::linear(x, std::nullopt, SB_PACKED, bias);  // the handle has no say here; without it no subclass is consulted
}

template <at::DeviceType device>
at::Tensor linear_autocast(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::linear(at::autocast::cached_cast(type, x, device), weight, SB_PACKED,
                     at::autocast::cached_cast(type, bias, device));
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("linear", linear_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("linear", linear_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("linear", linear_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl("linear", linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl("linear", linear_autocast<at::kCUDA>); }

}  // namespace

at::Tensor recorded_linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                           std::optional<std::string_view> x_scale) {
  return LinearFn::apply(x, scales, weight, zeros, offsets, bias,
                         PackedRest{codes, perm, std::string(format), in_features, group_size},
                         x_scale.has_value() ? std::optional<std::string>(*x_scale) : std::nullopt);
}

at::Tensor ops::linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::linear", "").typed<decltype(linear_shape)>();
  return op.call(x, weight, SB_PACKED, bias);
}

}  // namespace subbyte
