// Look-ups in packed tables, their gradients on the touched rows alone, and updates of those rows.
// V rows, D columns. A row is touched when an index that is not padding_idx names it. Costs grow with look-ups and touched
// rows, never with V, except where a dense gradient is asked for.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// indices int64 or int32 [...] -> rows [..., D] in `dtype` (the scales' when none). padding_idx < 0: none; its row is looked
// up, but gets no gradient. `weight`, float [V, D], receives the gradient: dense, or with `sparse` a coalesced sparse COO
// tensor of the touched rows (those of scales, zeros and offsets are then sparse too). Dense gradients are differentiable again
// and compile; sparse ones, as PyTorch's own, are for eager mode. An index outside the table: c10::IndexError on the CPU; on
// CUDA, where nothing is waited for, a row of NaN, and IndexError from the gradient.
at::Tensor embedding(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx = -1,
                     bool sparse = false, std::optional<at::ScalarType> dtype = std::nullopt);
// gy [..., D], indices [...] -> dense [num_embeddings, D].
at::Tensor embedding_grad_weight(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                 int64_t padding_idx = -1);

// A[v, :] = sum of f gy over the look-ups of v, in float32 (float64 for float64 gy), in the order of their position:
// (rows int64 [T], sorted; values [T, D] of gy's dtype). Without `bag`, gy is [..., D] and f = 1. With `bag`, gy is [bags, D],
// indices and bag_offsets are as in embedding_bag, and f = per_sample_weights or 1 (sum), 1 / L in float32 (mean), 1 (majority:
// straight-through). T depends on the data, so CUDA waits for the device once or twice. IndexError for an index outside the
// table on every device. gy is only read. No gradient of its own.
std::tuple<at::Tensor, at::Tensor> embedding_grad_rows(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                                       int64_t padding_idx = -1,
                                                       const OptionalTensor& bag_offsets = std::nullopt,
                                                       std::optional<std::string_view> bag = std::nullopt,
                                                       const OptionalTensor& per_sample_weights = std::nullopt);
// The same as signs: (rows, sign_bits uint8 [T, ceil(D / 8)]), bit d % 8 of byte d / 8 = 1 where scales[v] A[v, d] >= 0, spare
// bits 0. scales: float, one a row of the table ([V] or [V, 1]), or none. Formula and rounding: embedding_grad.h.
std::tuple<at::Tensor, at::Tensor> embedding_grad_packed(const at::Tensor& gy, const at::Tensor& indices,
                                                         const OptionalTensor& scales, int64_t num_embeddings,
                                                         int64_t padding_idx = -1,
                                                         const OptionalTensor& bag_offsets = std::nullopt,
                                                         std::optional<std::string_view> bag = std::nullopt,
                                                         const OptionalTensor& per_sample_weights = std::nullopt);

// Moves bits of codes uint8 [V, ceil(D / 8)] (format sign) in rows int64 [T], strictly increasing, against sign_bits [T, ...]:
// rule "descent", "xor" or "momentum", as embedding_update.h defines them. mask: uint8 like sign_bits. momentum: float32 or
// int8 [S, D], and slots int64 [T] (none: slot i is i). On CUDA a row or slot outside is left out.
void embedding_update_(const at::Tensor& codes, const at::Tensor& rows, const at::Tensor& sign_bits, int64_t embedding_dim,
                       std::string_view rule = "descent", const OptionalTensor& mask = std::nullopt,
                       const OptionalTensor& momentum = std::nullopt, const OptionalTensor& slots = std::nullopt,
                       double lr = 1.0, double beta = 0.99, int64_t seed = 0, int64_t offset = 0);
// W[rows[i], :] += alpha * values[i, :] for a table of any format: the touched rows are decoded, added in float32 and encoded
// again on the scales they have, by default with stochastic rounding (unbiased: steps below one level are not lost). Random
// bits are counted over the T rows given: seed and offset choose them. rows distinct; IndexError when one is outside (CUDA
// waits for it).
void embedding_add_(SB_PACKED_PARAMS, const at::Tensor& rows, const at::Tensor& values, double alpha = 1.0,
                    std::string_view rounding = "stochastic", int64_t seed = 0, int64_t offset = 0);

// Bags of look-ups: indices [B, L], or [count] with bag_offsets int64 or int32 [bags] -> [bags, D] in `dtype` (the scales' when
// none). mode "sum" (with per_sample_weights like indices, or without), "mean", "majority" (format sign: +1 where at least half
// of the bits are 1, else -1). Look-ups of padding_idx are left out, a bag without look-ups gives 0: embedding_bag.h.
// Gradients: weight (dense or `sparse`; majority: straight-through), scales, zeros, offsets (sum and mean), per_sample_weights.
at::Tensor embedding_bag(const at::Tensor& indices, const OptionalTensor& bag_offsets, const OptionalTensor& weight,
                         SB_PACKED_PARAMS, std::string_view mode = "sum",
                         const OptionalTensor& per_sample_weights = std::nullopt, int64_t padding_idx = -1, bool sparse = false,
                         std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace subbyte::ops
