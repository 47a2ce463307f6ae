// Operations on a packed weight that has a residual plane (subbyte/ops/packed_update/packed_update.h).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

// A weight with a residual plane, uint8 [N, stream_bytes(K, residual_bits)], at its full precision: the dense values of codes
// and residual together, and both of them from dense values, on the scales that are kept (fine_grid.cpp).
at::Tensor dequantize_fine(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits,
                           std::optional<at::ScalarType> dtype = std::nullopt);
void encode_fine_(SB_PACKED_PARAMS, const at::Tensor& residual, int64_t residual_bits, const at::Tensor& w,
                  std::string_view rounding = "nearest", int64_t seed = 0, int64_t offset = 0);

}  // namespace subbyte::ops
