// subbyte::dequantize (subbyte/ops/dequantize/dequantize.h).
#include "subbyte/ops/dequantize/dequantize.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/dequantize/dequantize_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/gradient_mode.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "dequantize(" SB_PACKED_SCHEMA ", ScalarType? dtype=None) -> Tensor";

at::Tensor dequantize_shape(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  check_packed("dequantize", {SB_PACKED});
  const at::ScalarType type = dtype.value_or(scales.scalar_type());
  dtype_of("dequantize", "dtype", type);
  return at::empty_symint({codes.sym_size(0), in_features}, scales.options().dtype(type).requires_grad(std::nullopt));
}

template <class Run>
at::Tensor dequantize_with(Run run, SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  at::Tensor out = dequantize_shape(SB_PACKED, dtype);
  const PackedView w = view_of("dequantize", {SB_PACKED}, "codes", codes);
  DequantizeParams p;
  p.w = w.matrix;
  p.out = mutable_data_of(out);
  p.out_dtype = dtype_of("dequantize", "dtype", out.scalar_type());
  p.out_stride = in_features;
  translated([&] { run(p); });
  return out;
}

at::Tensor dequantize_cpu(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  return dequantize_with([](const DequantizeParams& p) { dequantize(p); }, SB_PACKED, dtype);
}

#if SB_CUDA
at::Tensor dequantize_cuda(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  const c10::DeviceGuard device(codes.device());
  return dequantize_with([&](const DequantizeParams& p) { cuda::dequantize(p, stream_of(codes)); }, SB_PACKED, dtype);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("dequantize", dequantize_cuda); }
#endif

struct DequantizeFn : torch::autograd::Function<DequantizeFn> {
  static constexpr bool is_traceable = true;
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& scales, const OptionalTensor& zeros,
                            const OptionalTensor& offsets, const PackedRest& rest, std::optional<at::ScalarType> dtype) {
    rest.save(ctx, {scales, zeros.value_or(at::Tensor()), offsets.value_or(at::Tensor())});
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::dequantize(rest.codes, scales, zeros, offsets, rest.perm, rest.format, rest.in_features, rest.group_size,
                           dtype);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const SavedPacked w(ctx, 3);
    const OptionalTensor zeros = optional_of(w.tensors[1]), offsets = optional_of(w.tensors[2]);
    const AffineGradients g =
        affine_gradients(grads[0], w.args(w.tensors[0], zeros, offsets), ctx->needs_input_grad(0),
                         given(zeros) && ctx->needs_input_grad(1), given(offsets) && ctx->needs_input_grad(1));
    return {g.scales, g.zeros, g.offsets, at::Tensor(), at::Tensor()};
  }
};

at::Tensor dequantize_autograd(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  if (needs_gradient({&scales}, {&zeros, &offsets}))
    return DequantizeFn::apply(scales, zeros, offsets, PackedRest{codes, perm, std::string(format), in_features, group_size},
                               dtype);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::dequantize(SB_PACKED, dtype);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("dequantize", dequantize_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("dequantize", dequantize_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("dequantize", dequantize_autograd); }

}  // namespace

at::Tensor ops::dequantize(SB_PACKED_PARAMS, std::optional<at::ScalarType> dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::dequantize", "").typed<decltype(dequantize_shape)>();
  return op.call(SB_PACKED, dtype);
}

}  // namespace subbyte
