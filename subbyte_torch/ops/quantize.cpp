// subbyte::quantize, subbyte::encode, subbyte::encode_ (subbyte/ops/quantize/quantize.h). None has a gradient: rounding has
// none.
#include "subbyte/ops/quantize/quantize.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/quantize/quantize_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

using QuantizeResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kQuantizeSchema =
    "quantize(Tensor w, str format, int group_size, str scheme=\"minmax\", str zero_kind=\"offsets\", ScalarType? "
    "scale_dtype=None, "
    "Tensor? perm=None, str rounding=\"nearest\", int seed=0, int offset=0) -> (Tensor codes, Tensor scales, Tensor zeros)";
#define SB_ENCODE_SCHEMA                                                                                    \
  "Tensor w, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, str format, int group_size, str " \
  "rounding=\"nearest\", "                                                                                  \
  "int seed=0, int offset=0"
constexpr const char* kEncodeSchema = "encode(" SB_ENCODE_SCHEMA ") -> Tensor";
constexpr const char* kEncodeInPlaceSchema = "encode_(Tensor(a!) codes, " SB_ENCODE_SCHEMA ") -> ()";

ZeroKind zero_kind_of(std::string_view name) {
  if (name == "fixed") return ZeroKind::kFixed;
  if (name == "zeros") return ZeroKind::kZeros;
  if (name == "offsets") return ZeroKind::kOffsets;
  TORCH_CHECK_VALUE(false, "quantize: zero_kind '", name, "' is unknown, expected fixed, zeros or offsets");
}

void check_matrix(const char* op, const at::Tensor& w) {
  TORCH_CHECK_VALUE(w.dim() == 2, op, ": w has ", w.dim(), " dimensions, expected [N, K]");
  dtype_of(op, "w", w.scalar_type());
}

// ---- shape rules

QuantizeResult quantize_shape(const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme,
                              std::string_view zero_kind, std::optional<at::ScalarType> scale_dtype, const OptionalTensor& perm,
                              std::string_view rounding, int64_t seed, int64_t offset) {
  check_matrix("quantize", w);
  translated([&] { return scheme_from_name(scheme); });
  translated([&] { return rounding_from_name(rounding); });
  const c10::SymInt n = w.sym_size(0), k = w.sym_size(1), groups = groups_of("quantize", k, group_size);
  const at::ScalarType type = scale_dtype.value_or(w.scalar_type() == at::kDouble ? at::kFloat : w.scalar_type());
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "quantize: scale_dtype is ", type,
                    ", expected float32, float16 or bfloat16");
  const at::TensorOptions options = w.options().dtype(type).requires_grad(std::nullopt);
  at::Tensor codes = at::empty_symint({n, row_bytes_of("quantize", format, k)}, options.dtype(at::kByte));
  at::Tensor scales = at::empty_symint({n, groups}, options);
  if (given(perm)) check_affine("quantize", n, k, scales, {}, {}, perm, group_size);
  if (zero_kind_of(zero_kind) == ZeroKind::kFixed) return {codes, scales, at::empty_symint({c10::SymInt(0)}, options)};
  return {codes, scales, at::empty_symint({n, groups}, options)};
}

at::Tensor encode_shape(const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                        const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
                        std::string_view rounding, int64_t seed, int64_t offset) {
  check_matrix("encode", w);
  translated([&] { return rounding_from_name(rounding); });
  const c10::SymInt n = w.sym_size(0), k = w.sym_size(1);
  check_affine("encode", n, k, scales, zeros, offsets, perm, group_size);
  return at::empty_symint({n, row_bytes_of("encode", format, k)}, w.options().dtype(at::kByte).requires_grad(std::nullopt));
}

void encode_in_place_shape(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                           const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format,
                           int64_t group_size, std::string_view rounding, int64_t seed, int64_t offset) {
  check_matrix("encode_", w);
  translated([&] { return rounding_from_name(rounding); });
  const c10::SymInt n = w.sym_size(0), k = w.sym_size(1), bytes = row_bytes_of("encode_", format, k);
  check_affine("encode_", n, k, scales, zeros, offsets, perm, group_size);
  TORCH_CHECK_VALUE(
      codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.sym_size(0) == n && codes.sym_size(1) == bytes,
      "encode_: codes is ", codes.scalar_type(), " ", codes.sym_sizes(), ", expected uint8 [", n, ", ", bytes, "]");
}

// ---- glue

QuantizeParams quantize_params(const Rows& w, const PackedView& out, std::string_view rounding, int64_t seed, int64_t offset) {
  QuantizeParams p;
  p.w = w.data();
  p.w_dtype = w.dtype;
  p.w_stride = w.stride;
  p.out = out.matrix;
  p.rounding = rounding_from_name(rounding);
  p.seed = uint64_t(seed);
  p.offset = uint64_t(offset);
  return p;
}

template <class Run>
QuantizeResult quantize_with(Run run, const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme,
                             std::string_view zero_kind, std::optional<at::ScalarType> scale_dtype, const OptionalTensor& perm,
                             std::string_view rounding, int64_t seed, int64_t offset) {
  QuantizeResult result = quantize_shape(w, format, group_size, scheme, zero_kind, scale_dtype, perm, rounding, seed, offset);
  const at::Tensor &codes = std::get<0>(result), &scales = std::get<1>(result), &zeros = std::get<2>(result);
  const ZeroKind kind = zero_kind_of(zero_kind);
  const OptionalTensor as_zeros = kind == ZeroKind::kZeros ? OptionalTensor(zeros) : std::nullopt;
  const OptionalTensor as_offsets = kind == ZeroKind::kOffsets ? OptionalTensor(zeros) : std::nullopt;
  const Rows rows = rows_of("quantize", "w", w);
  const PackedView out =
      affine_view_of("quantize", w.size(0), w.size(1), scales, as_zeros, as_offsets, perm, format, group_size, "w", w);
  QuantizeParams p = quantize_params(rows, out, rounding, seed, offset);
  p.scheme = scheme_from_name(scheme);
  p.codes = mutable_bytes_of(codes);
  p.scales = mutable_data_of(scales);
  if (kind != ZeroKind::kFixed) p.zeros = mutable_data_of(zeros);
  translated([&] { run(p); });
  return result;
}

// `codes` is contiguous here.
template <class Run>
void encode_with(Run run, const char* op, const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales,
                 const OptionalTensor& zeros, const OptionalTensor& offsets, const OptionalTensor& perm,
                 std::string_view format, int64_t group_size, std::string_view rounding, int64_t seed, int64_t offset) {
  check_device(op, "codes", codes, "w", w);
  const Rows rows = rows_of(op, "w", w);
  const PackedView out = affine_view_of(op, w.size(0), w.size(1), scales, zeros, offsets, perm, format, group_size, "w", w);
  QuantizeParams p = quantize_params(rows, out, rounding, seed, offset);
  p.codes = mutable_bytes_of(codes);
  p.out.codes = p.codes;
  translated([&] { run(p); });
}

QuantizeResult quantize_cpu(const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme,
                            std::string_view zero_kind, std::optional<at::ScalarType> scale_dtype, const OptionalTensor& perm,
                            std::string_view rounding, int64_t seed, int64_t offset) {
  return quantize_with([](const QuantizeParams& p) { quantize(p); }, w, format, group_size, scheme, zero_kind, scale_dtype,
                       perm, rounding, seed, offset);
}

at::Tensor encode_cpu(const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
                      const OptionalTensor& perm, std::string_view format, int64_t group_size, std::string_view rounding,
                      int64_t seed, int64_t offset) {
  at::Tensor codes = encode_shape(w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
  encode_with([](const QuantizeParams& p) { encode(p); }, "encode", codes, w, scales, zeros, offsets, perm, format, group_size,
              rounding, seed, offset);
  return codes;
}

// Codes with gaps between rows are made apart and copied in.
at::Tensor dense_codes(const at::Tensor& codes) {
  return codes.is_contiguous() ? codes : at::empty(codes.sizes(), codes.options());
}

void encode_in_place_cpu(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                         const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
                         std::string_view rounding, int64_t seed, int64_t offset) {
  encode_in_place_shape(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
  const at::Tensor target = dense_codes(codes);
  encode_with([](const QuantizeParams& p) { encode(p); }, "encode_", target, w, scales, zeros, offsets, perm, format,
              group_size, rounding, seed, offset);
  if (!target.is_same(codes)) codes.copy_(target);
}

#if SB_CUDA
QuantizeResult quantize_cuda(const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme,
                             std::string_view zero_kind, std::optional<at::ScalarType> scale_dtype, const OptionalTensor& perm,
                             std::string_view rounding, int64_t seed, int64_t offset) {
  const c10::DeviceGuard device(w.device());
  return quantize_with([&](const QuantizeParams& p) { cuda::quantize(p, stream_of(w)); }, w, format, group_size, scheme,
                       zero_kind, scale_dtype, perm, rounding, seed, offset);
}

at::Tensor encode_cuda(const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                       const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
                       std::string_view rounding, int64_t seed, int64_t offset) {
  const c10::DeviceGuard device(w.device());
  at::Tensor codes = encode_shape(w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
  encode_with([&](const QuantizeParams& p) { cuda::encode(p, stream_of(w)); }, "encode", codes, w, scales, zeros, offsets, perm,
              format, group_size, rounding, seed, offset);
  return codes;
}

void encode_in_place_cuda(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                          const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format,
                          int64_t group_size, std::string_view rounding, int64_t seed, int64_t offset) {
  const c10::DeviceGuard device(w.device());
  encode_in_place_shape(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
  const at::Tensor target = dense_codes(codes);
  encode_with([&](const QuantizeParams& p) { cuda::encode(p, stream_of(w)); }, "encode_", target, w, scales, zeros, offsets,
              perm, format, group_size, rounding, seed, offset);
  if (!target.is_same(codes)) codes.copy_(target);
}

TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("quantize", quantize_cuda);
  m.impl("encode", encode_cuda);
  m.impl("encode_", encode_in_place_cuda);
}
#endif

// Codes are integers: nothing is recorded. (The not-implemented fallback would skip the step below.)
void encode_in_place_autograd(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales,
                              const OptionalTensor& zeros, const OptionalTensor& offsets, const OptionalTensor& perm,
                              std::string_view format, int64_t group_size, std::string_view rounding, int64_t seed,
                              int64_t offset) {
  at::AutoDispatchBelowAutograd below;
  ops::encode_(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
}

// Autograd learns that codes changed: a backward pass that still needs the old ones is then an error, not a wrong gradient.
void encode_in_place_versioned(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales,
                               const OptionalTensor& zeros, const OptionalTensor& offsets, const OptionalTensor& perm,
                               std::string_view format, int64_t group_size, std::string_view rounding, int64_t seed,
                               int64_t offset) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    ops::encode_(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
  }
  codes.unsafeGetTensorImpl()->bump_version();
}

// ---- registration

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kQuantizeSchema);
  m.def(kEncodeSchema);
  m.def(kEncodeInPlaceSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("quantize", quantize_shape);
  m.impl("encode", encode_shape);
  m.impl("encode_", encode_in_place_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("quantize", quantize_cpu);
  m.impl("encode", encode_cpu);
  m.impl("encode_", encode_in_place_cpu);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("quantize", torch::autograd::autogradNotImplementedFallback());
  m.impl("encode", torch::autograd::autogradNotImplementedFallback());
  m.impl("encode_", encode_in_place_autograd);
}
TORCH_LIBRARY_IMPL(subbyte, ADInplaceOrView, m) { m.impl("encode_", encode_in_place_versioned); }

}  // namespace

QuantizeResult ops::quantize(const at::Tensor& w, std::string_view format, int64_t group_size, std::string_view scheme,
                             std::string_view zero_kind, std::optional<at::ScalarType> scale_dtype, const OptionalTensor& perm,
                             std::string_view rounding, int64_t seed, int64_t offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::quantize", "").typed<decltype(quantize_shape)>();
  return op.call(w, format, group_size, scheme, zero_kind, scale_dtype, perm, rounding, seed, offset);
}

at::Tensor ops::encode(const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                       const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
                       std::string_view rounding, int64_t seed, int64_t offset) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::encode", "").typed<decltype(encode_shape)>();
  return op.call(w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
}

void ops::encode_(const at::Tensor& codes, const at::Tensor& w, const at::Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format, int64_t group_size,
                  std::string_view rounding, int64_t seed, int64_t offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::encode_", "").typed<decltype(encode_in_place_shape)>();
  op.call(codes, w, scales, zeros, offsets, perm, format, group_size, rounding, seed, offset);
}

}  // namespace subbyte
