// Look-ups grouped by the row they name, and gradients of touched rows as sparse tensors. Shared by the embedding ops.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "subbyte/ops/embedding_bag/embedding_bag.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/packed_args.h"

namespace subbyte {

void check_indices(const char* op, const at::Tensor& indices);
// "sum", "mean", "majority"; anything else is a ValueError.
BagMode bag_mode_of(const char* op, std::string_view name);
// Indices, offsets and weights of bags; the number of bags. Needs no data.
c10::SymInt check_bags(const char* op, const at::Tensor& indices, const OptionalTensor& bag_offsets, BagMode mode,
                       const OptionalTensor& per_sample_weights);

// For every position of the flattened indices (or only those in `positions`): its bag.
at::Tensor bag_of_positions(const at::Tensor& indices, const OptionalTensor& bag_offsets, const at::Tensor& positions);
// float32 [bags]: 1 / L, L = look-ups of the bag that are not padding_idx; 0 for an empty bag.
at::Tensor inverse_bag_sizes(const at::Tensor& indices, const OptionalTensor& bag_offsets, int64_t bags, int64_t padding_idx);

// The arrays of embedding_grad (embedding_grad.h) and the touched rows, sorted; all int64, factors float32 or undefined.
struct TouchedRows {
  at::Tensor rows, begins, ends, sources, factors;
};
TouchedRows touched_rows(const char* op, const at::Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                         const OptionalTensor& bag_offsets, std::optional<BagMode> bag,
                         const OptionalTensor& per_sample_weights);

// [height, values.size(1)] with the given rows, coalesced.
at::Tensor sparse_rows(const at::Tensor& rows, const at::Tensor& values, int64_t height);
// affine_gradients of the touched rows as sparse tensors. `values` is their gradient in input-feature order.
AffineGradients sparse_affine_gradients(const at::Tensor& rows, const at::Tensor& values, const PackedArgs& w, bool need_scales,
                                        bool need_zeros, bool need_offsets);

}  // namespace subbyte
