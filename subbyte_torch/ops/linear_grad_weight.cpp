// subbyte::linear_grad_weight: gw[n, k] = sum_m gy[m, n] x[m, k], over all leading dimensions.
//
// gy [..., N] and x [..., K] of one floating dtype, the same leading dimensions -> dense [N, K] of that dtype. No packed weight
// enters, so this is PyTorch's matrix product: float32 accumulation for float16 and bfloat16. M = 0 gives zeros.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "linear_grad_weight(Tensor gy, Tensor x) -> Tensor";

at::Tensor linear_grad_weight_shape(const at::Tensor& gy, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      gy.dim() >= 1 && gy.dim() == x.dim() && gy.sym_sizes().slice(0, gy.dim() - 1) == x.sym_sizes().slice(0, x.dim() - 1),
      "linear_grad_weight: gy is ", gy.sym_sizes(), ", x is ", x.sym_sizes(), ", expected the same leading dimensions");
  TORCH_CHECK_VALUE(gy.scalar_type() == x.scalar_type(), "linear_grad_weight: gy is ", gy.scalar_type(), ", x is ",
                    x.scalar_type(), ", expected one dtype");
  dtype_of("linear_grad_weight", "gy", gy.scalar_type());
  return at::empty_symint({gy.sym_size(-1), x.sym_size(-1)}, gy.options().requires_grad(std::nullopt));
}

at::Tensor linear_grad_weight_dense(const at::Tensor& gy, const at::Tensor& x) {
  check_device("linear_grad_weight", "x", x, "gy", gy);
  at::Tensor gw = linear_grad_weight_shape(gy, x);
  const Rows a = rows_of("linear_grad_weight", "gy", gy), b = rows_of("linear_grad_weight", "x", x);
  at::mm_out(gw, a.tensor.t(), b.tensor);
  return gw;
}

struct LinearGradWeightFn : torch::autograd::Function<LinearGradWeightFn> {
  static constexpr bool is_traceable = true;
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gy, const at::Tensor& x) {
    ctx->save_for_backward({gy, x});
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::linear_grad_weight(gy, x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& g = grads[0];
    return {ctx->needs_input_grad(0) ? at::matmul(saved[1], g.t()) : at::Tensor(),
            ctx->needs_input_grad(1) ? at::matmul(saved[0], g) : at::Tensor()};
  }
};

at::Tensor linear_grad_weight_autograd(const at::Tensor& gy, const at::Tensor& x) {
  if (needs_gradient({&gy, &x}, {})) return LinearGradWeightFn::apply(gy, x);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::linear_grad_weight(gy, x);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("linear_grad_weight", linear_grad_weight_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("linear_grad_weight", linear_grad_weight_dense); }
#if SB_CUDA
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("linear_grad_weight", linear_grad_weight_dense); }
#endif
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("linear_grad_weight", linear_grad_weight_autograd); }

}  // namespace

at::Tensor ops::linear_grad_weight(const at::Tensor& gy, const at::Tensor& x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("subbyte::linear_grad_weight", "")
                             .typed<decltype(linear_grad_weight_shape)>();
  return op.call(gy, x);
}

}  // namespace subbyte
