// subbyte::quantized_conv2d (quantized.h): quantized_linear over the patches of an image.
//
// Patches are laid out as rows [N OH OW, C kh kw], a bounded number at a time, and go through the integer product. ATen's float
// convolution over the integers would be exact too (4-bit products add up below 2^24 for 262144 of them), but only as long as
// no back end chooses Winograd's or Fourier's form, which nothing promises; and 8 bits would leave 1024.
// Gradients: those of quantized_linear with conv2d's input and weight gradients in place of the matrix products; the steps'
// normalisation counts the elements of x and of the weight, not of the patches.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
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

// One convolution's arguments, as parameters and as a call's arguments.
#define SB_CONV_PARAMS                                                                                                     \
  const at::Tensor &x, const OptionalTensor &weight, const OptionalTensor &codes, const at::Tensor &x_step,                \
      const at::Tensor &w_step, const OptionalTensor &shift, const OptionalTensor &bias, at::IntArrayRef kernel_size,      \
      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t bits, double eps, \
      bool clip_weight_gradient
#define SB_CONV_REST kernel_size, stride, padding, dilation, groups, bits, eps, clip_weight_gradient

namespace subbyte {
namespace {

constexpr const char* kOp = "quantized_conv2d";
constexpr const char* kSchema =
    "quantized_conv2d(Tensor x, Tensor? weight, Tensor? codes, Tensor x_step, Tensor w_step, Tensor? shift, Tensor? bias, "
    "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, int bits=4, float eps=1e-05, "
    "bool clip_weight_gradient=True) -> Tensor";
constexpr int64_t kPatchBytes = int64_t(64) << 20;  // at most this much of patches at a time, but at least one image

void check_pair(const char* name, at::IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, kOp, ": ", name, " is ", pair,
                    ", expected two numbers of at least ", least);
}

at::Tensor quantized_conv2d_shape(SB_CONV_PARAMS) {
  check_step(kOp, "x_step", x_step);
  check_step(kOp, "w_step", w_step);
  check_step_rule(kOp, {bits, eps});
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  TORCH_CHECK_VALUE(x.dim() == 4, kOp, ": x has ", x.dim(), " dimensions, expected [N, C, H, W]");
  dtype_of(kOp, "x", x.scalar_type());
  const c10::SymInt c = x.sym_size(1);
  TORCH_CHECK_VALUE(groups >= 1 && c % groups == 0, kOp, ": groups is ", groups, ", expected a divisor of the ", c,
                    " channels of x");
  const c10::SymInt k = c / groups * kernel_size[0] * kernel_size[1];
  check_step_weight(kOp, weight, codes, k, {bits, eps});
  if (given(weight))
    TORCH_CHECK_VALUE(weight->dim() == 4 && weight->sym_size(1) == c / groups && weight->sym_size(2) == kernel_size[0] &&
                          weight->sym_size(3) == kernel_size[1],
                      kOp, ": weight is ", weight->sym_sizes(), ", expected [O, ", c / groups, ", ", kernel_size[0], ", ",
                      kernel_size[1], "] for ", c, " channels of x in ", groups, " groups");
  const c10::SymInt o = given(weight) ? weight->sym_size(0) : codes->sym_size(0);
  TORCH_CHECK_VALUE(o % groups == 0, kOp, ": groups is ", groups, ", expected a divisor of the ", o, " output channels");
  check_vector(kOp, "shift", shift, "C", c, x);
  check_vector(kOp, "bias", bias, "O", o, x);
  std::vector<c10::SymInt> sizes{x.sym_size(0), o};
  for (int64_t d = 0; d < 2; ++d) {
    const c10::SymInt room = x.sym_size(2 + d) + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, kOp, ": the kernel ", kernel_size, " with dilation ", dilation, " is larger than x ",
                      x.sym_sizes(), " with padding ", padding);
    sizes.push_back(room / stride[d] + 1);
  }
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt).memory_format(x.suggest_memory_format()));
}

at::Tensor shifted(const at::Tensor& x, const at::Tensor& shift) {
  return shift.defined() ? x + shift.reshape_symint({shift.sym_size(0), 1, 1}) : x;
}

// Images [begin, begin + count) of X, padded, as rows [count OH OW, C kh kw].
at::Tensor patches_of(const at::Tensor& moved, int64_t begin, int64_t count, at::IntArrayRef kernel_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  at::Tensor v = moved.narrow(0, begin, count);
  if (padding[0] > 0 || padding[1] > 0) v = at::constant_pad_nd(v, {padding[1], padding[1], padding[0], padding[0]}, 0);
  for (int64_t d = 0; d < 2; ++d)
    v = v.unfold(2 + d, dilation[d] * (kernel_size[d] - 1) + 1, stride[d]).slice(4 + d, 0, std::nullopt, dilation[d]);
  v = v.permute({0, 2, 3, 1, 4, 5});
  return v.reshape({count * v.size(1) * v.size(2), v.size(3) * v.size(4) * v.size(5)}).contiguous();
}

at::Tensor quantized_conv2d_dense(SB_CONV_PARAMS) {
  at::Tensor y = quantized_conv2d_shape(x, weight, codes, x_step, w_step, shift, bias, SB_CONV_REST);
  if (given(shift)) check_device(kOp, "shift", *shift, "x", x);
  const at::Tensor b = bias_of(kOp, bias, "x", x), moved = shifted(x, shift.value_or(at::Tensor()));
  const WeightRows w = weight_rows_of(kOp, weight, codes, x);
  if (y.numel() == 0) return y;
  const bool direct = y.is_contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor rows_y = direct ? y : at::empty(y.sizes(), y.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t images = x.size(0), area = y.size(2) * y.size(3), outputs = y.size(1),
                k = x.size(1) / groups * kernel_size[0] * kernel_size[1];
  const int64_t image_bytes = max_i64(1, area * k * groups * x.element_size());
  const int64_t at_once = max_i64(1, min_i64(images, kPatchBytes / image_bytes));
  for (int64_t begin = 0; begin < images; begin += at_once) {
    const int64_t count = min_i64(at_once, images - begin);
    const at::Tensor patches = patches_of(moved, begin, count, kernel_size, stride, padding, dilation);
    QuantizedMatmulParams p;
    p.dtype = dtype_of(kOp, "x", x.scalar_type());
    p.m = count * area;
    p.k = k;
    p.x_stride = k * groups;
    p.y_stride = outputs;
    p.bits = int(bits);
    p.eps = float(eps);
    const int64_t element = x.element_size(), group_outputs = outputs / groups;
    for (int64_t g = 0; g < groups; ++g) {
      w.set(p, g * group_outputs, group_outputs);
      if (k > 0) p.x = static_cast<const uint8_t*>(data_of(patches)) + g * k * element;
      p.y = static_cast<uint8_t*>(mutable_data_of(rows_y)) + (begin * area * outputs + g * group_outputs) * element;
      if (b.defined()) p.bias = static_cast<const uint8_t*>(data_of(b)) + g * group_outputs * element;
      run_quantized_product(kOp, p, x_step, "w_step", w_step, x);
    }
  }
  if (!direct) y.copy_(rows_y);
  return y;
}

#if SB_CUDA
at::Tensor quantized_conv2d_cuda(SB_CONV_PARAMS) {
  const c10::DeviceGuard device(x.device());
  return quantized_conv2d_dense(x, weight, codes, x_step, w_step, shift, bias, SB_CONV_REST);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl(kOp, quantized_conv2d_cuda); }
#endif

struct QuantizedConv2dFn : torch::autograd::Function<QuantizedConv2dFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& codes, const at::Tensor& x_step, const at::Tensor& w_step,
                            const OptionalTensor& shift, const OptionalTensor& bias, std::vector<int64_t> kernel_size,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                            int64_t groups, int64_t bits, double eps, bool clip_weight_gradient) {
    ctx->save_for_backward(
        {x, weight.value_or(at::Tensor()), codes.value_or(at::Tensor()), x_step, w_step, shift.value_or(at::Tensor())});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["clip"] = clip_weight_gradient;
    if (given(bias)) ctx->saved_data["bias_type"] = int64_t(bias->scalar_type());
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::quantized_conv2d(x, weight, codes, x_step, w_step, shift, bias, SB_CONV_REST);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &codes = saved[2], &x_step = saved[3], &w_step = saved[4],
                     &shift = saved[5];
    const StepRule rule{ctx->saved_data["bits"].toInt(), ctx->saved_data["eps"].toDouble()};
    const auto kernel_size = ctx->saved_data["kernel_size"].toIntVector();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const at::ScalarType type = gradient_type(x);
    const at::Tensor g = grads[0].to(type), moved = shifted(x, shift);
    const StepWeight w{weight, codes, w_step, {g.sym_size(1), x.sym_size(1) / groups, kernel_size[0], kernel_size[1]}, rule};
    torch::autograd::variable_list out(15);
    // Edges of tensors that were not given do not count: x, weight or codes, x_step, w_step, shift, bias.
    const bool need_x = ctx->needs_input_grad(0), need_shift = shift.defined() && ctx->needs_input_grad(4),
               need_weight = weight.defined() && ctx->needs_input_grad(1), need_x_step = ctx->needs_input_grad(2),
               need_w_step = ctx->needs_input_grad(3), input_side = need_x || need_shift || need_x_step,
               weight_side = need_weight || need_w_step;
    if (input_side || weight_side) {
      const auto [gx, gw, none] = at::convolution_backward_symint(
          g, on_step(moved, x_step, rule, type), w.on_step(type), std::nullopt, sym(ctx, "stride"), sym(ctx, "padding"),
          sym(ctx, "dilation"), /*transposed=*/false, std::vector<c10::SymInt>{0, 0}, groups, {input_side, weight_side, false});
      if (input_side) {
        const StepGradients to = step_gradients(moved, x_step, gx, rule, need_x || need_shift, need_x_step);
        if (need_x) out[0] = to.value.to(x.scalar_type());
        if (need_shift) out[5] = to.value.sum({0, 2, 3}).to(shift.scalar_type());
        out[3] = to.step;
      }
      if (weight_side) {
        const StepGradients to = w.gradients(gw, need_weight, need_w_step, ctx->saved_data["clip"].toBool());
        if (need_weight) out[1] = to.value.to(weight.scalar_type());
        out[4] = to.step;
      }
    }
    if (ctx->saved_data.count("bias_type") != 0 && ctx->needs_input_grad(shift.defined() ? 5 : 4))
      out[6] = g.sum({0, 2, 3}).to(at::ScalarType(ctx->saved_data["bias_type"].toInt()));
    return out;
  }

 private:
  static std::vector<c10::SymInt> sym(torch::autograd::AutogradContext* ctx, const char* name) {
    const auto numbers = ctx->saved_data[name].toIntVector();
    return {numbers.begin(), numbers.end()};
  }
};

at::Tensor quantized_conv2d_autograd(SB_CONV_PARAMS) {
  if (needs_gradient({&x, &x_step, &w_step}, {&weight, &shift, &bias}))
    return QuantizedConv2dFn::apply(x, weight, codes, x_step, w_step, shift, bias, kernel_size.vec(), stride.vec(),
                                    padding.vec(), dilation.vec(), groups, bits, eps, clip_weight_gradient);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::quantized_conv2d(x, weight, codes, x_step, w_step, shift, bias, SB_CONV_REST);
}

// As quantized_linear: the weight keeps its type.
template <at::DeviceType device>
at::Tensor quantized_conv2d_autocast(SB_CONV_PARAMS) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ops::quantized_conv2d(at::autocast::cached_cast(type, x, device), weight, codes, x_step, w_step,
                               at::autocast::cached_cast(type, shift, device), at::autocast::cached_cast(type, bias, device),
                               SB_CONV_REST);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl(kOp, quantized_conv2d_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl(kOp, quantized_conv2d_dense); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl(kOp, quantized_conv2d_autograd); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCPU, m) { m.impl(kOp, quantized_conv2d_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(subbyte, AutocastCUDA, m) { m.impl(kOp, quantized_conv2d_autocast<at::kCUDA>); }

}  // namespace

at::Tensor ops::quantized_conv2d(SB_CONV_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::quantized_conv2d", "").typed<decltype(quantized_conv2d_shape)>();
  return op.call(x, weight, codes, x_step, w_step, shift, bias, SB_CONV_REST);
}

}  // namespace subbyte
