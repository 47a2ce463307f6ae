#include "subbyte_torch/ops/embedding_rows.h"

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

namespace subbyte {
namespace {

OptionalTensor rows_of_part(const OptionalTensor& part, const at::Tensor& rows) {
  return given(part) ? OptionalTensor(part->index_select(0, rows)) : std::nullopt;
}

}  // namespace

void check_indices(const char* op, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op, ": indices is ",
                    indices.scalar_type(), ", expected int64 or int32");
}

BagMode bag_mode_of(const char* op, std::string_view name) {
  if (name == "sum") return BagMode::kSum;
  if (name == "mean") return BagMode::kMean;
  if (name == "majority") return BagMode::kMajority;
  TORCH_CHECK_VALUE(false, op, ": mode '", name, "' is unknown, expected sum, mean or majority");
}

c10::SymInt check_bags(const char* op, const at::Tensor& indices, const OptionalTensor& bag_offsets, BagMode mode,
                       const OptionalTensor& per_sample_weights) {
  check_indices(op, indices);
  if (given(per_sample_weights)) {
    TORCH_CHECK_VALUE(mode == BagMode::kSum, op, ": per_sample_weights go with mode sum alone");
    TORCH_CHECK_VALUE(per_sample_weights->is_floating_point() && per_sample_weights->sym_sizes() == indices.sym_sizes(), op,
                      ": per_sample_weights is ", per_sample_weights->scalar_type(), " ", per_sample_weights->sym_sizes(),
                      ", expected floating point ", indices.sym_sizes(), " like indices");
  }
  if (!given(bag_offsets)) {
    TORCH_CHECK_VALUE(indices.dim() == 2, op, ": indices has ", indices.dim(),
                      " dimensions, expected [bags, L], or one dimension and bag_offsets");
    return indices.sym_size(0);
  }
  TORCH_CHECK_VALUE(indices.dim() == 1, op, ": indices has ", indices.dim(), " dimensions, expected 1 beside bag_offsets");
  TORCH_CHECK_VALUE(
      bag_offsets->dim() == 1 && (bag_offsets->scalar_type() == at::kLong || bag_offsets->scalar_type() == at::kInt), op,
      ": bag_offsets is ", bag_offsets->scalar_type(), " ", bag_offsets->sym_sizes(), ", expected int64 or int32 [bags]");
  return bag_offsets->sym_size(0);
}

at::Tensor bag_of_positions(const at::Tensor& indices, const OptionalTensor& bag_offsets, const at::Tensor& positions) {
  if (!given(bag_offsets)) return at::div(positions, at::Scalar(indices.sym_size(1)), "floor");
  // The last bag that starts at or before the position: those before it at the same offset are empty.
  return at::searchsorted(bag_offsets->to(at::kLong), positions, /*out_int32=*/false, /*right=*/true).sub(1);
}

at::Tensor inverse_bag_sizes(const at::Tensor& indices, const OptionalTensor& bag_offsets, int64_t bags, int64_t padding_idx) {
  const at::Tensor counted = indices.ne(padding_idx).to(at::kLong);
  at::Tensor sizes;
  if (!given(bag_offsets)) {
    sizes = counted.sum(1);
  } else {
    const at::Tensor positions = at::arange(indices.sym_numel(), indices.options().dtype(at::kLong));
    sizes = at::zeros({bags}, counted.options()).index_add(0, bag_of_positions(indices, bag_offsets, positions), counted);
  }
  const at::Tensor inverse = sizes.clamp_min(1).to(at::kFloat).reciprocal();
  return inverse.masked_fill(sizes.eq(0), 0);
}

TouchedRows touched_rows(const char* op, const at::Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                         const OptionalTensor& bag_offsets, std::optional<BagMode> bag,
                         const OptionalTensor& per_sample_weights) {
  const at::Tensor flat = indices.reshape({-1}).to(at::kLong);
  TouchedRows t;
  if (flat.numel() == 0) {
    t.rows = t.begins = t.ends = t.sources = at::empty({0}, flat.options());
    return t;
  }
  const auto [sorted, order] = at::sort(flat, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto [rows, inverse, counts] = at::unique_consecutive(sorted, /*return_inverse=*/false, /*return_counts=*/true);
  const at::Tensor ends = counts.cumsum(0), bounds = at::stack({rows.select(0, 0), rows.select(0, -1)}).cpu();
  const int64_t first = bounds.select(0, 0).item().toLong(), last = bounds.select(0, 1).item().toLong();
  TORCH_CHECK_INDEX(first >= 0 && last < num_embeddings, op, ": index ", first < 0 ? first : last,
                    " is outside the table, expected 0 <= index < ", num_embeddings);
  t.rows = rows;
  t.begins = ends.sub(counts);
  t.ends = ends;
  if (padding_idx >= first && padding_idx <= last) {
    const at::Tensor kept = at::nonzero(rows.ne(padding_idx)).squeeze(1);
    t.rows = rows.index_select(0, kept);
    t.begins = t.begins.index_select(0, kept);
    t.ends = t.ends.index_select(0, kept);
  }
  t.sources = bag.has_value() ? bag_of_positions(indices, bag_offsets, order) : order;
  if (given(per_sample_weights)) {
    t.factors = per_sample_weights->detach().reshape({-1}).to(at::kFloat).index_select(0, order);
  } else if (bag == BagMode::kMean) {
    const int64_t bags = given(bag_offsets) ? bag_offsets->size(0) : indices.size(0);
    t.factors = inverse_bag_sizes(indices, bag_offsets, bags, padding_idx).index_select(0, t.sources);
  }
  return t;
}

at::Tensor sparse_rows(const at::Tensor& rows, const at::Tensor& values, int64_t height) {
  return at::_sparse_coo_tensor_unsafe(rows.unsqueeze(0), values, {height, values.size(1)},
                                       values.options().layout(at::kSparse), /*is_coalesced=*/true);
}

AffineGradients sparse_affine_gradients(const at::Tensor& rows, const at::Tensor& values, const PackedArgs& w, bool need_scales,
                                        bool need_zeros, bool need_offsets) {
  const at::Tensor codes = w.codes.index_select(0, rows), scales = w.scales.index_select(0, rows);
  const OptionalTensor zeros = rows_of_part(w.zeros, rows), offsets = rows_of_part(w.offsets, rows);
  AffineGradients g = affine_gradients(values, {codes, scales, zeros, offsets, w.perm, w.format, w.in_features, w.group_size},
                                       need_scales, need_zeros, need_offsets);
  for (at::Tensor* part : {&g.scales, &g.zeros, &g.offsets})
    if (part->defined()) *part = sparse_rows(rows, *part, w.codes.size(0));
  return g;
}

}  // namespace subbyte
