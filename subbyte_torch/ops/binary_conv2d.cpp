// subbyte::binary_conv2d (subbyte/ops/binary_conv2d/binary_conv2d.h); gradients in binary.h.
#include "subbyte/ops/binary_conv2d/binary_conv2d.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/binary_conv2d/binary_conv2d_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/binary.h"
#include "subbyte_torch/ops/binary_sign.h"
#include "subbyte_torch/ops/gradient_mode.h"

namespace subbyte {
namespace {

constexpr const char* kSchema =
    "binary_conv2d(Tensor x, Tensor? weight, Tensor? codes, Tensor? shift, Tensor scale_a, Tensor scale_w, Tensor? bias, "
    "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, int pad_value=0) -> Tensor";

#define SB_CONV_PARAMS                                                                                               \
  const at::Tensor &x, const OptionalTensor &weight, const OptionalTensor &codes, const OptionalTensor &shift,       \
      const at::Tensor &scale_a, const at::Tensor &scale_w, const OptionalTensor &bias, at::IntArrayRef kernel_size, \
      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t pad_value
#define SB_CONV x, weight, codes, shift, scale_a, scale_w, bias, kernel_size, stride, padding, dilation, groups, pad_value

c10::SymInt out_size(const c10::SymInt& size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const c10::SymInt room = size + 2 * pad - dilation * (kernel - 1) - 1;
  TORCH_CHECK_VALUE(room >= 0, "binary_conv2d: the kernel, ", dilation * (kernel - 1) + 1,
                    " pixels with its dilation, does not fit into ", size + 2 * pad, " pixels with their padding");
  return room / stride + 1;
}

at::Tensor binary_conv2d_shape(SB_CONV_PARAMS) {
  const char* op = "binary_conv2d";
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x has ", x.dim(), " dimensions, expected [B, C, H, W]");
  dtype_of(op, "x", x.scalar_type());
  const auto pair = [&](const char* name, at::IntArrayRef v, int64_t least) {
    TORCH_CHECK_VALUE(v.size() == 2 && v[0] >= least && v[1] >= least, op, ": ", name, " is ", v,
                      ", expected two numbers from ", least);
  };
  pair("kernel_size", kernel_size, 1);
  pair("stride", stride, 1);
  pair("padding", padding, 0);
  pair("dilation", dilation, 1);
  TORCH_CHECK_VALUE(pad_value >= -1 && pad_value <= 1, op, ": pad_value is ", pad_value, ", expected -1, 0 or 1");
  const c10::SymInt c = x.sym_size(1);
  TORCH_CHECK_VALUE(groups >= 1 && c % groups == 0, op, ": groups is ", groups, ", expected a divisor of C = ", c);
  const c10::SymInt k = c / groups * kernel_size[0] * kernel_size[1];
  const c10::SymInt o = check_sign_weight(op, {weight, codes}, k, {c / groups, kernel_size[0], kernel_size[1]});
  TORCH_CHECK_VALUE(o % groups == 0, op, ": groups is ", groups, ", expected a divisor of O = ", o);
  check_vector(op, "shift", shift, c);
  check_vector(op, "bias", bias, o);
  check_scale(op, "scale_a", scale_a);
  check_scale(op, "scale_w", scale_w);
  return at::empty_symint({x.sym_size(0), o, out_size(x.sym_size(2), kernel_size[0], stride[0], padding[0], dilation[0]),
                           out_size(x.sym_size(3), kernel_size[1], stride[1], padding[1], dilation[1])},
                          x.options().requires_grad(std::nullopt).memory_format(x.suggest_memory_format()));
}

at::Tensor shifted(const at::Tensor& x, const OptionalTensor& shift) {
  return given(shift) ? x + shift->to(x.scalar_type()).unsqueeze(-1).unsqueeze(-1) : x;
}

template <class Run>
at::Tensor binary_conv2d_with(Run run, SB_CONV_PARAMS) {
  const char* op = "binary_conv2d";
  at::Tensor y = binary_conv2d_shape(SB_CONV);
  check_device(op, "scale_a", scale_a, "x", x);
  check_device(op, "scale_w", scale_w, "x", x);
  if (given(shift)) check_device(op, "shift", *shift, "x", x);
  check_scale_values(op, "scale_a", scale_a, "scale_w", scale_w);
  const at::Tensor image = shifted(x, shift).resolve_neg();
  const at::Tensor b = given(bias) ? bias_of(op, bias->to(x.scalar_type()), "x", x) : at::Tensor();
  const at::Tensor scale = wide_scale(scale_a, x.scalar_type()), second = wide_scale(scale_w, x.scalar_type());
  BinaryConv2dParams p;
  at::Tensor w;
  if (given(codes)) {
    check_device(op, "codes", *codes, "x", x);
    w = codes->contiguous();
    p.weight_bits = bytes_of(w);
  } else {
    check_device(op, "weight", *weight, "x", x);
    w = weight->resolve_neg().contiguous();
    p.weight = data_of(w);
    p.weight_dtype = dtype_of(op, "weight", w.scalar_type());
  }
  p.x = data_of(image);
  p.dtype = dtype_of(op, "x", x.scalar_type());
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_channels = y.size(1);
  p.kernel_h = kernel_size[0];
  p.kernel_w = kernel_size[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.groups = groups;
  p.pad_value = int(pad_value);
  p.scale = data_of(scale);
  p.second_scale = data_of(second);
  p.bias = data_of(b);
  p.y = mutable_data_of(y);
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = image.stride(i);
    p.y_strides[i] = y.stride(i);
  }
  translated([&] { run(p); });
  return y;
}

at::Tensor binary_conv2d_cpu(SB_CONV_PARAMS) {
  return binary_conv2d_with(
      [&](BinaryConv2dParams& p) {
        p.workspace_bytes = binary_conv2d_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        binary_conv2d(p);
      },
      SB_CONV);
}

#if SB_CUDA
at::Tensor binary_conv2d_cuda(SB_CONV_PARAMS) {
  const c10::DeviceGuard device(x.device());
  return binary_conv2d_with(
      [&](BinaryConv2dParams& p) {
        p.workspace_bytes = cuda::binary_conv2d_workspace_bytes(p);
        const at::Tensor workspace = workspace_of(p.workspace_bytes, x);
        p.workspace = mutable_data_of(workspace);
        cuda::binary_conv2d(p, stream_of(x));
      },
      SB_CONV);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("binary_conv2d", binary_conv2d_cuda); }
#endif

struct BinaryConv2dFn : torch::autograd::Function<BinaryConv2dFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scale_a,
                            const at::Tensor& scale_w, const OptionalTensor& weight, const OptionalTensor& shift,
                            const OptionalTensor& bias, const OptionalTensor& codes, std::vector<int64_t> kernel_size,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                            int64_t groups, int64_t pad_value) {
    ctx->save_for_backward({x, scale_a, scale_w, weight.value_or(at::Tensor()), shift.value_or(at::Tensor()),
                            bias.value_or(at::Tensor()), codes.value_or(at::Tensor())});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["pad_value"] = pad_value;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::binary_conv2d(x, weight, codes, shift, scale_a, scale_w, bias, kernel_size, stride, padding, dilation, groups,
                              pad_value);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &scale_a = saved[1], &scale_w = saved[2], &weight = saved[3], &shift = saved[4],
                     &bias = saved[5], &codes = saved[6], &g = grads[0];
    const std::vector<int64_t> kernel = ctx->saved_data["kernel_size"].toIntVector(),
                               stride = ctx->saved_data["stride"].toIntVector(),
                               padding = ctx->saved_data["padding"].toIntVector(),
                               dilation = ctx->saved_data["dilation"].toIntVector();
    const int64_t groups = ctx->saved_data["groups"].toInt(), pad_value = ctx->saved_data["pad_value"].toInt();
    size_t edge = 3;
    const auto need = [&](const at::Tensor& t) { return t.defined() && ctx->needs_input_grad(edge++); };
    const bool need_x = ctx->needs_input_grad(0), need_a = ctx->needs_input_grad(1), need_w = ctx->needs_input_grad(2);
    const bool need_weight = need(weight), need_shift = need(shift), need_bias = need(bias);
    const at::ScalarType type = g.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
    const bool needs_input = need_x || need_shift || need_a, needs_kernel = need_weight || need_w;
    const at::Tensor shifted_x = shifted(x, optional_of(shift));
    // The border is part of the input here, so that it counts where it must; its gradient is cut off again.
    const at::Tensor padded =
        at::constant_pad_nd(signs_of(shifted_x, type), {padding[1], padding[1], padding[0], padding[0]}, at::Scalar(pad_value));
    at::Tensor w_signs;
    if (codes.defined()) {
      const int64_t channels = x.sym_size(1).guard_int(__FILE__, __LINE__);
      w_signs = signs_of_codes(codes, channels / groups * kernel[0] * kernel[1], type)
                    .reshape({codes.size(0), channels / groups, kernel[0], kernel[1]});
    } else {
      w_signs = signs_of(weight, type);
    }
    at::Tensor gx, g_shift, g_weight, g_a, g_w, g_bias, gp, gw;
    if (needs_input || needs_kernel) {
      if (g.sym_numel() == 0) {
        gp = at::zeros_like(padded);
        gw = at::zeros_like(w_signs);
      } else {
        const auto both = at::convolution_backward(g, padded, w_signs, std::nullopt, stride, {0, 0}, dilation,
                                                   /*transposed=*/false, {0, 0}, groups, {needs_input, needs_kernel, false});
        gp = std::get<0>(both);
        gw = std::get<1>(both);
      }
    }
    if (needs_input) {
      gp = gp * scale_w.to(wide).reshape({});
      const at::Tensor u = gp.narrow_symint(2, padding[0], x.sym_size(2)).narrow_symint(3, padding[1], x.sym_size(3));
      if (need_x || need_shift) gx = within_clip(shifted_x, scale_a, u);
      if (need_shift) g_shift = gx.sum({0, 2, 3}).to(shift.scalar_type());
      if (need_a) g_a = clip_gradient(gp, padded, scale_a, x);
    }
    if (needs_kernel) {
      gw = gw * scale_a.to(wide).reshape({});
      if (need_weight) g_weight = gw.to(weight.scalar_type());
      if (need_w) g_w = clip_gradient(gw, w_signs, scale_w, w_signs);
    }
    if (need_bias) g_bias = g.sum({0, 2, 3}).to(bias.scalar_type());
    const at::Tensor none;
    return {need_x ? gx : none, g_a, g_w, g_weight, g_shift, g_bias, none, none, none, none, none, none, none};
  }
};

at::Tensor binary_conv2d_autograd(SB_CONV_PARAMS) {
  if (needs_gradient({&x, &scale_a, &scale_w}, {&weight, &shift, &bias}))
    return BinaryConv2dFn::apply(x, scale_a, scale_w, weight, shift, bias, codes, kernel_size.vec(), stride.vec(),
                                 padding.vec(), dilation.vec(), groups, pad_value);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::binary_conv2d(SB_CONV);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("binary_conv2d", binary_conv2d_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("binary_conv2d", binary_conv2d_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("binary_conv2d", binary_conv2d_autograd); }

}  // namespace

at::Tensor ops::binary_conv2d(SB_CONV_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::binary_conv2d", "").typed<decltype(binary_conv2d_shape)>();
  return op.call(SB_CONV);
}

}  // namespace subbyte
