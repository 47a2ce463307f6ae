// subbyte::packed_adamw_, subbyte::packed_sign_, subbyte::packed_sgd_ (subbyte/ops/packed_update/packed_update.h). Three
// schemas, one shape rule and one glue: an op only fills in its numbers.
#include "subbyte/ops/packed_update/packed_update.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/packed_update/packed_update_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed_update.h"

namespace subbyte {
namespace {

#define SB_UPDATE_HEAD_SCHEMA                                                                                        \
  "Tensor(a!) codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, str format, int in_features, int " \
  "group_size, "                                                                                                     \
  "Tensor grad, "
#define SB_UPDATE_TAIL_SCHEMA                                                                                             \
  "int seed=0, int offset=0, bool maximize=False, Tensor? grad_factor=None, Tensor? numbers=None, Tensor? counter=None, " \
  "Tensor(f!)? residual=None, int residual_bits=0) -> ()"
constexpr const char* kAdamWSchema =
    "packed_adamw_(" SB_UPDATE_HEAD_SCHEMA
    "Tensor(b!) m, Tensor(c!)? m_absmax, Tensor(d!) v, Tensor(e!)? v_absmax, float lr, float beta1=0.9, float beta2=0.999, "
    "float "
    "eps=1e-8, float weight_decay=0.01, float bias_correction1=1.0, float bias_correction2=1.0, " SB_UPDATE_TAIL_SCHEMA;
constexpr const char* kSignSchema =
    "packed_sign_(" SB_UPDATE_HEAD_SCHEMA
    "Tensor(b!)? m, Tensor(c!)? m_absmax, float lr, float beta1=0.9, float beta2=0.99, float threshold=0.0, float "
    "weight_decay=0.0, " SB_UPDATE_TAIL_SCHEMA;
constexpr const char* kSgdSchema =
    "packed_sgd_(" SB_UPDATE_HEAD_SCHEMA
    "Tensor(b!)? m, Tensor(c!)? m_absmax, float lr, float momentum=0.0, float dampening=0.0, bool nesterov=False, float "
    "weight_decay=0.0, " SB_UPDATE_TAIL_SCHEMA;

// One call; lives no longer than it.
struct Update {
  PackedArgs w;
  const at::Tensor& grad;
  OptionalTensor m, m_absmax, v, v_absmax;
  const OptionalTensor &grad_factor, &numbers, &counter, &residual;
  PackedUpdateParams p;  // the numbers; without pointers

  const char* op() const { return update_rule_name(p.rule); }
};

// ---- shape rule

MomentType moment_type_of(const char* op, const char* name, const OptionalTensor& t, const OptionalTensor& absmax,
                          const c10::SymInt& n, const c10::SymInt& k) {
  if (!given(t)) {
    TORCH_CHECK_VALUE(!given(absmax), op, ": absmax of ", name, " is given without ", name);
    return MomentType::kNone;
  }
  TORCH_CHECK_VALUE(t->dim() == 2 && t->sym_size(0) == n, op, ": ", name, " is ", t->scalar_type(), " ", t->sym_sizes(),
                    ", expected ", n, " rows");
  const c10::SymInt columns = t->sym_size(1);
  if (t->scalar_type() == at::kByte) {
    const c10::SymInt blocks = (k + (kMomentBlock - 1)) / kMomentBlock;
    TORCH_CHECK_VALUE(given(absmax) && absmax->scalar_type() == at::kFloat && absmax->dim() == 2 && absmax->sym_size(0) == n &&
                          absmax->sym_size(1) == blocks,
                      op, ": ", name, " is uint8, expected float32 [", n, ", ", blocks, "] as its absmax");
    if (columns == k) return MomentType::kQ8;
    TORCH_CHECK_VALUE(columns == (k + 1) / 2, op, ": ", name, " is uint8 ", t->sym_sizes(), ", expected [N, K] = [", n, ", ", k,
                      "] for 8 bits or [N, ceil(K / 2)] for 4");
    return MomentType::kQ4;
  }
  TORCH_CHECK_VALUE(!given(absmax), op, ": absmax of ", name, " is given, but ", name, " is ", t->scalar_type());
  TORCH_CHECK_VALUE((t->scalar_type() == at::kFloat || t->scalar_type() == at::kBFloat16) && columns == k, op, ": ", name,
                    " is ", t->scalar_type(), " ", t->sym_sizes(), ", expected float32, bfloat16 or uint8 [N, K] = [", n, ", ",
                    k, "]");
  return t->scalar_type() == at::kFloat ? MomentType::kF32 : MomentType::kBF16;
}

void check_device_numbers(const char* op, const char* name, const OptionalTensor& t, at::ScalarType type, int64_t count) {
  if (!given(t)) return;
  TORCH_CHECK_VALUE(t->scalar_type() == type && t->sym_numel() == count, op, ": ", name, " is ", t->scalar_type(), " ",
                    t->sym_sizes(), ", expected ", type, " of ", count, " elements");
}

void update_shape(Update& u) {
  const char* op = u.op();
  check_packed(op, u.w);
  const c10::SymInt n = u.w.codes.sym_size(0), k = u.w.in_features;
  TORCH_CHECK_VALUE(u.grad.layout() == at::kStrided && u.grad.dim() == 2 && u.grad.sym_size(0) == n && u.grad.sym_size(1) == k,
                    op, ": grad is ", u.grad.layout(), " ", u.grad.sym_sizes(), ", expected dense [N, K] = [", n, ", ", k, "]");
  dtype_of(op, "grad", u.grad.scalar_type());
  u.p.m.type = moment_type_of(op, "m", u.m, u.m_absmax, n, k);
  u.p.v.type = moment_type_of(op, "v", u.v, u.v_absmax, n, k);
  check_device_numbers(op, "grad_factor", u.grad_factor, at::kFloat, 1);
  check_device_numbers(op, "numbers", u.numbers, at::kFloat, 3);
  check_device_numbers(op, "counter", u.counter, at::kLong, 1);
  const int64_t r = u.p.residual_bits;
  TORCH_CHECK_VALUE(r >= 0 && r <= 8 && given(u.residual) == (r > 0), op, ": residual_bits is ", r, " and the residual is ",
                    given(u.residual) ? "given" : "missing", ", expected 1 to 8 with a residual, 0 without");
  if (r == 0) return;
  const c10::SymInt bytes = k / 8 * r + (k % 8 * r + 7) / 8;
  TORCH_CHECK_VALUE(u.residual->scalar_type() == at::kByte && u.residual->dim() == 2 && u.residual->sym_size(0) == n &&
                        u.residual->sym_size(1) == bytes,
                    op, ": residual is ", u.residual->scalar_type(), " ", u.residual->sym_sizes(), ", expected uint8 [", n,
                    ", ", bytes, "]");
}

// ---- glue

// A tensor that the core writes: contiguous, and copied back where that took a copy.
class Written {
 public:
  Written(const char* op, const char* name, const OptionalTensor& t, const at::Tensor& anchor) {
    if (!given(t)) return;
    check_device(op, name, *t, "codes", anchor);
    target_ = *t;
    dense_ = t->contiguous();
  }
  void* data() const { return dense_.defined() ? mutable_data_of(dense_) : nullptr; }
  void finish() const {
    if (dense_.defined() && !dense_.is_same(target_)) target_.copy_(dense_);
  }

 private:
  at::Tensor target_, dense_;
};

class Read {
 public:
  Read(const char* op, const char* name, const OptionalTensor& t, const at::Tensor& anchor) {
    if (!given(t)) return;
    check_device(op, name, *t, "codes", anchor);
    dense_ = t->contiguous();
  }
  const void* data() const { return dense_.defined() ? data_of(dense_) : nullptr; }

 private:
  at::Tensor dense_;
};

template <class Run>
void update_with(Run run, Update& u) {
  update_shape(u);
  const char* op = u.op();
  const at::Tensor& codes = u.w.codes;
  check_device(op, "grad", u.grad, "codes", codes);
  const Rows grad = rows_of(op, "grad", u.grad);
  const PackedView view = affine_view_of(op, codes.size(0), u.w.in_features, u.w.scales, u.w.zeros, u.w.offsets, u.w.perm,
                                         u.w.format, u.w.group_size, "codes", codes);
  const Written stored(op, "codes", codes, codes), residual(op, "residual", u.residual, codes), m(op, "m", u.m, codes),
      m_absmax(op, "m_absmax", u.m_absmax, codes), v(op, "v", u.v, codes), v_absmax(op, "v_absmax", u.v_absmax, codes);
  const Read factor(op, "grad_factor", u.grad_factor, codes), numbers(op, "numbers", u.numbers, codes),
      counter(op, "counter", u.counter, codes);
  PackedUpdateParams& p = u.p;
  p.w = view.matrix;
  p.codes = static_cast<uint8_t*>(stored.data());
  p.residual = static_cast<uint8_t*>(residual.data());
  p.grad = grad.data();
  p.grad_dtype = grad.dtype;
  p.grad_stride = grad.stride;
  p.grad_factor = static_cast<const float*>(factor.data());
  p.numbers = static_cast<const float*>(numbers.data());
  p.counter = static_cast<const int64_t*>(counter.data());
  p.m.data = m.data();
  p.m.absmax = static_cast<float*>(m_absmax.data());
  p.v.data = v.data();
  p.v.absmax = static_cast<float*>(v_absmax.data());
  translated([&] { run(p); });
  for (const Written* t : {&stored, &residual, &m, &m_absmax, &v, &v_absmax}) t->finish();
}

void update_meta(Update& u) { update_shape(u); }
void update_cpu(Update& u) {
  update_with([](const PackedUpdateParams& p) { packed_update(p); }, u);
}
#if SB_CUDA
void update_cuda(Update& u) {
  const c10::DeviceGuard device(u.w.codes.device());
  update_with([&](const PackedUpdateParams& p) { cuda::packed_update(p, stream_of(u.w.codes)); }, u);
}
#endif

// ---- the three ops: numbers by name

#define SB_UPDATE_TAIL seed, offset, maximize, grad_factor, numbers, counter, residual, residual_bits

PackedUpdateParams numbers_of(UpdateRule rule, double lr, double weight_decay, int64_t seed, int64_t offset, bool maximize,
                              int64_t residual_bits) {
  PackedUpdateParams p;
  p.rule = rule;
  p.lr = lr;
  p.weight_decay = weight_decay;
  p.seed = uint64_t(seed);
  p.offset = uint64_t(offset);
  p.maximize = maximize;
  p.residual_bits = int(std::min<int64_t>(9, std::max<int64_t>(-1, residual_bits)));
  return p;
}

template <void (*kRun)(Update&)>
void adamw(SB_PACKED_PARAMS, const at::Tensor& grad, const at::Tensor& m, const OptionalTensor& m_absmax, const at::Tensor& v,
           const OptionalTensor& v_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
           double bias_correction1, double bias_correction2, SB_UPDATE_TAIL_PARAMS) {
  Update u{{SB_PACKED},
           grad,
           m,
           m_absmax,
           v,
           v_absmax,
           grad_factor,
           numbers,
           counter,
           residual,
           numbers_of(UpdateRule::kAdamW, lr, weight_decay, seed, offset, maximize, residual_bits)};
  u.p.beta1 = beta1;
  u.p.beta2 = beta2;
  u.p.eps = eps;
  u.p.bias_correction1 = bias_correction1;
  u.p.bias_correction2 = bias_correction2;
  kRun(u);
}

template <void (*kRun)(Update&)>
void sign(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax, double lr,
          double beta1, double beta2, double threshold, double weight_decay, SB_UPDATE_TAIL_PARAMS) {
  Update u{{SB_PACKED},
           grad,
           m,
           m_absmax,
           std::nullopt,
           std::nullopt,
           grad_factor,
           numbers,
           counter,
           residual,
           numbers_of(UpdateRule::kSign, lr, weight_decay, seed, offset, maximize, residual_bits)};
  u.p.beta1 = beta1;
  u.p.beta2 = beta2;
  u.p.threshold = threshold;
  kRun(u);
}

template <void (*kRun)(Update&)>
void sgd(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax, double lr,
         double momentum, double dampening, bool nesterov, double weight_decay, SB_UPDATE_TAIL_PARAMS) {
  Update u{{SB_PACKED},
           grad,
           m,
           m_absmax,
           std::nullopt,
           std::nullopt,
           grad_factor,
           numbers,
           counter,
           residual,
           numbers_of(UpdateRule::kSgd, lr, weight_decay, seed, offset, maximize, residual_bits)};
  u.p.momentum = momentum;
  u.p.dampening = dampening;
  u.p.nesterov = nesterov;
  kRun(u);
}

// ---- registration

// Codes are integers: nothing is recorded.
void without_gradient(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
}

// Autograd learns what changed: a backward pass that still needs the old codes is then an error, not a wrong gradient.
void versioned(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
    if (arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite() && value.isTensor())
      written.push_back(value.toTensor());
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  for (const at::Tensor& t : written)
    if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_FRAGMENT(subbyte, library) {
  library.def(kAdamWSchema);
  library.def(kSignSchema);
  library.def(kSgdSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, library) {
  library.impl("packed_adamw_", adamw<update_meta>);
  library.impl("packed_sign_", sign<update_meta>);
  library.impl("packed_sgd_", sgd<update_meta>);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, library) {
  library.impl("packed_adamw_", adamw<update_cpu>);
  library.impl("packed_sign_", sign<update_cpu>);
  library.impl("packed_sgd_", sgd<update_cpu>);
}
#if SB_CUDA
TORCH_LIBRARY_IMPL(subbyte, CUDA, library) {
  library.impl("packed_adamw_", adamw<update_cuda>);
  library.impl("packed_sign_", sign<update_cuda>);
  library.impl("packed_sgd_", sgd<update_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(subbyte, Autograd, library) {
  for (const char* op : {"packed_adamw_", "packed_sign_", "packed_sgd_"})
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&without_gradient>());
}
TORCH_LIBRARY_IMPL(subbyte, ADInplaceOrView, library) {
  for (const char* op : {"packed_adamw_", "packed_sign_", "packed_sgd_"})
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&versioned>());
}

}  // namespace

void ops::packed_adamw_(SB_PACKED_PARAMS, const at::Tensor& grad, const at::Tensor& m, const OptionalTensor& m_absmax,
                        const at::Tensor& v, const OptionalTensor& v_absmax, double lr, double beta1, double beta2, double eps,
                        double weight_decay, double bias_correction1, double bias_correction2, SB_UPDATE_TAIL_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::packed_adamw_", "").typed<decltype(adamw<update_meta>)>();
  op.call(SB_PACKED, grad, m, m_absmax, v, v_absmax, lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2,
          SB_UPDATE_TAIL);
}

void ops::packed_sign_(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax,
                       double lr, double beta1, double beta2, double threshold, double weight_decay, SB_UPDATE_TAIL_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::packed_sign_", "").typed<decltype(sign<update_meta>)>();
  op.call(SB_PACKED, grad, m, m_absmax, lr, beta1, beta2, threshold, weight_decay, SB_UPDATE_TAIL);
}

void ops::packed_sgd_(SB_PACKED_PARAMS, const at::Tensor& grad, const OptionalTensor& m, const OptionalTensor& m_absmax,
                      double lr, double momentum, double dampening, bool nesterov, double weight_decay, SB_UPDATE_TAIL_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::packed_sgd_", "").typed<decltype(sgd<update_meta>)>();
  op.call(SB_PACKED, grad, m, m_absmax, lr, momentum, dampening, nesterov, weight_decay, SB_UPDATE_TAIL);
}

}  // namespace subbyte
