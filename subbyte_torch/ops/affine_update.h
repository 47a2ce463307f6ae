// Scales, zeros and offsets of a packed weight that train with its codes: by their own gradient, or chosen anew around a step.
//
// affine_adamw_: torch.optim.AdamW (no decay) on the affine parameters of every group, float32. With the dense gradient G of
// the weight (times *grad_factor; maximize: negated; elements with |G| >= 2^63, NaN and infinite ones count as 0), over a group
//   gs = sum G (q - z), or sum G q with offsets          ga = sum G          (the shift a = offset, or -s z)
//   m <- m + (1 - beta1)(g - m);   v <- beta2 v + (1 - beta2) g^2;   r = m / (sqrt(v / bias_correction2) + eps)
//   s <- s - min(|e|, |s| / 2) sign(e),   e = (2 lr / (levels - 1)) / bias_correction1 * r
//   o <- o - lr / bias_correction1 * r;   z <- z + lr / bias_correction1 * r / s        with s before the step
//   The rate of s moves the outermost code about as far as lr moves a weight. A scale keeps its sign and never vanishes. Groups
//   whose elements are all left out, or whose |scale| is below 2^-120 or not finite, keep everything.
//   Codes are read: call it before the op that steps them. Scales of 16 bits are rounded copies of float32 ones in the state.
//   state  float32 [N, G, P], of affine_state: m and v of s; m and v of the shift (zeros or offsets); 16-bit parts: s, then the
//          zero or offset, in float32. A part that no longer is the rounded state (a checkpoint was loaded) is taken as it is.
//   numbers (float32 [3]: lr, bias_correction1, bias_correction2) replaces the arguments, as in packed_update.h.
//
// widen, regrid_: a step with a grid chosen anew. widen gives codes and residual (8 bits) of the same values on 64 times as
// fine a grid with room of at least 384 levels on either side, format "uint8" with zeros; a packed_*_ op steps those, unclamped
// but for that room, and regrid_ chooses scales and zeros or offsets of the stepped values (`scheme`, as quantize) and encodes
// them with stochastic rounding. A group of scale 0 keeps its value.
//
// Any format, mixed width, zero kind, perm, device; no gradient. Dense float32 exists for 2^20 elements at a time.
#pragma once
#include <tuple>

#include "subbyte_torch/packed_args.h"

namespace subbyte::ops {

at::Tensor affine_state(SB_PACKED_PARAMS);
void affine_adamw_(SB_PACKED_PARAMS, const at::Tensor& grad, const at::Tensor& state, double lr, double beta1, double beta2,
                   double eps, double bias_correction1, double bias_correction2, bool maximize,
                   const OptionalTensor& grad_factor, const OptionalTensor& numbers);
// (codes, residual, scales, zeros)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> widen(SB_PACKED_PARAMS);
void regrid_(SB_PACKED_PARAMS, const at::Tensor& wide_codes, const at::Tensor& wide_residual, std::string_view scheme,
             int64_t seed, int64_t offset);

}  // namespace subbyte::ops
