// subbyte::linear_a8 (subbyte/ops/linear_a8/linear_a8.h). Its gradient is straight-through: that of linear, as if x had not
// been rounded.
#include "subbyte/ops/linear_a8/linear_a8.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/linear_a8/linear_a8_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/linear_gradient.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kSchema =
    "linear_a8(Tensor x, Tensor? weight, " SB_PACKED_SCHEMA ", Tensor? bias, str x_scale=\"row\") -> Tensor";

ActivationScale x_scale_of(std::string_view name) {
  if (name == "row") return ActivationScale::kRow;
  if (name == "row_group") return ActivationScale::kRowGroup;
  TORCH_CHECK_VALUE(false, "linear_a8: x_scale '", name, "' is unknown, expected row or row_group");
}

at::Tensor linear_a8_shape(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                           std::string_view x_scale) {
  check_packed("linear_a8", {SB_PACKED});
  check_features("linear_a8", "x", x, in_features);
  TORCH_CHECK_VALUE(x.scalar_type() != at::kDouble, "linear_a8: x is float64, expected float32, float16 or bfloat16");
  x_scale_of(x_scale);
  const c10::SymInt n = codes.sym_size(0);
  check_handle("linear_a8", weight, n, in_features);
  if (given(bias))
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == n && bias->scalar_type() == x.scalar_type(),
                      "linear_a8: bias is ", bias->scalar_type(), " ", bias->sym_sizes(), ", expected ", x.scalar_type(),
                      " [N] = [", n, "] as x");
  auto sizes = x.sym_sizes().vec();
  sizes.back() = n;
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

LinearA8Params linear_a8_params(const Rows& rows, const PackedView& w, const at::Tensor& b, const at::Tensor& y,
                                std::string_view x_scale) {
  LinearA8Params p;
  p.x = rows.data();
  p.dtype = rows.dtype;
  p.m = rows.m;
  p.x_stride = rows.stride;
  p.x_scale = x_scale_of(x_scale);
  p.w = w.matrix;
  p.bias = data_of(b);
  p.y = mutable_data_of(y);
  p.y_stride = w.matrix.n;
  return p;
}

at::Tensor linear_a8_cpu(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                         std::string_view x_scale) {
  at::Tensor y = linear_a8_shape(x, weight, SB_PACKED, bias, x_scale);
  const PackedView w = view_of("linear_a8", {SB_PACKED}, "x", x);
  const Rows rows = rows_of("linear_a8", "x", x);
  const at::Tensor b = bias_of("linear_a8", bias, "x", x);
  LinearA8Params p = linear_a8_params(rows, w, b, y, x_scale);
  p.workspace_bytes = linear_a8_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
  p.workspace = mutable_data_of(workspace);
  translated([&] { linear_a8(p); });
  return y;
}

#if SB_CUDA
at::Tensor linear_a8_cuda(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                          std::string_view x_scale) {
  const c10::DeviceGuard device(codes.device());
  at::Tensor y = linear_a8_shape(x, weight, SB_PACKED, bias, x_scale);
  const PackedView w = view_of("linear_a8", {SB_PACKED}, "x", x);
  const Rows rows = rows_of("linear_a8", "x", x);
  const at::Tensor b = bias_of("linear_a8", bias, "x", x);
  LinearA8Params p = linear_a8_params(rows, w, b, y, x_scale);
  p.workspace_bytes = cuda::linear_a8_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
  p.workspace = mutable_data_of(workspace);
  translated([&] { cuda::linear_a8(p, stream_of(x)); });
  return y;
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("linear_a8", linear_a8_cuda); }
#endif

at::Tensor linear_a8_autograd(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                              std::string_view x_scale) {
  if (needs_gradient({&x, &scales}, {&weight, &zeros, &offsets, &bias})) {
    check_handle("linear_a8", weight, codes.sym_size(0), in_features);
    return recorded_linear(x, weight, SB_PACKED, bias, x_scale);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::linear_a8(x, std::nullopt, SB_PACKED, bias, x_scale);
}

template <at::DeviceType device>
at::Tensor linear_a8_autocast(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                              std::string_view x_scale) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::linear_a8(at::autocast::cached_cast(type, x, device), weight, SB_PACKED,
                        at::autocast::cached_cast(type, bias, device), x_scale);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("linear_a8", linear_a8_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("linear_a8", linear_a8_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("linear_a8", linear_a8_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl("linear_a8", linear_a8_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl("linear_a8", linear_a8_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::linear_a8(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                          std::string_view x_scale) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::linear_a8", "").typed<decltype(linear_a8_shape)>();
  return op.call(x, weight, SB_PACKED, bias, x_scale);
}

}  // namespace subbyte
