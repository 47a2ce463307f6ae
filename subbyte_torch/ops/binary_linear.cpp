// subbyte::binary_linear (subbyte/ops/binary_matmul/binary_matmul.h with one matrix); gradients in binary.h.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "subbyte/ops/binary_matmul/binary_matmul.h"

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/binary_matmul/binary_matmul_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/binary.h"
#include "subbyte_torch/ops/binary_sign.h"
#include "subbyte_torch/ops/gradient_mode.h"

namespace subbyte {
namespace {

constexpr const char* kSchema =
    "binary_linear(Tensor x, Tensor? weight, Tensor? codes, Tensor? shift, Tensor scale_a, Tensor scale_w, Tensor? bias=None) "
    "-> Tensor";

at::Tensor binary_linear_shape(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                               const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                               const OptionalTensor& bias) {
  const char* op = "binary_linear";
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimensions, expected [..., K]");
  dtype_of(op, "x", x.scalar_type());
  const c10::SymInt k = x.sym_size(-1);
  const c10::SymInt n = check_sign_weight(op, {weight, codes}, k, {k});
  check_vector(op, "shift", shift, k);
  check_vector(op, "bias", bias, n);
  check_scale(op, "scale_a", scale_a);
  check_scale(op, "scale_w", scale_w);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = n;
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

at::Tensor shifted(const at::Tensor& x, const OptionalTensor& shift) {
  return given(shift) ? x + shift->to(x.scalar_type()) : x;
}

template <class Run>
at::Tensor binary_linear_with(Run run, const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                              const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                              const OptionalTensor& bias) {
  const char* op = "binary_linear";
  at::Tensor y = binary_linear_shape(x, weight, codes, shift, scale_a, scale_w, bias);
  check_device(op, "scale_a", scale_a, "x", x);
  check_device(op, "scale_w", scale_w, "x", x);
  if (given(shift)) check_device(op, "shift", *shift, "x", x);
  check_scale_values(op, "scale_a", scale_a, "scale_w", scale_w);
  const Rows rows = rows_of(op, "x", shifted(x, shift));
  const at::Tensor b = given(bias) ? bias_of(op, bias->to(x.scalar_type()), "x", x) : at::Tensor();
  const at::Tensor scale = wide_scale(scale_a, x.scalar_type()), second = wide_scale(scale_w, x.scalar_type());
  BinaryMatmulParams p;
  at::Tensor w;
  if (given(codes)) {
    check_device(op, "codes", *codes, "x", x);
    w = codes->contiguous();
    p.z_bits = bytes_of(w);
  } else {
    check_device(op, "weight", *weight, "x", x);
    w = weight->resolve_neg().contiguous();
    p.z = data_of(w);
    p.z_dtype = dtype_of(op, "weight", w.scalar_type());
  }
  p.x = rows.data();
  p.y = mutable_data_of(y);
  p.dtype = rows.dtype;
  p.m = rows.m;
  p.n = y.size(-1);
  p.k = x.size(-1);
  p.x_stride = rows.stride;
  p.z_stride = p.k;
  p.y_stride = p.n;
  p.scale = data_of(scale);
  p.second_scale = data_of(second);
  p.bias = data_of(b);
  translated([&] { run(p); });
  return y;
}

at::Tensor binary_linear_cpu(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                             const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                             const OptionalTensor& bias) {
  return binary_linear_with(
      [&](BinaryMatmulParams& p) {
        p.workspace_bytes = binary_matmul_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        binary_matmul(p);
      },
      x, weight, codes, shift, scale_a, scale_w, bias);
}

#if SB_CUDA
at::Tensor binary_linear_cuda(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                              const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                              const OptionalTensor& bias) {
  const c10::DeviceGuard device(x.device());
  return binary_linear_with(
      [&](BinaryMatmulParams& p) {
        p.workspace_bytes = cuda::binary_matmul_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        cuda::binary_matmul(p, stream_of(x));
      },
      x, weight, codes, shift, scale_a, scale_w, bias);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("binary_linear", binary_linear_cuda); }
#endif

struct BinaryLinearFn : torch::autograd::Function<BinaryLinearFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scale_a,
                            const at::Tensor& scale_w, const OptionalTensor& weight, const OptionalTensor& shift,
                            const OptionalTensor& bias, const OptionalTensor& codes) {
    ctx->save_for_backward({x, scale_a, scale_w, weight.value_or(at::Tensor()), shift.value_or(at::Tensor()),
                            bias.value_or(at::Tensor()), codes.value_or(at::Tensor())});
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::binary_linear(x, weight, codes, shift, scale_a, scale_w, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &scale_a = saved[1], &scale_w = saved[2], &weight = saved[3], &shift = saved[4],
                     &bias = saved[5], &codes = saved[6], &g = grads[0];
    size_t edge = 3;
    const auto need = [&](const at::Tensor& t) { return t.defined() && ctx->needs_input_grad(edge++); };
    const bool need_x = ctx->needs_input_grad(0), need_a = ctx->needs_input_grad(1), need_w = ctx->needs_input_grad(2);
    const bool need_weight = need(weight), need_shift = need(shift), need_bias = need(bias);
    const at::ScalarType type = g.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor shifted_x = shifted(x, optional_of(shift)), x_signs = signs_of(shifted_x, type);
    at::Tensor gx, g_shift, g_weight, g_a, g_w, g_bias, w_signs;
    if (need_x || need_shift || need_a || need_w)
      w_signs =
          codes.defined() ? signs_of_codes(codes, x.sym_size(-1).guard_int(__FILE__, __LINE__), type) : signs_of(weight, type);
    if (need_x || need_shift || need_a) {
      const at::Tensor u = at::matmul(g, w_signs) * scale_w.to(wide).reshape({});
      if (need_x || need_shift) gx = within_clip(shifted_x, scale_a, u);
      if (need_shift) g_shift = at::sum_to(gx, shift.sym_sizes()).to(shift.scalar_type());
      if (need_a) g_a = clip_gradient(u, x_signs, scale_a, x);
    }
    const auto rows = [](const at::Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); };
    if (need_weight || need_w) {
      const at::Tensor v = at::matmul(rows(g).t(), rows(x_signs)) * scale_a.to(wide).reshape({});
      if (need_weight) g_weight = v.to(weight.scalar_type());
      if (need_w) g_w = clip_gradient(v, w_signs, scale_w, w_signs);
    }
    if (need_bias) g_bias = at::sum_to(g, bias.sym_sizes()).to(bias.scalar_type());
    return {need_x ? gx : at::Tensor(), g_a, g_w, g_weight, g_shift, g_bias, at::Tensor()};
  }
};

at::Tensor binary_linear_autograd(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                                  const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                                  const OptionalTensor& bias) {
  if (needs_gradient({&x, &scale_a, &scale_w}, {&weight, &shift, &bias}))
    return BinaryLinearFn::apply(x, scale_a, scale_w, weight, shift, bias, codes);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::binary_linear(x, weight, codes, shift, scale_a, scale_w, bias);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("binary_linear", binary_linear_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("binary_linear", binary_linear_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("binary_linear", binary_linear_autograd); }

}  // namespace

at::Tensor ops::binary_linear(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& codes,
                              const OptionalTensor& shift, const at::Tensor& scale_a, const at::Tensor& scale_w,
                              const OptionalTensor& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::binary_linear", "").typed<decltype(binary_linear_shape)>();
  return op.call(x, weight, codes, shift, scale_a, scale_w, bias);
}

}  // namespace subbyte
