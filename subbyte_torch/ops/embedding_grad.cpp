// subbyte::embedding_grad_rows and subbyte::embedding_grad_packed (subbyte/ops/embedding_grad/embedding_grad.h). How many rows
// come out depends on the indices: there is no shape rule in C++, and the fake kernels stand in the Python package.
#include "subbyte/ops/embedding_grad/embedding_grad.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/embedding_grad/embedding_grad_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/embedding.h"
#include "subbyte_torch/ops/embedding_rows.h"

namespace subbyte {
namespace {

using RowsAndGradient = std::tuple<at::Tensor, at::Tensor>;

#define SB_BAG_SCHEMA "Tensor? bag_offsets=None, str? bag=None, Tensor? per_sample_weights=None"
constexpr const char* kRowsSchema =
    "embedding_grad_rows(Tensor gy, Tensor indices, int num_embeddings, int padding_idx=-1, " SB_BAG_SCHEMA
    ") -> (Tensor rows, Tensor values)";
constexpr const char* kPackedSchema =
    "embedding_grad_packed(Tensor gy, Tensor indices, Tensor? scales, int num_embeddings, int padding_idx=-1, " SB_BAG_SCHEMA
    ") -> (Tensor rows, Tensor sign_bits)";

std::optional<BagMode> check_arguments(const char* op, const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                       const OptionalTensor& bag_offsets, std::optional<std::string_view> bag,
                                       const OptionalTensor& per_sample_weights) {
  check_indices(op, indices);
  check_device(op, "indices", indices, "gy", gy);
  dtype_of(op, "gy", gy.scalar_type());
  TORCH_CHECK_VALUE(num_embeddings >= 0, op, ": num_embeddings is ", num_embeddings, ", expected at least 0");
  if (!bag.has_value()) {
    TORCH_CHECK_VALUE(!given(bag_offsets) && !given(per_sample_weights), op,
                      ": bag_offsets and per_sample_weights go with bag, which is None");
    TORCH_CHECK_VALUE(gy.dim() == indices.dim() + 1 && gy.sizes().slice(0, indices.dim()) == indices.sizes(), op, ": gy is ",
                      gy.sizes(), ", indices is ", indices.sizes(), ", expected the same leading dimensions and one more");
    return std::nullopt;
  }
  const BagMode mode = bag_mode_of(op, *bag);
  const c10::SymInt bags = check_bags(op, indices, bag_offsets, mode, per_sample_weights);
  TORCH_CHECK_VALUE(gy.dim() == 2 && gy.sym_size(0) == bags, op, ": gy is ", gy.sizes(), ", expected [", bags, ", D]");
  for (const OptionalTensor* t : {&bag_offsets, &per_sample_weights})
    if (given(*t)) check_device(op, t == &bag_offsets ? "bag_offsets" : "per_sample_weights", **t, "gy", gy);
  return mode;
}

struct Output {
  bool packed;
  OptionalTensor scales;
};

template <class Run>
RowsAndGradient grad_with(Run run, const char* op, const Output& output, const at::Tensor& gy, const at::Tensor& indices,
                          int64_t num_embeddings, int64_t padding_idx, const OptionalTensor& bag_offsets,
                          std::optional<std::string_view> bag, const OptionalTensor& per_sample_weights) {
  const std::optional<BagMode> mode = check_arguments(op, gy, indices, num_embeddings, bag_offsets, bag, per_sample_weights);
  if (given(output.scales)) {
    const at::Tensor& scales = *output.scales;
    TORCH_CHECK_VALUE(
        scales.is_floating_point() && scales.numel() == num_embeddings && scales.dim() >= 1 && scales.size(0) == num_embeddings,
        op, ": scales is ", scales.scalar_type(), " ", scales.sizes(), ", expected floating point [", num_embeddings, "] or [",
        num_embeddings, ", 1]");
    check_device(op, "scales", scales, "gy", gy);
  }
  const TouchedRows touched = touched_rows(op, indices, num_embeddings, padding_idx, bag_offsets, mode, per_sample_weights);
  const int64_t k = gy.size(-1), rows = touched.rows.size(0);
  const at::Tensor source = gy.dim() == 1 ? gy.unsqueeze(0) : gy;
  const Rows g = rows_of(op, "gy", source);
  const at::Tensor begins = touched.begins.contiguous(), ends = touched.ends.contiguous(),
                   sources = touched.sources.contiguous();
  at::Tensor scales, result;
  EmbeddingGradParams p;
  p.gy = g.data();
  p.gy_dtype = g.dtype;
  p.gy_rows = g.m;
  p.gy_stride = g.stride;
  p.k = k;
  p.sources = static_cast<const int64_t*>(data_of(sources));
  p.factors = static_cast<const float*>(data_of(touched.factors));
  p.count = sources.numel();
  p.begins = static_cast<const int64_t*>(data_of(begins));
  p.ends = static_cast<const int64_t*>(data_of(ends));
  p.rows = rows;
  if (output.packed) {
    result = at::empty({rows, p.sign_bytes()}, gy.options().dtype(at::kByte).requires_grad(std::nullopt));
    p.sign_bits = mutable_bytes_of(result);
    if (given(output.scales)) {
      scales = output.scales->detach().reshape({-1}).index_select(0, touched.rows).to(at::kFloat);
      p.scales = static_cast<const float*>(data_of(scales));
    }
  } else {
    result = at::empty({rows, k}, gy.options().requires_grad(std::nullopt));
    p.values = mutable_data_of(result);
    p.values_stride = k;
  }
  translated([&] { run(p); });
  return {touched.rows, result};
}

RowsAndGradient rows_cpu(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                         const OptionalTensor& bag_offsets, std::optional<std::string_view> bag,
                         const OptionalTensor& per_sample_weights) {
  return grad_with([](const EmbeddingGradParams& p) { embedding_grad(p); }, "embedding_grad_rows", {false, std::nullopt}, gy,
                   indices, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

RowsAndGradient packed_cpu(const at::Tensor& gy, const at::Tensor& indices, const OptionalTensor& scales,
                           int64_t num_embeddings, int64_t padding_idx, const OptionalTensor& bag_offsets,
                           std::optional<std::string_view> bag, const OptionalTensor& per_sample_weights) {
  return grad_with([](const EmbeddingGradParams& p) { embedding_grad(p); }, "embedding_grad_packed", {true, scales}, gy,
                   indices, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

#if SB_CUDA
RowsAndGradient rows_cuda(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                          const OptionalTensor& bag_offsets, std::optional<std::string_view> bag,
                          const OptionalTensor& per_sample_weights) {
  const c10::DeviceGuard device(gy.device());
  return grad_with([&](const EmbeddingGradParams& p) { cuda::embedding_grad(p, stream_of(gy)); }, "embedding_grad_rows",
                   {false, std::nullopt}, gy, indices, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

RowsAndGradient packed_cuda(const at::Tensor& gy, const at::Tensor& indices, const OptionalTensor& scales,
                            int64_t num_embeddings, int64_t padding_idx, const OptionalTensor& bag_offsets,
                            std::optional<std::string_view> bag, const OptionalTensor& per_sample_weights) {
  const c10::DeviceGuard device(gy.device());
  return grad_with([&](const EmbeddingGradParams& p) { cuda::embedding_grad(p, stream_of(gy)); }, "embedding_grad_packed",
                   {true, scales}, gy, indices, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("embedding_grad_rows", rows_cuda);
  m.impl("embedding_grad_packed", packed_cuda);
}
#endif

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kRowsSchema, {at::Tag::dynamic_output_shape});
  m.def(kPackedSchema, {at::Tag::dynamic_output_shape});
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("embedding_grad_rows", rows_cpu);
  m.impl("embedding_grad_packed", packed_cpu);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("embedding_grad_rows", torch::autograd::autogradNotImplementedFallback());
  m.impl("embedding_grad_packed", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace

RowsAndGradient ops::embedding_grad_rows(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                         int64_t padding_idx, const OptionalTensor& bag_offsets,
                                         std::optional<std::string_view> bag, const OptionalTensor& per_sample_weights) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding_grad_rows", "").typed<decltype(rows_cpu)>();
  return op.call(gy, indices, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

RowsAndGradient ops::embedding_grad_packed(const at::Tensor& gy, const at::Tensor& indices, const OptionalTensor& scales,
                                           int64_t num_embeddings, int64_t padding_idx, const OptionalTensor& bag_offsets,
                                           std::optional<std::string_view> bag, const OptionalTensor& per_sample_weights) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding_grad_packed", "").typed<decltype(packed_cpu)>();
  return op.call(gy, indices, scales, num_embeddings, padding_idx, bag_offsets, bag, per_sample_weights);
}

}  // namespace subbyte
