// Recorded forms of the linear ops: what their Autograd kernels call when a gradient is wanted. linear and linear_a8 share one
// gradient (straight-through), and that gradient is recorded again, so second derivatives are right too.
#pragma once
#include <optional>
#include <string_view>

#include "subbyte_torch/packed_args.h"

namespace subbyte {

// linear, or linear_a8 when x_scale is given.
at::Tensor recorded_linear(const at::Tensor& x, const OptionalTensor& weight, SB_PACKED_PARAMS, const OptionalTensor& bias,
                           std::optional<std::string_view> x_scale);
// linear_grad_input of a weight whose handle is known. Goes straight through when nothing needs a gradient.
at::Tensor recorded_linear_grad_input(const at::Tensor& gy, const OptionalTensor& weight, SB_PACKED_PARAMS);

}  // namespace subbyte
