// Gradients of the affine parameters, for ops that know the dense gradient of the weight.
#pragma once
#include <tuple>

#include "subbyte_torch/packed_args.h"

namespace subbyte {

// gw [N, K], gradient of the dense weight in input-feature order. With w = s (q - z) or s q + o, summed over each group in
// float32:
//   d/ds = sum gw (q - z), or sum gw q with offsets;   d/dz = -s sum gw;   d/do = sum gw
// Those not asked for are undefined. Composed of differentiable ops.
struct AffineGradients {
  at::Tensor scales, zeros, offsets;
};
AffineGradients affine_gradients(const at::Tensor& gw, const PackedArgs& w, bool need_scales, bool need_zeros,
                                 bool need_offsets);

// [N, K] in stored column order -> [N, G], each group summed; K > 0.
at::Tensor group_sums(const at::Tensor& t, int64_t k, int64_t group_size);

// The same sums in float32 before they are divided among the parts: d/ds, and sum gw, the gradient of a shift of the group's
// values. K > 0; composed of differentiable ops.
struct AffineSums {
  at::Tensor scales, shift;
};
AffineSums affine_sums(const at::Tensor& gw, const PackedArgs& w, bool need_scales, bool need_shift);

}  // namespace subbyte
