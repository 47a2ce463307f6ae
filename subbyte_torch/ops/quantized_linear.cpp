// subbyte::quantized_linear (quantized.h): x [..., K] -> [..., N], both x and W integers on learned steps.
//
// Gradients, with X = x + shift, X^ = sx q(X, sx), W^ = sw q(W, sw), g the gradient of y, all in float32 (float64 for float64):
//   to x      M g W^, M = 1 where X/sx is within the range           to shift   its column sums
//   to W      M_W g^T X^ (without M_W if clip_weight_gradient is false)           to the steps   step_gradient.h
//   to bias   column sums of g
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/quantized.h"
#include "subbyte_torch/ops/quantized_product.h"
#include "subbyte_torch/ops/step_gradient.h"

namespace subbyte {
namespace {

constexpr const char* kOp = "quantized_linear";
constexpr const char* kSchema =
    "quantized_linear(Tensor x, Tensor? weight, Tensor? codes, Tensor x_step, Tensor w_step, Tensor? shift=None, "
    "Tensor? bias=None, int bits=4, float eps=1e-05, bool clip_weight_gradient=True) -> Tensor";

at::Tensor quantized_linear_shape(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                  const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                  const OptionalTensor& bias, int64_t bits, double eps, bool) {
  check_step(kOp, "x_step", x_step);
  check_step(kOp, "w_step", w_step);
  check_step_rule(kOp, {bits, eps});
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x has no dimension, expected [..., K]");
  dtype_of(kOp, "x", x.scalar_type());
  const c10::SymInt k = x.sym_size(-1);
  check_step_weight(kOp, weight, codes, k, {bits, eps});
  if (given(weight))
    TORCH_CHECK_VALUE(weight->dim() == 2 && weight->sym_size(1) == k, kOp, ": weight is ", weight->sym_sizes(),
                      ", expected [N, ", k, "], x has ", k, " features");
  const c10::SymInt n = given(weight) ? weight->sym_size(0) : codes->sym_size(0);
  check_vector(kOp, "shift", shift, "K", k, x);
  check_vector(kOp, "bias", bias, "N", n, x);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = n;
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

at::Tensor shifted(const at::Tensor& x, const at::Tensor& shift) { return shift.defined() ? x + shift : x; }

at::Tensor quantized_linear_dense(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                  const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                  const OptionalTensor& bias, int64_t bits, double eps, bool clip_weight_gradient) {
  at::Tensor y = quantized_linear_shape(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
  if (given(shift)) check_device(kOp, "shift", *shift, "x", x);
  const at::Tensor b = bias_of(kOp, bias, "x", x);
  const Rows rows = rows_of(kOp, "x", shifted(x, shift.value_or(at::Tensor())));
  const WeightRows w = weight_rows_of(kOp, weight, codes, x);
  QuantizedMatmulParams p;
  p.x = rows.data();
  p.y = mutable_data_of(y);
  p.bias = data_of(b);
  p.dtype = rows.dtype;
  p.m = rows.m;
  p.k = x.size(-1);
  p.x_stride = rows.stride;
  p.bits = int(bits);
  p.eps = float(eps);
  w.set(p, 0, w.rows.size(0));
  p.y_stride = p.n;
  run_quantized_product(kOp, p, x_step, "w_step", w_step, x);
  return y;
}

#if SB_CUDA
at::Tensor quantized_linear_cuda(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                 const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                 const OptionalTensor& bias, int64_t bits, double eps, bool clip_weight_gradient) {
  const c10::DeviceGuard device(x.device());
  return quantized_linear_dense(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl(kOp, quantized_linear_cuda); }
#endif

struct QuantizedLinearFn : torch::autograd::Function<QuantizedLinearFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& codes, const at::Tensor& x_step, const at::Tensor& w_step,
                            const OptionalTensor& shift, const OptionalTensor& bias, int64_t bits, double eps,
                            bool clip_weight_gradient) {
    ctx->save_for_backward(
        {x, weight.value_or(at::Tensor()), codes.value_or(at::Tensor()), x_step, w_step, shift.value_or(at::Tensor())});
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["clip"] = clip_weight_gradient;
    if (given(bias)) ctx->saved_data["bias_type"] = int64_t(bias->scalar_type());
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::quantized_linear(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &codes = saved[2], &x_step = saved[3], &w_step = saved[4],
                     &shift = saved[5];
    const StepRule rule{ctx->saved_data["bits"].toInt(), ctx->saved_data["eps"].toDouble()};
    const at::ScalarType type = gradient_type(x);
    const c10::SymInt k = x.sym_size(-1), n = (weight.defined() ? weight : codes).sym_size(0);
    c10::SymInt m = 1;  // not -1: K or N may be 0
    for (int64_t d = 0; d + 1 < x.dim(); ++d) m = m * x.sym_size(d);
    const at::Tensor g = grads[0].to(type).reshape_symint({m, n}), moved = shifted(x, shift).reshape_symint({m, k});
    const StepWeight w{weight, codes, w_step, {n, k}, rule};
    torch::autograd::variable_list out(10);
    // Edges of tensors that were not given do not count: x, weight or codes, x_step, w_step, shift, bias.
    const bool need_x = ctx->needs_input_grad(0), need_shift = shift.defined() && ctx->needs_input_grad(4);
    if (need_x || need_shift || ctx->needs_input_grad(2)) {
      const StepGradients to =
          step_gradients(moved, x_step, at::matmul(g, w.on_step(type)), rule, need_x || need_shift, ctx->needs_input_grad(2));
      if (need_x) out[0] = to.value.to(x.scalar_type()).reshape_symint(x.sym_sizes());
      if (need_shift) out[5] = to.value.sum(0).to(shift.scalar_type());
      out[3] = to.step;
    }
    const bool need_weight = weight.defined() && ctx->needs_input_grad(1);
    if (need_weight || ctx->needs_input_grad(3)) {
      const StepGradients to = w.gradients(at::matmul(g.t(), on_step(moved, x_step, rule, type)), need_weight,
                                           ctx->needs_input_grad(3), ctx->saved_data["clip"].toBool());
      if (need_weight) out[1] = to.value.to(weight.scalar_type());
      out[4] = to.step;
    }
    if (ctx->saved_data.count("bias_type") != 0 && ctx->needs_input_grad(shift.defined() ? 5 : 4))
      out[6] = g.sum(0).to(at::ScalarType(ctx->saved_data["bias_type"].toInt()));
    return out;
  }
};

at::Tensor quantized_linear_autograd(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                     const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                     const OptionalTensor& bias, int64_t bits, double eps, bool clip_weight_gradient) {
  if (needs_gradient({&x, &x_step, &w_step}, {&weight, &shift, &bias}))
    return QuantizedLinearFn::apply(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::quantized_linear(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
}

// x, shift and bias take autocast's type. The weight stays: it is rounded to integers from the type it is kept in, so that the
// packed weight, made from the same numbers, gives the same bits.
template <at::DeviceType device>
at::Tensor quantized_linear_autocast(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                     const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                     const OptionalTensor& bias, int64_t bits, double eps, bool clip_weight_gradient) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::quantized_linear(at::autocast::cached_cast(type, x, device), weight, codes, x_step, w_step,
                               at::autocast::cached_cast(type, shift, device), at::autocast::cached_cast(type, bias, device),
                               bits, eps, clip_weight_gradient);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl(kOp, quantized_linear_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl(kOp, quantized_linear_dense); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl(kOp, quantized_linear_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl(kOp, quantized_linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl(kOp, quantized_linear_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::quantized_linear(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                 const at::Tensor& x_step, const at::Tensor& w_step, const OptionalTensor& shift,
                                 const OptionalTensor& bias, int64_t bits, double eps, bool clip_weight_gradient) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::quantized_linear", "").typed<decltype(quantized_linear_shape)>();
  return op.call(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient);
}

}  // namespace subbyte
