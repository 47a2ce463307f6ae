// packed_adamw_, packed_sign_, packed_sgd_: one optimizer step on a packed weight in place, formulas and state layouts in
// subbyte/ops/packed_update/packed_update.h. No gradient. Versions of all written tensors are bumped.
//
//   grad         floating point [N, K]
//   m, v         float32 or bfloat16 [N, K]; or uint8 [N, K] (8 bits) or [N, ceil(K / 2)] (4 bits; one column: always 8 bits)
//   with
//                absmax float32 [N, ceil(K / 256)]; all in stored column order. Zeros at the start.
//   grad_factor  float32, one element, or none
//   numbers      float32 [3] (lr, bias_correction1, bias_correction2) instead of the arguments, or none
//   counter      int64, one element, added to offset, or none
//   residual     uint8 [N, ceil(K * residual_bits / 8)] with residual_bits > 0, or none
// All on the device of codes.
#pragma once
#include "subbyte_torch/packed_args.h"

#define SB_UPDATE_TAIL_PARAMS                                                                                                  \
  int64_t seed, int64_t offset, bool maximize, const subbyte::OptionalTensor &grad_factor,                                     \
      const subbyte::OptionalTensor &numbers, const subbyte::OptionalTensor &counter, const subbyte::OptionalTensor &residual, \
      int64_t residual_bits

namespace subbyte::ops {

void packed_adamw_(SB_PACKED_PARAMS, const at::Tensor& grad, const at::Tensor& m, const OptionalTensor& m_absmax,
                   const at::Tensor& v, const OptionalTensor& v_absmax, double lr, double beta1, double beta2, double eps,
                   double weight_decay, double bias_correction1, double bias_correction2, SB_UPDATE_TAIL_PARAMS);
void packed_sign_(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax, double lr,
                  double beta1, double beta2, double threshold, double weight_decay, SB_UPDATE_TAIL_PARAMS);
void packed_sgd_(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax, double lr,
                 double momentum, double dampening, bool nesterov, double weight_decay, SB_UPDATE_TAIL_PARAMS);

}  // namespace subbyte::ops
