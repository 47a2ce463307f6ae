// subbyte::quantized_matmul (subbyte/ops/quantized_matmul/quantized_matmul.h): x [..., M, K] and z [..., N, K], both float,
// quantized on learned steps, leading dimensions broadcast -> [..., M, N]. Gradients to x, z and both steps as in
// step_gradient.h, with the other operand at its quantized value.
#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

#include <ATen/ExpandUtils.h>
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
#include "subbyte_torch/ops/batched_rows.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/quantized.h"
#include "subbyte_torch/ops/quantized_product.h"
#include "subbyte_torch/ops/step_gradient.h"

namespace subbyte {
namespace {

constexpr const char* kOp = "quantized_matmul";
constexpr const char* kSchema =
    "quantized_matmul(Tensor x, Tensor z, Tensor x_step, Tensor z_step, int bits=4, float eps=1e-05) -> Tensor";

at::Tensor quantized_matmul_shape(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step, const at::Tensor& z_step,
                                  int64_t bits, double eps) {
  check_step(kOp, "x_step", x_step);
  check_step(kOp, "z_step", z_step);
  check_step_rule(kOp, {bits, eps});
  return batched_product_shape(kOp, x, z);
}

at::Tensor quantized_matmul_dense(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step, const at::Tensor& z_step,
                                  int64_t bits, double eps) {
  at::Tensor y = quantized_matmul_shape(x, z, x_step, z_step, bits, eps);
  check_device(kOp, "z", z, "x", x);
  const BatchedRows a = batched_rows_of(kOp, "x", x, y), b = batched_rows_of(kOp, "z", z, y);
  QuantizedMatmulParams p;
  p.x = data_of(a.tensor);
  p.z = data_of(b.tensor);
  p.y = mutable_data_of(y);
  p.dtype = p.z_dtype = a.dtype;
  p.batch = a.batch;
  p.m = x.size(-2);
  p.n = z.size(-2);
  p.k = x.size(-1);
  p.x_stride = p.z_stride = p.k;
  p.x_batch_stride = a.batch_stride;
  p.z_batch_stride = b.batch_stride;
  p.y_stride = p.n;
  p.y_batch_stride = p.m * p.n;
  p.bits = int(bits);
  p.eps = float(eps);
  run_quantized_product(kOp, p, x_step, "z_step", z_step, x);
  return y;
}

#if SB_CUDA
at::Tensor quantized_matmul_cuda(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step, const at::Tensor& z_step,
                                 int64_t bits, double eps) {
  const c10::DeviceGuard device(x.device());
  return quantized_matmul_dense(x, z, x_step, z_step, bits, eps);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl(kOp, quantized_matmul_cuda); }
#endif

struct QuantizedMatmulFn : torch::autograd::Function<QuantizedMatmulFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& z,
                            const at::Tensor& x_step, const at::Tensor& z_step, int64_t bits, double eps) {
    ctx->save_for_backward({x, z, x_step, z_step});
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["eps"] = eps;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::quantized_matmul(x, z, x_step, z_step, bits, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &z = saved[1], &x_step = saved[2], &z_step = saved[3];
    const StepRule rule{ctx->saved_data["bits"].toInt(), ctx->saved_data["eps"].toDouble()};
    const at::ScalarType type = gradient_type(x);
    const at::Tensor g = grads[0].to(type);
    StepGradients gx, gz;
    if (ctx->needs_input_grad(0) || ctx->needs_input_grad(2))
      gx = step_gradients(x, x_step, at::sum_to(at::matmul(g, on_step(z, z_step, rule, type)), x.sym_sizes()), rule,
                          ctx->needs_input_grad(0), ctx->needs_input_grad(2));
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(3))
      gz = step_gradients(z, z_step, at::sum_to(at::matmul(g.mT(), on_step(x, x_step, rule, type)), z.sym_sizes()), rule,
                          ctx->needs_input_grad(1), ctx->needs_input_grad(3));
    if (gx.value.defined()) gx.value = gx.value.to(x.scalar_type());
    if (gz.value.defined()) gz.value = gz.value.to(z.scalar_type());
    return {gx.value, gz.value, gx.step, gz.step, at::Tensor(), at::Tensor()};
  }
};

at::Tensor quantized_matmul_autograd(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step,
                                     const at::Tensor& z_step, int64_t bits, double eps) {
  if (needs_gradient({&x, &z, &x_step, &z_step}, {})) return QuantizedMatmulFn::apply(x, z, x_step, z_step, bits, eps);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::quantized_matmul(x, z, x_step, z_step, bits, eps);
}

template <at::DeviceType device>
at::Tensor quantized_matmul_autocast(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step,
                                     const at::Tensor& z_step, int64_t bits, double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::quantized_matmul(at::autocast::cached_cast(type, x, device), at::autocast::cached_cast(type, z, device), x_step,
                               z_step, bits, eps);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl(kOp, quantized_matmul_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl(kOp, quantized_matmul_dense); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl(kOp, quantized_matmul_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl(kOp, quantized_matmul_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl(kOp, quantized_matmul_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::quantized_matmul(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_step, const at::Tensor& z_step,
                                 int64_t bits, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::quantized_matmul", "").typed<decltype(quantized_matmul_shape)>();
  return op.call(x, z, x_step, z_step, bits, eps);
}

}  // namespace subbyte
