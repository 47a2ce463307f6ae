#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace subbyte::ops {

// Packed sign or 4-bit weights of a matrix [n, k] from one layout of subbyte/io/foreign_layout.h to another of the same width:
// "sign", "pack8", "cpp_col", "bstc", "bstc_truncated", "btc", "conv_cpp", "conv_cutlass"; "uint4", "q4", "q4_conv". uint8;
// [n, bytes of a row] for sign, pack8, uint4 and q4, else a vector. Input of any shape, uint8 or int8. `missing` (0 or 1)
// stands for elements that a truncated buffer lacks; without it they are an error. No gradient.
at::Tensor relayout(const at::Tensor& codes, std::string_view from_layout, std::string_view to_layout, int64_t n, int64_t k,
                    std::optional<int64_t> missing = std::nullopt);

}  // namespace subbyte::ops
