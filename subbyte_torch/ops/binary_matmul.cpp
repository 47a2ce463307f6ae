// subbyte::binary_matmul (subbyte/ops/binary_matmul/binary_matmul.h); gradients in binary.h.
#include "subbyte/ops/binary_matmul/binary_matmul.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/result_type.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/binary_matmul/binary_matmul_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/batched_rows.h"
#include "subbyte_torch/ops/binary.h"
#include "subbyte_torch/ops/binary_sign.h"
#include "subbyte_torch/ops/gradient_mode.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "binary_matmul(Tensor x, Tensor z, Tensor x_clip, Tensor z_clip) -> Tensor";

at::Tensor binary_matmul_shape(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip, const at::Tensor& z_clip) {
  check_scale("binary_matmul", "x_clip", x_clip);
  check_scale("binary_matmul", "z_clip", z_clip);
  return batched_product_shape("binary_matmul", x, z);
}

template <class Run>
at::Tensor binary_matmul_with(Run run, const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip,
                              const at::Tensor& z_clip) {
  const char* op = "binary_matmul";
  at::Tensor y = binary_matmul_shape(x, z, x_clip, z_clip);
  check_device(op, "z", z, "x", x);
  check_device(op, "x_clip", x_clip, "x", x);
  check_device(op, "z_clip", z_clip, "x", x);
  check_scale_values(op, "x_clip", x_clip, "z_clip", z_clip);
  const BatchedRows xr = batched_rows_of(op, "x", x, y), zr = batched_rows_of(op, "z", z, y);
  const at::Tensor scale = wide_scale(x_clip, x.scalar_type()), second = wide_scale(z_clip, x.scalar_type());
  BinaryMatmulParams p;
  p.x = data_of(xr.tensor);
  p.z = data_of(zr.tensor);
  p.y = mutable_data_of(y);
  p.dtype = p.z_dtype = xr.dtype;
  p.batch = xr.batch;
  p.m = y.size(-2);
  p.n = y.size(-1);
  p.k = x.size(-1);
  p.x_stride = p.z_stride = p.k;
  p.x_batch_stride = xr.batch_stride;
  p.z_batch_stride = zr.batch_stride;
  p.y_stride = p.n;
  p.y_batch_stride = p.m * p.n;
  p.scale = data_of(scale);
  p.second_scale = data_of(second);
  translated([&] { run(p); });
  return y;
}

at::Tensor binary_matmul_cpu(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip, const at::Tensor& z_clip) {
  return binary_matmul_with(
      [&](BinaryMatmulParams& p) {
        p.workspace_bytes = binary_matmul_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        binary_matmul(p);
      },
      x, z, x_clip, z_clip);
}

#if SB_CUDA
at::Tensor binary_matmul_cuda(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip, const at::Tensor& z_clip) {
  const c10::DeviceGuard device(x.device());
  return binary_matmul_with(
      [&](BinaryMatmulParams& p) {
        p.workspace_bytes = cuda::binary_matmul_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        cuda::binary_matmul(p, stream_of(x));
      },
      x, z, x_clip, z_clip);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("binary_matmul", binary_matmul_cuda); }
#endif

struct BinaryMatmulFn : torch::autograd::Function<BinaryMatmulFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& z,
                            const at::Tensor& x_clip, const at::Tensor& z_clip) {
    ctx->save_for_backward({x, z, x_clip, z_clip});
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::binary_matmul(x, z, x_clip, z_clip);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &z = saved[1], &x_clip = saved[2], &z_clip = saved[3], &g = grads[0];
    const auto operand = [&](const at::Tensor& g_side, const at::Tensor& v, const at::Tensor& clip, const at::Tensor& other,
                             const at::Tensor& other_clip, bool need_value, bool need_clip) {
      std::pair<at::Tensor, at::Tensor> out;
      if (!need_value && !need_clip) return out;
      const at::Tensor u = at::sum_to(at::matmul(g_side, signs_of(other, g.scalar_type())), v.sym_sizes()) *
                           other_clip.to(g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).reshape({});
      if (need_value) out.first = within_clip(v, clip, u);
      if (need_clip) out.second = clip_gradient(u, signs_of(v, v.scalar_type()), clip, v);
      return out;
    };
    auto [gx, gx_clip] = operand(g, x, x_clip, z, z_clip, ctx->needs_input_grad(0), ctx->needs_input_grad(2));
    auto [gz, gz_clip] = operand(g.transpose(-2, -1), z, z_clip, x, x_clip, ctx->needs_input_grad(1), ctx->needs_input_grad(3));
    return {gx, gz, gx_clip, gz_clip};
  }
};

at::Tensor binary_matmul_autograd(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip,
                                  const at::Tensor& z_clip) {
  if (needs_gradient({&x, &z, &x_clip, &z_clip}, {})) return BinaryMatmulFn::apply(x, z, x_clip, z_clip);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::binary_matmul(x, z, x_clip, z_clip);
}

template <at::DeviceType device>
at::Tensor binary_matmul_autocast(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip,
                                  const at::Tensor& z_clip) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::promote_types(x.scalar_type(), z.scalar_type());
  return ops::binary_matmul(x.to(type), z.to(type), x_clip, z_clip);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("binary_matmul", binary_matmul_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("binary_matmul", binary_matmul_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("binary_matmul", binary_matmul_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl("binary_matmul", binary_matmul_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl("binary_matmul", binary_matmul_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::binary_matmul(const at::Tensor& x, const at::Tensor& z, const at::Tensor& x_clip, const at::Tensor& z_clip) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::binary_matmul", "").typed<decltype(binary_matmul_shape)>();
  return op.call(x, z, x_clip, z_clip);
}

}  // namespace subbyte
