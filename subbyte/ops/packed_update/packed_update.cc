#include "subbyte/ops/packed_update/packed_update.h"

#include <cmath>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/packed_update/kernels.h"

namespace subbyte {
namespace {

void check_moment(const MomentView& moment, const char* name, bool needed, bool empty, const char* op) {
  check_arg(!needed || moment.type != MomentType::kNone, op, ": ", name, " is missing");
  if (empty || moment.type == MomentType::kNone) return;
  check_arg(moment.data != nullptr, op, ": ", name, " is missing");
  check_arg(!is_blockwise(moment.type) || moment.absmax != nullptr, op, ": absmax of ", name, " is missing");
}

void check_at_least_0(double v, const char* name, const char* op) {
  check_arg(v >= 0 && std::isfinite(v), op, ": ", name, " is ", v, ", expected a finite number of at least 0");
}

void check_fraction(double v, const char* name, const char* op) {
  check_arg(v >= 0 && v < 1, op, ": ", name, " is ", v, ", expected 0 <= ", name, " < 1");
}

}  // namespace

const char* update_rule_name(UpdateRule rule) {
  return rule == UpdateRule::kAdamW ? "packed_adamw_" : rule == UpdateRule::kSign ? "packed_sign_" : "packed_sgd_";
}

bool check_packed_update(const PackedUpdateParams& p) {
  const char* op = update_rule_name(p.rule);
  PackedMatrix w = p.w;
  w.codes = p.codes;
  validate(w, op);
  const bool empty = w.n == 0 || w.k == 0;
  check_at_least_0(p.lr, "lr", op);
  check_at_least_0(p.weight_decay, "weight_decay", op);
  if (p.rule == UpdateRule::kSgd) {
    check_at_least_0(p.momentum, "momentum", op);
    check_arg(std::isfinite(p.dampening), op, ": dampening is ", p.dampening, ", expected a finite number");
    check_arg((p.momentum == 0) == (p.m.type == MomentType::kNone), op, ": momentum is ", p.momentum, " and m is ",
              p.m.type == MomentType::kNone ? "missing" : "given", ", expected m exactly when momentum is not 0");
  } else {
    check_fraction(p.beta1, "beta1", op);
    check_fraction(p.beta2, "beta2", op);
  }
  if (p.rule == UpdateRule::kSign) check_at_least_0(p.threshold, "threshold", op);
  if (p.rule == UpdateRule::kAdamW) {
    check_at_least_0(p.eps, "eps", op);
    check_arg(p.bias_correction1 > 0 && p.bias_correction2 > 0, op, ": the bias corrections are ", p.bias_correction1, " and ",
              p.bias_correction2, ", expected numbers above 0");
  } else {
    check_arg(p.v.type == MomentType::kNone, op, ": v is given, which is adamw's alone");
  }
  check_moment(p.m, "m", p.rule == UpdateRule::kAdamW, empty, op);
  check_moment(p.v, "v", p.rule == UpdateRule::kAdamW, empty, op);
  check_arg(p.residual_bits >= 0 && p.residual_bits <= 8, op, ": residual_bits is ", p.residual_bits, ", expected 0 to 8");
  check_arg(empty || (p.residual != nullptr) == (p.residual_bits > 0), op, ": residual_bits is ", p.residual_bits,
            " and the residual is ", p.residual != nullptr ? "given" : "missing");
  check_arg(w.n <= 1 || p.grad_stride >= w.k, op, ": row stride ", p.grad_stride, " of grad is below K = ", w.k);
  if (empty) return false;
  check_arg(p.grad != nullptr, op, ": grad is missing");
  return true;
}

std::span<const PackedUpdateKernel> packed_update_kernels() {
  static constexpr PackedUpdateKernel kKernels[] = {
#define SB_PACKED_UPDATE_KERNEL(name, isa, space) {name, Isa::isa, space::update_rows},
#include "subbyte/ops/packed_update/kernels.inc"
#undef SB_PACKED_UPDATE_KERNEL
  };
  return kKernels;
}

const PackedUpdateKernel& select_packed_update_kernel(Isa isa) {
  for (const PackedUpdateKernel& kernel : packed_update_kernels())
    if (kernel.isa <= isa) return kernel;
  return packed_update_kernels().back();
}

void packed_update(const PackedUpdateParams& p) {
  if (!check_packed_update(p)) return;
  validate_perm(p.w, update_rule_name(p.rule));
  const PackedUpdateKernel& kernel = select_packed_update_kernel(active_isa());
  parallel_for(p.w.n, max_i64(1, 16384 / p.w.k), [&](int64_t begin, int64_t end) { kernel.update_rows(p, begin, end); });
}

}  // namespace subbyte
