// subbyte::embedding_update_ (subbyte/ops/embedding_update/embedding_update.h) for one-bit tables, and subbyte::embedding_add_
// for tables of any format. Both write codes (and momentum) in place and have no gradient.
#include "subbyte/ops/embedding_update/embedding_update.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/embedding_update/embedding_update_cuda.h"
#endif

#include "subbyte/ops/quantize/quantize.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/embedding.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

constexpr const char* kUpdateSchema =
    "embedding_update_(Tensor(a!) codes, Tensor rows, Tensor sign_bits, int embedding_dim, str rule=\"descent\", Tensor? "
    "mask=None, "
    "Tensor(b!)? momentum=None, Tensor? slots=None, float lr=1.0, float beta=0.99, int seed=0, int offset=0) -> ()";
constexpr const char* kAddSchema =
    "embedding_add_(Tensor(a!) codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, str format, int "
    "in_features, int "
    "group_size, Tensor rows, Tensor values, float alpha=1.0, str rounding=\"stochastic\", int seed=0, int offset=0) -> ()";

#define SB_UPDATE_PARAMS                                                                                                      \
  const at::Tensor &codes, const at::Tensor &rows, const at::Tensor &sign_bits, int64_t embedding_dim, std::string_view rule, \
      const OptionalTensor &mask, const OptionalTensor &momentum, const OptionalTensor &slots, double lr, double beta,        \
      int64_t seed, int64_t offset
#define SB_UPDATE codes, rows, sign_bits, embedding_dim, rule, mask, momentum, slots, lr, beta, seed, offset
#define SB_ADD_PARAMS                                                                                                        \
  SB_PACKED_PARAMS, const at::Tensor &rows, const at::Tensor &values, double alpha, std::string_view rounding, int64_t seed, \
      int64_t offset
#define SB_ADD SB_PACKED, rows, values, alpha, rounding, seed, offset

EmbeddingUpdateMode mode_of(std::string_view name) {
  if (name == "descent") return EmbeddingUpdateMode::kDescent;
  if (name == "xor") return EmbeddingUpdateMode::kXor;
  if (name == "momentum") return EmbeddingUpdateMode::kMomentum;
  TORCH_CHECK_VALUE(false, "embedding_update_: rule '", name, "' is unknown, expected descent, xor or momentum");
}

void check_row_numbers(const char* op, const char* name, const at::Tensor& t, const c10::SymInt& count) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kLong && t.dim() == 1 && t.sym_size(0) == count, op, ": ", name, " is ",
                    t.scalar_type(), " ", t.sym_sizes(), ", expected int64 [", count, "]");
}

// ---- embedding_update_

void update_shape(SB_UPDATE_PARAMS) {
  const EmbeddingUpdateMode m = mode_of(rule);
  TORCH_CHECK_VALUE(embedding_dim >= 0, "embedding_update_: embedding_dim is ", embedding_dim, ", expected at least 0");
  const c10::SymInt bytes = (embedding_dim + 7) / 8;
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.sym_size(1) == bytes,
                    "embedding_update_: codes is ", codes.scalar_type(), " ", codes.sym_sizes(), ", expected uint8 [V, ", bytes,
                    "] for embedding_dim = ", embedding_dim);
  check_row_numbers("embedding_update_", "rows", rows, rows.dim() == 1 ? rows.sym_size(0) : c10::SymInt(0));
  auto check_bits = [&](const char* name, const at::Tensor& t) {
    TORCH_CHECK_VALUE(
        t.scalar_type() == at::kByte && t.dim() == 2 && t.sym_size(0) == rows.sym_size(0) && t.sym_size(1) == bytes,
        "embedding_update_: ", name, " is ", t.scalar_type(), " ", t.sym_sizes(), ", expected uint8 [", rows.sym_size(0), ", ",
        bytes, "]");
  };
  check_bits("sign_bits", sign_bits);
  if (given(mask)) check_bits("mask", *mask);
  TORCH_CHECK_VALUE(given(momentum) == (m == EmbeddingUpdateMode::kMomentum),
                    "embedding_update_: momentum goes with rule 'momentum' and with no other, the rule is '", rule, "'");
  TORCH_CHECK_VALUE(!given(slots) || given(momentum), "embedding_update_: slots are the rows of momentum, which is None");
  TORCH_CHECK_VALUE(beta >= 0 && beta < 1, "embedding_update_: beta is ", beta, ", expected 0 <= beta < 1");
  TORCH_CHECK_VALUE(lr >= 0 && lr <= std::numeric_limits<float>::max(), "embedding_update_: lr is ", lr,
                    ", expected a finite number of at least 0");
  if (!given(momentum)) return;
  TORCH_CHECK_VALUE((momentum->scalar_type() == at::kFloat || momentum->scalar_type() == at::kChar) && momentum->dim() == 2 &&
                        momentum->sym_size(1) == embedding_dim,
                    "embedding_update_: momentum is ", momentum->scalar_type(), " ", momentum->sym_sizes(),
                    ", expected float32 or int8 [S, ", embedding_dim, "]");
  if (given(slots)) check_row_numbers("embedding_update_", "slots", *slots, rows.sym_size(0));
}

template <class Run>
void update_with(Run run, SB_UPDATE_PARAMS) {
  update_shape(SB_UPDATE);
  for (const at::Tensor* t : {&rows, &sign_bits}) check_device("embedding_update_", "rows or sign_bits", *t, "codes", codes);
  for (const OptionalTensor* t : {&mask, &momentum, &slots})
    if (given(*t)) check_device("embedding_update_", "mask, momentum or slots", **t, "codes", codes);
  TORCH_CHECK_VALUE(!given(momentum) || momentum->is_contiguous(), "embedding_update_: momentum is not contiguous");
  const at::Tensor target = codes.contiguous(), row_numbers = rows.contiguous(), bits = sign_bits.contiguous();
  const at::Tensor selected = given(mask) ? mask->contiguous() : at::Tensor();
  const at::Tensor places = !given(momentum) ? at::Tensor()
                            : given(slots)   ? slots->contiguous()
                                             : at::arange(rows.size(0), rows.options());
  EmbeddingUpdateParams p;
  p.mode = mode_of(rule);
  p.codes = mutable_bytes_of(target);
  p.n = codes.size(0);
  p.k = embedding_dim;
  p.rows = static_cast<const int64_t*>(data_of(row_numbers));
  p.count = rows.size(0);
  p.sign_bits = bytes_of(bits);
  p.mask = selected.defined() ? bytes_of(selected) : nullptr;
  if (given(momentum)) {
    p.momentum = mutable_data_of(*momentum);
    p.momentum_is_int8 = momentum->scalar_type() == at::kChar;
    p.momentum_rows = momentum->size(0);
    p.slots = static_cast<const int64_t*>(data_of(places));
  }
  p.lr = float(lr);
  p.one_minus_beta = float(1 - beta);
  p.seed = uint64_t(seed);
  p.offset = uint64_t(offset);
  translated([&] { run(p); });
  if (!target.is_same(codes)) codes.copy_(target);
}

void update_cpu(SB_UPDATE_PARAMS) {
  update_with([](const EmbeddingUpdateParams& p) { embedding_update(p); }, SB_UPDATE);
}

void update_autograd(SB_UPDATE_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  ops::embedding_update_(SB_UPDATE);
}

// Autograd learns that the tensors changed: a backward pass that still needs the old ones is then an error.
void update_versioned(SB_UPDATE_PARAMS) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    ops::embedding_update_(SB_UPDATE);
  }
  codes.unsafeGetTensorImpl()->bump_version();
  if (given(momentum)) momentum->unsafeGetTensorImpl()->bump_version();
}

// ---- embedding_add_

void add_shape(SB_ADD_PARAMS) {
  check_packed("embedding_add_", {SB_PACKED});
  translated([&] { return rounding_from_name(rounding); });
  check_row_numbers("embedding_add_", "rows", rows, rows.dim() == 1 ? rows.sym_size(0) : c10::SymInt(0));
  TORCH_CHECK_VALUE(values.is_floating_point() && values.dim() == 2 && values.sym_size(0) == rows.sym_size(0) &&
                        values.sym_size(1) == in_features,
                    "embedding_add_: values is ", values.scalar_type(), " ", values.sym_sizes(), ", expected floating point [",
                    rows.sym_size(0), ", ", in_features, "]");
}

// Composed: the parts of the touched rows are gathered, decoded, encoded and put back; each pass is T rows long. encode refuses
// values that are not finite on the CPU; on a GPU, which cannot refuse without being waited for, they are left out.
void add_composed(SB_ADD_PARAMS) {
  add_shape(SB_ADD);
  check_device("embedding_add_", "rows", rows, "codes", codes);
  check_device("embedding_add_", "values", values, "codes", codes);
  if (rows.size(0) == 0) return;
  const at::Tensor bounds = at::stack({rows.min(), rows.max()}).cpu();
  const int64_t first = bounds.select(0, 0).item().toLong(), last = bounds.select(0, 1).item().toLong();
  TORCH_CHECK_INDEX(first >= 0 && last < codes.size(0), "embedding_add_: row ", first < 0 ? first : last,
                    " is outside the table, expected 0 <= row < ", codes.size(0));
  auto gathered = [&](const OptionalTensor& part) {
    return given(part) ? OptionalTensor(part->index_select(0, rows)) : std::nullopt;
  };
  const at::Tensor part_scales = scales.index_select(0, rows);
  const OptionalTensor part_zeros = gathered(zeros), part_offsets = gathered(offsets);
  const at::Tensor dense = ops::dequantize(codes.index_select(0, rows), part_scales, part_zeros, part_offsets, perm, format,
                                           in_features, group_size, at::kFloat);
  const at::Tensor added = values.to(at::kFloat);
  dense.add_(values.is_cuda() ? at::where(at::isfinite(added), added, 0) : added, alpha);
  const at::Tensor encoded =
      ops::encode(dense, part_scales, part_zeros, part_offsets, perm, format, group_size, rounding, seed, offset);
  codes.index_copy_(0, rows, encoded);
}

void add_autograd(SB_ADD_PARAMS) {
  at::AutoDispatchBelowAutograd below;
  ops::embedding_add_(SB_ADD);
}

void add_versioned(SB_ADD_PARAMS) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    ops::embedding_add_(SB_ADD);
  }
  codes.unsafeGetTensorImpl()->bump_version();
}

#if SB_CUDA
void update_cuda(SB_UPDATE_PARAMS) {
  const c10::DeviceGuard device(codes.device());
  update_with([&](const EmbeddingUpdateParams& p) { cuda::embedding_update(p, stream_of(codes)); }, SB_UPDATE);
}

TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("embedding_update_", update_cuda);
  m.impl("embedding_add_", add_composed);
}
#endif

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kUpdateSchema);
  m.def(kAddSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("embedding_update_", update_shape);
  m.impl("embedding_add_", add_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("embedding_update_", update_cpu);
  m.impl("embedding_add_", add_composed);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("embedding_update_", update_autograd);
  m.impl("embedding_add_", add_autograd);
}
TORCH_LIBRARY_IMPL(subbyte, ADInplaceOrView, m) {
  m.impl("embedding_update_", update_versioned);
  m.impl("embedding_add_", add_versioned);
}

}  // namespace

void ops::embedding_update_(SB_UPDATE_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding_update_", "").typed<decltype(update_shape)>();
  op.call(SB_UPDATE);
}

void ops::embedding_add_(SB_ADD_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding_add_", "").typed<decltype(add_shape)>();
  op.call(SB_ADD);
}

}  // namespace subbyte
