// subbyte::linear_grad_input (subbyte/ops/linear_grad_input/linear_grad_input.h).
#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/linear_grad_input/linear_grad_input_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/linear_gradient.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "linear_grad_input(Tensor gy, " SB_PACKED_SCHEMA ") -> Tensor";

at::Tensor linear_grad_input_shape(const at::Tensor& gy, SB_PACKED_PARAMS) {
  check_packed("linear_grad_input", {SB_PACKED});
  check_features("linear_grad_input", "gy", gy, codes.sym_size(0));
  auto sizes = gy.sym_sizes().vec();
  sizes.back() = in_features;
  return at::empty_symint(sizes, gy.options().requires_grad(std::nullopt));
}

LinearGradInputParams linear_grad_input_params(const Rows& gy, const PackedView& w, const at::Tensor& gx) {
  LinearGradInputParams p;
  p.gy = gy.data();
  p.dtype = gy.dtype;
  p.m = gy.m;
  p.gy_stride = gy.stride;
  p.w = w.matrix;
  p.gx = mutable_data_of(gx);
  p.gx_stride = w.matrix.k;
  return p;
}

at::Tensor linear_grad_input_cpu(const at::Tensor& gy, SB_PACKED_PARAMS) {
  at::Tensor gx = linear_grad_input_shape(gy, SB_PACKED);
  const PackedView w = view_of("linear_grad_input", {SB_PACKED}, "gy", gy);
  const Rows rows = rows_of("linear_grad_input", "gy", gy);
  LinearGradInputParams p = linear_grad_input_params(rows, w, gx);
  p.workspace_bytes = linear_grad_input_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, gy);
  p.workspace = mutable_data_of(workspace);
  translated([&] { linear_grad_input(p); });
  return gx;
}

#if SB_CUDA
at::Tensor linear_grad_input_cuda(const at::Tensor& gy, SB_PACKED_PARAMS) {
  const c10::DeviceGuard device(codes.device());
  at::Tensor gx = linear_grad_input_shape(gy, SB_PACKED);
  const PackedView w = view_of("linear_grad_input", {SB_PACKED}, "gy", gy);
  const Rows rows = rows_of("linear_grad_input", "gy", gy);
  if (cuda::linear_grad_input_prefer_dense(rows.m, rows.dtype)) {
    at::Tensor out = gx.view({rows.m, in_features});
    at::mm_out(out, rows.tensor, ops::dequantize(SB_PACKED, gy.scalar_type()));
    return gx;
  }
  LinearGradInputParams p = linear_grad_input_params(rows, w, gx);
  p.workspace_bytes = cuda::linear_grad_input_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, gy);
  p.workspace = mutable_data_of(workspace);
  translated([&] { cuda::linear_grad_input(p, stream_of(gy)); });
  return gx;
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("linear_grad_input", linear_grad_input_cuda); }
#endif

// gx = gy W is linear in gy and in W: with g the gradient of gx, d/dgy = g W^T and d/dW = gy^T g.
struct LinearGradInputFn : torch::autograd::Function<LinearGradInputFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gy, const at::Tensor& scales,
                            const OptionalTensor& weight, const OptionalTensor& zeros, const OptionalTensor& offsets,
                            const PackedRest& rest) {
    rest.save(ctx, {gy, scales, weight.value_or(at::Tensor()), zeros.value_or(at::Tensor()), offsets.value_or(at::Tensor())});
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::linear_grad_input(gy, rest.codes, scales, zeros, offsets, rest.perm, rest.format, rest.in_features,
                                  rest.group_size);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const at::Tensor& g = grads[0];
    const SavedPacked saved(ctx, 5);
    const at::Tensor &gy = saved.tensors[0], &scales = saved.tensors[1];
    const OptionalTensor weight = optional_of(saved.tensors[2]), zeros = optional_of(saved.tensors[3]),
                         offsets = optional_of(saved.tensors[4]);
    size_t edge = 2;
    auto need = [&](const OptionalTensor& t) { return given(t) && ctx->needs_input_grad(edge++); };
    const bool need_gy = ctx->needs_input_grad(0), need_scales = ctx->needs_input_grad(1);
    const bool need_weight = need(weight), need_zeros = need(zeros), need_offsets = need(offsets);

    at::Tensor ggy, gw;
    AffineGradients affine;
    const PackedRest& r = saved.rest;
    if (need_gy)
      ggy =
          ops::linear(g, weight, r.codes, scales, zeros, offsets, r.perm, r.format, r.in_features, r.group_size, std::nullopt);
    if (need_weight || need_scales || need_zeros || need_offsets) gw = ops::linear_grad_weight(gy, g);
    if (need_scales || need_zeros || need_offsets)
      affine = affine_gradients(gw, saved.args(scales, zeros, offsets), need_scales, need_zeros, need_offsets);
    return {ggy, affine.scales, need_weight ? gw : at::Tensor(), affine.zeros, affine.offsets, at::Tensor()};
  }
};

at::Tensor linear_grad_input_autograd(const at::Tensor& gy, SB_PACKED_PARAMS) {
  return recorded_linear_grad_input(gy, std::nullopt, SB_PACKED);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("linear_grad_input", linear_grad_input_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("linear_grad_input", linear_grad_input_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("linear_grad_input", linear_grad_input_autograd); }

}  // namespace

at::Tensor recorded_linear_grad_input(const at::Tensor& gy, const OptionalTensor& weight, SB_PACKED_PARAMS) {
  if (needs_gradient({&gy, &scales}, {&weight, &zeros, &offsets}))
    return LinearGradInputFn::apply(gy, scales, weight, zeros, offsets,
                                    PackedRest{codes, perm, std::string(format), in_features, group_size});
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::linear_grad_input(gy, SB_PACKED);
}

at::Tensor ops::linear_grad_input(const at::Tensor& gy, SB_PACKED_PARAMS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("subbyte::linear_grad_input", "")
                             .typed<decltype(linear_grad_input_shape)>();
  return op.call(gy, SB_PACKED);
}

}  // namespace subbyte
