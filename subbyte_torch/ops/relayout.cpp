// subbyte::relayout (subbyte/io/foreign_layout.h): packed sign or 4-bit weights between foreign layouts and canonical rows.
// Done once when a file is loaded: device tensors travel through the host, which waits for them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "subbyte/io/foreign_layout.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/relayout.h"

namespace subbyte {
namespace {

constexpr const char* kSchema =
    "relayout(Tensor codes, str from_layout, str to_layout, int n, int k, int? missing=None) -> Tensor";

ForeignLayout layout_named(std::string_view name) {
  return translated([&] { return foreign_layout_of(name); });
}

// Canonical and q4 rows have a shape; the others are one vector of bytes.
at::Tensor relayout_shape(const at::Tensor& codes, std::string_view from_layout, std::string_view to_layout, int64_t n,
                          int64_t k, std::optional<int64_t> missing) {
  const ForeignLayout from = layout_named(from_layout), to = layout_named(to_layout);
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte || codes.scalar_type() == at::kChar, "relayout: codes is ",
                    codes.scalar_type(), ", expected uint8 or int8");
  TORCH_CHECK_VALUE(n >= 0 && k >= 0, "relayout: n is ", n, " and k is ", k, ", expected at least 0");
  const int64_t bytes = foreign_layout_bytes(from, n, k);
  TORCH_CHECK_VALUE(codes.sym_numel() == bytes, "relayout: codes has ", codes.sym_numel(), " bytes, expected ", bytes, " for ",
                    from_layout, " of n = ", n, ", k = ", k);
  TORCH_CHECK_VALUE(!missing.has_value() || *missing == 0 || *missing == 1, "relayout: missing is ", *missing,
                    ", expected 0 or 1");
  const auto options = codes.options().dtype(at::kByte).requires_grad(std::nullopt);
  const bool rows =
      to == ForeignLayout::kSign || to == ForeignLayout::kPack8 || to == ForeignLayout::kUint4 || to == ForeignLayout::kQ4;
  if (rows) return at::empty({n, n > 0 ? foreign_layout_bytes(to, n, k) / n : foreign_layout_bytes(to, 1, k)}, options);
  return at::empty({foreign_layout_bytes(to, n, k)}, options);
}

at::Tensor relayout_cpu(const at::Tensor& codes, std::string_view from_layout, std::string_view to_layout, int64_t n, int64_t k,
                        std::optional<int64_t> missing) {
  at::Tensor out = relayout_shape(codes, from_layout, to_layout, n, k, missing);
  const at::Tensor bytes = codes.contiguous().view(at::kByte);
  RelayoutParams p;
  p.from = layout_named(from_layout);
  p.to = layout_named(to_layout);
  p.in = bytes_of(bytes);
  p.in_bytes = bytes.numel();
  p.out = mutable_bytes_of(out);
  p.out_bytes = out.numel();
  p.n = n;
  p.k = k;
  if (missing.has_value()) p.missing = int(*missing);
  translated([&] { relayout(p); });
  return out;
}

#if SB_CUDA
at::Tensor relayout_cuda(const at::Tensor& codes, std::string_view from_layout, std::string_view to_layout, int64_t n,
                         int64_t k, std::optional<int64_t> missing) {
  return relayout_cpu(codes.cpu(), from_layout, to_layout, n, k, missing).to(codes.device());
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("relayout", relayout_cuda); }
#endif

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("relayout", relayout_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("relayout", relayout_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("relayout", torch::autograd::autogradNotImplementedFallback()); }

}  // namespace

at::Tensor ops::relayout(const at::Tensor& codes, std::string_view from_layout, std::string_view to_layout, int64_t n,
                         int64_t k, std::optional<int64_t> missing) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::relayout", "").typed<decltype(relayout_shape)>();
  return op.call(codes, from_layout, to_layout, n, k, missing);
}

}  // namespace subbyte
