// Conversions between the layouts of GPTQ, GBA ("MPQ") and EXL2 ("MBWQ") checkpoints and packed weights. Codes are moved as
// bits, scales and zeros as values; nothing passes through dequantized weights. All take CPU and CUDA tensors, have no
// gradient, and look at the contents of index tensors (a device synchronisation): they run when a model is loaded or saved.
//
//   foreign word matrix  int32 [W, N]      a column is a stream of codes along K (subbyte/ops/column_words/column_words.h)
//   scales, zeros        [Gr, N]           transposed against a packed weight's, one row a group of the file
//   GPTQ zeros           int32 [Gr, words] stream of `bits`-bit fields along N that hold z - zeros_minus modulo 2^bits
//
// A packed weight has one group_size along its stored columns. Groups of different lengths, as EXL2 files and irregular g_idx
// have them, are cut into pieces of their largest common divisor; `parent` [G'] int64 then names the file's group of each
// piece, and the pieces of one group share its scale and zero. Without `parent` piece g is group g.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// int32 words [W, N] -> uint8 codes [N, row_bytes] and back; order int32 [K] or none: column k of the result is column order[k]
// of the source.
at::Tensor columns_to_codes(const at::Tensor& words, std::string_view format, int64_t in_features,
                            const OptionalTensor& order = std::nullopt);
at::Tensor codes_to_columns(const at::Tensor& codes, std::string_view format, int64_t in_features,
                            const OptionalTensor& order = std::nullopt);

// int32 [Gr, ceil(N * bits / 32)] -> int32 [Gr, N]: field + zeros_minus, not wrapped, so that v1's 2^bits - 1 reads as 2^bits.
at::Tensor gptq_unpack_zeros(const at::Tensor& qzeros, int64_t bits, int64_t out_features, int64_t zeros_minus = 1);
// The inverse; floating zeros are rounded to nearest first. ValueError for a zero outside [zeros_minus, 2^bits - 1 +
// zeros_minus] (v1 cannot say 0), unless `wrap`, which stores (z - zeros_minus) modulo 2^bits.
at::Tensor gptq_pack_zeros(const at::Tensor& zeros, int64_t bits, int64_t zeros_minus = 1, bool wrap = false);

// What an import gives; undefined tensors are absent parts.
struct ImportedWeight {
  at::Tensor codes, scales, zeros, offsets, perm, parent;
  std::string format;
  int64_t group_size = 0;
};
// row_groups int64 [K]: the file's group of each row of the word matrix. At most one of zeros (values, "already multiplied by
// the scale": w = q s - zero, becoming offsets = -zeros) and integer_zeros ([Gr, N] in units of codes, becoming zeros); none:
// the format's fixed zero. q_perm [K] or none: row i of the words is input feature q_perm[i] (any integer type; int16 that
// overflowed is put right; all zero means none). sort: rows are put into the order of their groups (stable), which an arbitrary
// g_idx needs. group_size: preferred, where the rows allow any.
// ValueError: shapes, types, a q_perm that is no permutation, a group outside [0, Gr), scales or zeros that are not finite.
ImportedWeight import_columns(const at::Tensor& qweight, std::string_view format, int64_t in_features,
                              const at::Tensor& row_groups, const at::Tensor& scales, const OptionalTensor& zeros,
                              const OptionalTensor& integer_zeros, const OptionalTensor& q_perm, bool sort, int64_t group_size);
// g_idx [K] or none (row k belongs to group k / group_size; with group_size < 1, to k / ceil(K / Gr)); negative entries count
// from the end. qweight int32, or int64 that holds such values.
ImportedWeight gptq_import(const at::Tensor& qweight, const at::Tensor& scales, const OptionalTensor& zeros,
                           const OptionalTensor& qzeros, const OptionalTensor& g_idx, const OptionalTensor& q_perm,
                           int64_t bits, int64_t in_features, int64_t group_size, int64_t zeros_minus = 1);
// q_groups [2 Gr]: pairs (bits, first row of qweight).
ImportedWeight exl2_import(const at::Tensor& qweight, const at::Tensor& q_groups, const at::Tensor& scales,
                           const OptionalTensor& zeros, const OptionalTensor& q_perm, int64_t in_features);
// The same from a group map int16 [2 K] (make_group_map) and `rows`, 6 or 7 integers: where the codes of 8, 6, 5, 4, 3, 2 bits
// end along K.
ImportedWeight exl2_import_map(const at::Tensor& qweight, const at::Tensor& q_group_map, at::IntArrayRef rows,
                               const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& q_perm,
                               int64_t in_features);

struct ExportedWeight {
  at::Tensor qweight;     // int32 [W, N]
  at::Tensor scales;      // [groups, N]
  at::Tensor zeros;       // [groups, N]: integer zeros as values when `asym`, else zeros multiplied by the scale
  at::Tensor row_groups;  // int32 [K]
};
// The way back. input_order: rows of qweight in the order of input features (GPTQ; one width only), else in stored order, which
// perm names (EXL2). Groups of the file that no row belongs to get scale 1 and zero 0 (asym: 1).
ExportedWeight export_columns(SB_PACKED_PARAMS, const OptionalTensor& parent, int64_t groups, bool asym, bool input_order);

// q_groups int16 [2 Gr] of a weight that export_columns wrote in stored order. ValueError when a group is split, or its codes
// do not fill whole words.
at::Tensor q_groups_of(const at::Tensor& row_groups, std::string_view format);
// int16 [2 K]: for each row its group and how many rows of the group are left, this one included. num_qrows: rows of qweight.
at::Tensor make_group_map(const at::Tensor& q_groups, int64_t num_qrows);
// `rows` of a format: ends of the widths 8, 6, 5, 4, 3, 2 along K, then a mask with bit b - 1 set for each width in use.
// ValueError when the widths do not descend.
std::vector<int64_t> rows_of_format(std::string_view format, int64_t in_features);

// Second-level quantization: value = (code - zero) * scale, two operations in the type of `scales`.
// codes uint8 [Gr, ...] with at least N codes a row, the rest padding; zeros and scales [Gr or 1, B, 1], a value for each run
// of dq_group_size columns (B = ceil(N / dq_group_size)) or for each column (B = N). -> [Gr, N]
at::Tensor expand_second_level(const at::Tensor& codes, const at::Tensor& zeros, const at::Tensor& scales, int64_t out_features,
                               int64_t dq_group_size);
// [Gr, N] -> (codes uint8 [Gr, B, dq_group_size], zeros, scales [Gr, B, 1]); per_column: dq_group_size 1 and zeros, scales
// [1, N, 1]. A block that kept_zeros and kept_scales (as a file had them) can say exactly keeps them, so that what was loaded
// is written back byte for byte; other blocks get the range of their values. codes < levels.
std::tuple<at::Tensor, at::Tensor, at::Tensor> requantize_second_level(const at::Tensor& values, int64_t levels,
                                                                       int64_t dq_group_size, bool per_column,
                                                                       const OptionalTensor& kept_zeros = std::nullopt,
                                                                       const OptionalTensor& kept_scales = std::nullopt);
// Statistic bytes: scale code in the high nibble, zero code in the low one.
std::tuple<at::Tensor, at::Tensor> unpack_statistic(const at::Tensor& qstatistic);
at::Tensor pack_statistic(const at::Tensor& scale_codes, const at::Tensor& zero_codes);

}  // namespace subbyte::ops
