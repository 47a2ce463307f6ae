// subbyte::dequantize_fine, subbyte::encode_fine_: a weight with a residual plane of r bits
// (subbyte/ops/packed_update/packed_update.h) read and written at its full precision. Codes and residual together are a weight
// of b + r bits,
//   q = codes * 2^r + residual,   scale / 2^r,   zero * 2^r + (2^r - 1) / 2   (offset - scale (1 - 2^-r) / 2 with offsets),
// and dequantize and encode of that weight do the work; float32 grids whatever the type of the scales. Composed of operations
// that serve every device, gradients and shapes included.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "subbyte/formats/format.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/fine_grid.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

#define SB_RESIDUAL_SCHEMA "Tensor residual, int residual_bits"
constexpr const char* kDequantizeSchema =
    "dequantize_fine(" SB_PACKED_SCHEMA ", " SB_RESIDUAL_SCHEMA ", ScalarType? dtype=None) -> Tensor";
constexpr const char* kEncodeSchema =
    "encode_fine_(Tensor(a!) codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, str format, int in_features, "
    "int "
    "group_size, Tensor(b!) residual, int residual_bits, Tensor w, str rounding=\"nearest\", int seed=0, int offset=0) -> ()";

// The weight of b + r bits. Only its codes are missing.
struct FineGrid {
  RowLayout coarse;
  std::string format, residual_format;
  at::Tensor scales;
  OptionalTensor zeros, offsets;
};

FineGrid fine_grid(const char* op, const PackedArgs& w, const at::Tensor& residual, int64_t r) {
  check_packed(op, w);
  FineGrid out;
  out.coarse = layout_of(op, w.format, w.in_features);
  const int widest = out.coarse.max_bits();
  TORCH_CHECK_VALUE(r >= 1 && r + widest <= 8, op, ": residual_bits is ", r, ", expected 1 to ", 8 - widest,
                    " beside codes of ", widest, " bits");
  out.residual_format = format_name(format_from_bits(int(r)));
  const c10::SymInt n = w.codes.sym_size(0), bytes = row_bytes_of(op, out.residual_format, w.in_features);
  TORCH_CHECK_VALUE(
      residual.scalar_type() == at::kByte && residual.dim() == 2 && residual.sym_size(0) == n && residual.sym_size(1) == bytes,
      op, ": residual is ", residual.scalar_type(), " ", residual.sym_sizes(), ", expected uint8 [", n, ", ", bytes, "] for ",
      w.in_features, " columns of ", r, " bits");
  RowLayout fine = out.coarse;
  for (int i = 0; i < fine.segment_count; ++i)
    fine.segments[i].format = format_from_bits(format_bits(fine.segments[i].format) + int(r));
  out.format = fine.name();
  const double span = double(1 << r), middle = (span - 1) / 2;
  const at::Tensor scales = w.scales.to(at::kFloat);
  out.scales = scales / span;
  if (given(w.offsets)) {
    out.offsets = w.offsets->to(at::kFloat) - scales * (middle / span);
  } else if (given(w.zeros)) {
    out.zeros = w.zeros->to(at::kFloat) * span + middle;
  } else {
    at::Tensor zeros = at::empty_symint(scales.sym_sizes(), scales.options().requires_grad(std::nullopt));
    for (int i = 0; i < fine.segment_count; ++i) {  // a group has one width
      const Segment& s = out.coarse.segments[i];
      const int64_t begin = ceil_div(s.k_begin, w.group_size), end = ceil_div(s.k_begin + s.k_count, w.group_size);
      zeros.narrow(1, begin, end - begin).fill_(double(format_fixed_zero(s.format)) * span + middle);
    }
    out.zeros = zeros;
  }
  return out;
}

at::Tensor dequantize_fine(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits,
                           std::optional<at::ScalarType> dtype) {
  const FineGrid fine = fine_grid("dequantize_fine", {SB_PACKED}, residual, residual_bits);
  const at::Tensor q = ops::unpack(codes, format, in_features)
                           .bitwise_left_shift(residual_bits)
                           .bitwise_or_(ops::unpack(residual, fine.residual_format, in_features));
  return ops::dequantize(ops::pack(q, fine.format), fine.scales, fine.zeros, fine.offsets, perm, fine.format, in_features,
                         group_size, dtype.value_or(scales.scalar_type()));
}

void encode_fine_(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits, const at::Tensor& w,
                  std::string_view rounding, int64_t seed, int64_t offset) {
  const FineGrid fine = fine_grid("encode_fine_", {SB_PACKED}, residual, residual_bits);
  TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) == codes.sym_size(0) && w.sym_size(1) == in_features, "encode_fine_: w is ",
                    w.sym_sizes(), ", expected [N, K] = [", codes.sym_size(0), ", ", in_features, "]");
  at::Tensor q = ops::unpack(
      ops::encode(w.detach(), fine.scales, fine.zeros, fine.offsets, perm, fine.format, group_size, rounding, seed, offset),
      fine.format, in_features);
  for (int i = 0; i < fine.coarse.segment_count; ++i) {  // ternary has fewer levels than its bits
    const Segment& s = fine.coarse.segments[i];
    if (const int levels = format_levels(s.format); levels < 1 << format_bits(s.format))
      q.narrow(1, s.k_begin, s.k_count).clamp_max_((levels << residual_bits) - 1);
  }
  residual.copy_(ops::pack(q.bitwise_and((1 << residual_bits) - 1), fine.residual_format));
  codes.copy_(ops::pack(q.bitwise_right_shift_(residual_bits), format));
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kDequantizeSchema);
  m.def(kEncodeSchema);
}
TORCH_LIBRARY_IMPL(subbyte, CompositeImplicitAutograd, m) {
  m.impl("dequantize_fine", dequantize_fine);
  m.impl("encode_fine_", encode_fine_);
}

}  // namespace

at::Tensor ops::dequantize_fine(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits,
                                std::optional<at::ScalarType> dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("subbyte::dequantize_fine", "")
                             .typed<decltype(subbyte::dequantize_fine)>();
  return op.call(SB_PACKED, residual, residual_bits, dtype);
}

void ops::encode_fine_(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits, const at::Tensor& w,
                       std::string_view rounding, int64_t seed, int64_t offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::encode_fine_", "").typed<decltype(subbyte::encode_fine_)>();
  op.call(SB_PACKED, residual, residual_bits, w, rounding, seed, offset);
}

}  // namespace subbyte
