// subbyte::columns_to_codes, subbyte::codes_to_columns (subbyte/ops/column_words/column_words.h).
#include "subbyte/ops/column_words/column_words.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/column_words/column_words_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/mpq.h"

namespace subbyte {
namespace {

constexpr const char* kToCodesSchema =
    "columns_to_codes(Tensor words, str format, int in_features, Tensor? order=None) -> Tensor";
constexpr const char* kToColumnsSchema =
    "codes_to_columns(Tensor codes, str format, int in_features, Tensor? order=None) -> Tensor";

void check_order(const char* op, const OptionalTensor& order, int64_t k, const at::Tensor& anchor) {
  if (!given(order)) return;
  TORCH_CHECK_VALUE(order->scalar_type() == at::kInt && order->dim() == 1 && order->sym_size(0) == k, op, ": order is ",
                    order->scalar_type(), " ", order->sym_sizes(), ", expected int32 [K] = [", k, "]");
  check_device(op, "order", *order, "the source", anchor);
}

at::Tensor to_codes_shape(const at::Tensor& words, std::string_view format, int64_t in_features, const OptionalTensor& order) {
  TORCH_CHECK_VALUE(in_features >= 0, "columns_to_codes: in_features is ", in_features, ", expected at least 0");
  const RowLayout layout = layout_of("columns_to_codes", format, in_features);
  const int64_t count = column_word_count(layout);
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt && words.dim() == 2 && words.sym_size(0) == count,
                    "columns_to_codes: words is ", words.scalar_type(), " ", words.sym_sizes(), ", expected int32 [", count,
                    ", N] for ", in_features, " columns of ", format);
  check_order("columns_to_codes", order, in_features, words);
  return at::empty_symint({words.sym_size(1), layout.row_bytes}, words.options().dtype(at::kByte));
}

at::Tensor to_columns_shape(const at::Tensor& codes, std::string_view format, int64_t in_features,
                            const OptionalTensor& order) {
  TORCH_CHECK_VALUE(in_features >= 0, "codes_to_columns: in_features is ", in_features, ", expected at least 0");
  const RowLayout layout = layout_of("codes_to_columns", format, in_features);
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.sym_size(1) == layout.row_bytes,
                    "codes_to_columns: codes is ", codes.scalar_type(), " ", codes.sym_sizes(), ", expected uint8 [N, ",
                    layout.row_bytes, "] for ", in_features, " columns of ", format);
  check_order("codes_to_columns", order, in_features, codes);
  return at::empty_symint({column_word_count(layout), codes.sym_size(0)}, codes.options().dtype(at::kInt));
}

const int32_t* order_data(const at::Tensor& order) { return static_cast<const int32_t*>(data_of(order)); }
at::Tensor order_of(const OptionalTensor& order) { return given(order) ? order->contiguous() : at::Tensor(); }

template <class Run>
at::Tensor to_codes_with(Run run, const at::Tensor& words, std::string_view format, int64_t in_features,
                         const OptionalTensor& order) {
  const at::Tensor out = to_codes_shape(words, format, in_features, order), source = words.contiguous(), o = order_of(order);
  ColumnsToCodesParams p;
  p.layout = layout_of("columns_to_codes", format, in_features);
  p.n = words.size(1);
  p.words = static_cast<const uint32_t*>(data_of(source));
  p.order = order_data(o);
  p.codes = mutable_bytes_of(out);
  translated([&] { run(p); });
  return out;
}

template <class Run>
at::Tensor to_columns_with(Run run, const at::Tensor& codes, std::string_view format, int64_t in_features,
                           const OptionalTensor& order) {
  const at::Tensor out = to_columns_shape(codes, format, in_features, order), source = codes.contiguous(), o = order_of(order);
  CodesToColumnsParams p;
  p.layout = layout_of("codes_to_columns", format, in_features);
  p.n = codes.size(0);
  p.codes = bytes_of(source);
  p.order = order_data(o);
  p.words = static_cast<uint32_t*>(mutable_data_of(out));
  translated([&] { run(p); });
  return out;
}

at::Tensor to_codes_cpu(const at::Tensor& words, std::string_view format, int64_t in_features, const OptionalTensor& order) {
  return to_codes_with([](const ColumnsToCodesParams& p) { columns_to_codes(p); }, words, format, in_features, order);
}

at::Tensor to_columns_cpu(const at::Tensor& codes, std::string_view format, int64_t in_features, const OptionalTensor& order) {
  return to_columns_with([](const CodesToColumnsParams& p) { codes_to_columns(p); }, codes, format, in_features, order);
}

#if SB_CUDA
at::Tensor to_codes_cuda(const at::Tensor& words, std::string_view format, int64_t in_features, const OptionalTensor& order) {
  const c10::DeviceGuard device(words.device());
  return to_codes_with([&](const ColumnsToCodesParams& p) { cuda::columns_to_codes(p, stream_of(words)); }, words, format,
                       in_features, order);
}

at::Tensor to_columns_cuda(const at::Tensor& codes, std::string_view format, int64_t in_features, const OptionalTensor& order) {
  const c10::DeviceGuard device(codes.device());
  return to_columns_with([&](const CodesToColumnsParams& p) { cuda::codes_to_columns(p, stream_of(codes)); }, codes, format,
                         in_features, order);
}

TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("columns_to_codes", to_codes_cuda);
  m.impl("codes_to_columns", to_columns_cuda);
}
#endif

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kToCodesSchema);
  m.def(kToColumnsSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("columns_to_codes", to_codes_shape);
  m.impl("codes_to_columns", to_columns_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("columns_to_codes", to_codes_cpu);
  m.impl("codes_to_columns", to_columns_cpu);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("columns_to_codes", torch::autograd::autogradNotImplementedFallback());
  m.impl("codes_to_columns", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

at::Tensor ops::columns_to_codes(const at::Tensor& words, std::string_view format, int64_t in_features,
                                 const OptionalTensor& order) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::columns_to_codes", "").typed<decltype(to_codes_shape)>();
  return op.call(words, format, in_features, order);
}

at::Tensor ops::codes_to_columns(const at::Tensor& codes, std::string_view format, int64_t in_features,
                                 const OptionalTensor& order) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::codes_to_columns", "").typed<decltype(to_columns_shape)>();
  return op.call(codes, format, in_features, order);
}

}  // namespace subbyte
