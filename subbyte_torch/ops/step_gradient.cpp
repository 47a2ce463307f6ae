#include "subbyte_torch/ops/step_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymFloat.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <string>

#include "subbyte_torch/ops/packed.h"
#include "subbyte_torch/ops/quantized.h"

namespace subbyte {
namespace {

double top_of(int64_t bits) { return double((int64_t(1) << (bits - 1)) - 1); }

// Values and steps enter the quantizer as float32, whatever their dtype: the rule of subbyte/ops/quantized_matmul/step_rule.h.
at::Tensor float_step(const at::Tensor& step, double eps) { return step.to(at::kFloat).reshape({}).clamp_min(eps); }

at::Tensor codes_to_integers(const at::Tensor& codes, const c10::SymInt& k, int64_t bits, at::ScalarType type) {
  const int64_t columns = k.guard_int(__FILE__, __LINE__);
  return ops::unpack(codes, "uint" + std::to_string(bits), columns).to(type) - double(int64_t(1) << (bits - 1));
}

}  // namespace

at::ScalarType gradient_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor on_step(const at::Tensor& v, const at::Tensor& step, const StepRule& rule, at::ScalarType type) {
  const double hi = top_of(rule.bits);
  const at::Tensor s = float_step(step, rule.eps), q = at::clamp(at::round(v.to(at::kFloat) / s), -hi - 1, hi);
  return q.to(type) * s.to(type);
}

StepGradients step_gradients(const at::Tensor& v, const at::Tensor& step, const at::Tensor& g, const StepRule& rule,
                             bool need_value, bool need_step, bool mask) {
  const double hi = top_of(rule.bits), lo = -hi - 1;
  const at::Tensor u = v.to(at::kFloat) / float_step(step, rule.eps);
  StepGradients out;
  if (need_value) out.value = mask ? at::where((u >= lo).logical_and(u <= hi), g, at::zeros_like(g)) : g;
  if (need_step) {
    const at::Tensor inside = at::clamp(at::round(u), lo, hi) - u;
    const at::Tensor d = at::where(u < lo, at::full_like(u, lo), at::where(u > hi, at::full_like(u, hi), inside));
    const at::Tensor sum = (d.to(g.scalar_type()) * g).sum();
    const c10::SymFloat root = (c10::SymFloat(v.sym_numel().max(1)) * c10::SymFloat(hi)).sqrt();
    out.step = (sum / at::Scalar(root)).to(step.scalar_type()).reshape_symint(step.sym_sizes());
  }
  return out;
}

at::Tensor StepWeight::on_step(at::ScalarType type) const {
  if (weight.defined()) return subbyte::on_step(weight, step, rule, type);
  c10::SymInt k = 1;
  for (size_t i = 1; i < sizes.size(); ++i) k = k * sizes[i];
  return (codes_to_integers(codes, k, rule.bits, type) * float_step(step, rule.eps).to(type)).reshape_symint(sizes);
}

StepGradients StepWeight::gradients(const at::Tensor& g, bool need_value, bool need_step, bool clip) const {
  if (weight.defined()) return step_gradients(weight, step, g, rule, need_value, need_step, clip);
  StepGradients out;
  if (need_step) {
    const at::Tensor rows = g.reshape_symint({codes.sym_size(0), -1});
    const at::Tensor q = codes_to_integers(codes, rows.sym_size(1), rule.bits, g.scalar_type());
    out.step = (q * rows).sum().to(step.scalar_type()).reshape_symint(step.sym_sizes());
  }
  return out;
}

void check_step(const char* op, const char* name, const at::Tensor& step) {
  TORCH_CHECK_VALUE(step.is_floating_point() && step.sym_numel() == 1, op, ": ", name, " is ", step.scalar_type(), " ",
                    step.sym_sizes(), ", expected one floating-point number");
}

void check_step_rule(const char* op, const StepRule& rule) {
  TORCH_CHECK_VALUE(rule.bits >= 2 && rule.bits <= 8, op, ": bits is ", rule.bits, ", expected 2 to 8");
  TORCH_CHECK_VALUE(std::isfinite(rule.eps) && rule.eps > 0, op, ": eps is ", rule.eps, ", expected a positive number");
}

void check_step_weight(const char* op, const OptionalTensor& weight, const OptionalTensor& codes, const c10::SymInt& k,
                       const StepRule& rule) {
  TORCH_CHECK_VALUE(given(weight) != given(codes), op, ": weight and codes are both ", given(weight) ? "given" : "missing",
                    ", expected exactly one");
  if (given(weight)) {
    TORCH_CHECK_VALUE(weight->is_floating_point(), op, ": weight is ", weight->scalar_type(), ", expected floating point");
    return;
  }
  const c10::SymInt bytes = row_bytes_of(op, "uint" + std::to_string(rule.bits), k);
  TORCH_CHECK_VALUE(codes->scalar_type() == at::kByte && codes->dim() == 2 && codes->sym_size(1) == bytes, op, ": codes is ",
                    codes->scalar_type(), " ", codes->sym_sizes(), ", expected uint8 [N, ", bytes, "] for ", k, " columns of ",
                    rule.bits, " bits");
}

void check_vector(const char* op, const char* name, const OptionalTensor& v, const char* count_name, const c10::SymInt& count,
                  const at::Tensor& x) {
  if (!given(v)) return;
  TORCH_CHECK_VALUE(v->dim() == 1 && v->sym_size(0) == count && v->scalar_type() == x.scalar_type(), op, ": ", name, " is ",
                    v->scalar_type(), " ", v->sym_sizes(), ", expected ", x.scalar_type(), " [", count_name, "] = [", count,
                    "] as x");
}

}  // namespace subbyte
