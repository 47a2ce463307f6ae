// subbyte::pack, subbyte::unpack (subbyte/ops/pack/pack.h).
#include "subbyte/ops/pack/pack.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/pack/pack_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kPackSchema = "pack(Tensor codes, str format) -> Tensor";
constexpr const char* kUnpackSchema = "unpack(Tensor packed, str format, int in_features) -> Tensor";

at::Tensor pack_shape(const at::Tensor& codes, std::string_view format) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 2, "pack: codes is ", codes.scalar_type(), " ",
                    codes.sym_sizes(), ", expected uint8 [N, K]");
  return at::empty_symint({codes.sym_size(0), row_bytes_of("pack", format, codes.sym_size(1))}, codes.options());
}

at::Tensor unpack_shape(const at::Tensor& packed, std::string_view format, int64_t in_features) {
  TORCH_CHECK_VALUE(in_features >= 0, "unpack: in_features is ", in_features, ", expected at least 0");
  const c10::SymInt bytes = row_bytes_of("unpack", format, in_features);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.sym_size(1) == bytes, "unpack: packed is ",
                    packed.scalar_type(), " ", packed.sym_sizes(), ", expected uint8 [N, ", bytes, "] for ", in_features,
                    " columns of ", format);
  return at::empty_symint({packed.sym_size(0), in_features}, packed.options());
}

PackParams pack_params(const at::Tensor& codes, std::string_view format, const at::Tensor& packed) {
  PackParams p;
  p.n = codes.size(0);
  p.k = codes.size(1);
  p.layout = layout_of("pack", format, p.k);
  p.unpacked = bytes_of(codes);
  p.unpacked_stride = p.k;
  p.packed = mutable_bytes_of(packed);
  return p;
}

UnpackParams unpack_params(const at::Tensor& packed, std::string_view format, const at::Tensor& codes) {
  UnpackParams p;
  p.n = codes.size(0);
  p.k = codes.size(1);
  p.layout = layout_of("unpack", format, p.k);
  p.packed = bytes_of(packed);
  p.unpacked = mutable_bytes_of(codes);
  p.unpacked_stride = p.k;
  return p;
}

at::Tensor pack_cpu(const at::Tensor& codes, std::string_view format) {
  const at::Tensor packed = pack_shape(codes, format), source = codes.contiguous();
  translated([&] { pack(pack_params(source, format, packed)); });
  return packed;
}

at::Tensor unpack_cpu(const at::Tensor& packed, std::string_view format, int64_t in_features) {
  const at::Tensor codes = unpack_shape(packed, format, in_features), source = packed.contiguous();
  translated([&] { unpack(unpack_params(source, format, codes)); });
  return codes;
}

#if SB_CUDA
at::Tensor pack_cuda(const at::Tensor& codes, std::string_view format) {
  const c10::DeviceGuard device(codes.device());
  const at::Tensor packed = pack_shape(codes, format), source = codes.contiguous();
  translated([&] { cuda::pack(pack_params(source, format, packed), stream_of(codes)); });
  return packed;
}

at::Tensor unpack_cuda(const at::Tensor& packed, std::string_view format, int64_t in_features) {
  const c10::DeviceGuard device(packed.device());
  const at::Tensor codes = unpack_shape(packed, format, in_features), source = packed.contiguous();
  translated([&] { cuda::unpack(unpack_params(source, format, codes), stream_of(packed)); });
  return codes;
}

TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("pack", pack_cuda);
  m.impl("unpack", unpack_cuda);
}
#endif

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kPackSchema);
  m.def(kUnpackSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("pack", pack_shape);
  m.impl("unpack", unpack_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("pack", pack_cpu);
  m.impl("unpack", unpack_cpu);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("pack", torch::autograd::autogradNotImplementedFallback());
  m.impl("unpack", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor ops::pack(const at::Tensor& codes, std::string_view format) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::pack", "").typed<decltype(pack_shape)>();
  return op.call(codes, format);
}

at::Tensor ops::unpack(const at::Tensor& packed, std::string_view format, int64_t in_features) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::unpack", "").typed<decltype(unpack_shape)>();
  return op.call(packed, format, in_features);
}

}  // namespace subbyte
