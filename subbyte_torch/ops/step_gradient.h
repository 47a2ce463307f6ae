// Learned step size quantization (LSQ, Esser et al. 2020), the gradient half, for every op that quantizes on a learned step.
//
// With s = max(step, eps), u = v / s (float32), lo = -2^(bits-1), hi = 2^(bits-1) - 1, q = clamp(rint(u), lo, hi), v^ = s q,
// and g the gradient of the loss to v^:
//   to v      1[lo <= u <= hi] g                                            both ends inside
//   to step   1 / sqrt(numel(v) hi) * sum d(u) g       d(u) = lo where u < lo, hi where u > hi, else q - u
// The step's gradient takes the unmasked g, and passes through max(step, eps), so that a step below eps can grow again.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "subbyte_torch/packed_args.h"

namespace subbyte {

struct StepRule {
  int64_t bits;
  double eps;
};

// The type in which gradients of an op on x are formed: float64 for float64, else float32.
at::ScalarType gradient_type(const at::Tensor& x);

// v^ in `type`.
at::Tensor on_step(const at::Tensor& v, const at::Tensor& step, const StepRule& rule, at::ScalarType type);

struct StepGradients {
  at::Tensor value;  // of v's shape and g's dtype
  at::Tensor step;   // of step's shape and dtype
};
// mask = false leaves `value` unmasked.
StepGradients step_gradients(const at::Tensor& v, const at::Tensor& step, const at::Tensor& g, const StepRule& rule,
                             bool need_value, bool need_step, bool mask = true);

// The weight of quantized_linear and quantized_conv2d: a float master, or its codes.
struct StepWeight {
  at::Tensor weight, codes, step;  // one of weight and codes is undefined
  std::vector<c10::SymInt> sizes;  // of the matrix or kernel
  StepRule rule;

  at::Tensor on_step(at::ScalarType type) const;
  // g: the gradient to the weight on its step. With codes: to the step alone, sum q g.
  StepGradients gradients(const at::Tensor& g, bool need_value, bool need_step, bool clip) const;
};

// Throws ValueError naming op and argument unless step holds one floating-point number.
void check_step(const char* op, const char* name, const at::Tensor& step);
void check_step_rule(const char* op, const StepRule& rule);
// Exactly one of weight and codes; codes uint8 [n, bytes of k columns]; weight floating point with `n` rows of `k` numbers.
void check_step_weight(const char* op, const OptionalTensor& weight, const OptionalTensor& codes, const c10::SymInt& k,
                       const StepRule& rule);
// A vector [count] of x's dtype, or none.
void check_vector(const char* op, const char* name, const OptionalTensor& v, const char* count_name, const c10::SymInt& count,
                  const at::Tensor& x);

}  // namespace subbyte
