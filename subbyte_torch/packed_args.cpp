#include "subbyte_torch/packed_args.h"

#include "subbyte/formats/format.h"
#include "subbyte_torch/convert.h"

namespace subbyte {
namespace {

void check_scale_like(const char* op, const char* name, const at::Tensor& t, const c10::SymInt& n, const c10::SymInt& groups) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.sym_size(0) == n && t.sym_size(1) == groups, op, ": ", name, " is ", t.sym_sizes(),
                    ", expected [N, ceil(K / group_size)] = [", n, ", ", groups, "]");
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": ", name, " is ", type,
                    ", expected float32, float16 or bfloat16");
}

}  // namespace

c10::SymInt row_bytes_of(const char* op, std::string_view format, const c10::SymInt& k) {
  if (const auto known = k.maybe_as_int(); known.has_value() || format.find('*') != std::string_view::npos)
    return layout_of(op, format, known.has_value() ? *known : k.guard_int(__FILE__, __LINE__)).row_bytes;
  const int bits = format_bits(layout_of(op, format, 0).segments[0].format);
  return k / 8 * bits + (k % 8 * bits + 7) / 8;
}

c10::SymInt groups_of(const char* op, const c10::SymInt& k, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size >= 1, op, ": group_size is ", group_size, ", expected at least 1");
  if (const auto known = k.maybe_as_int()) return ceil_div(*known, group_size);
  return (k + (group_size - 1)) / group_size;
}

void check_affine(const char* op, const c10::SymInt& n, const c10::SymInt& k, const at::Tensor& scales,
                  const OptionalTensor& zeros, const OptionalTensor& offsets, const OptionalTensor& perm, int64_t group_size) {
  const c10::SymInt groups = groups_of(op, k, group_size);
  check_scale_like(op, "scales", scales, n, groups);
  TORCH_CHECK_VALUE(!given(zeros) || !given(offsets), op, ": zeros and offsets are both given, expected at most one of them");
  if (given(zeros)) check_scale_like(op, "zeros", *zeros, n, groups);
  if (given(offsets)) check_scale_like(op, "offsets", *offsets, n, groups);
  if (given(perm)) {
    TORCH_CHECK_VALUE(perm->scalar_type() == at::kInt && perm->dim() == 1 && perm->sym_size(0) == k, op, ": perm is ",
                      perm->scalar_type(), " ", perm->sym_sizes(), ", expected int32 [K] = [", k, "]");
  }
}

void check_packed(const char* op, const PackedArgs& w) {
  TORCH_CHECK_VALUE(w.in_features >= 0, op, ": in_features is ", w.in_features, ", expected at least 0");
  const c10::SymInt bytes = row_bytes_of(op, w.format, w.in_features);
  TORCH_CHECK_VALUE(w.codes.scalar_type() == at::kByte && w.codes.dim() == 2 && w.codes.sym_size(1) == bytes, op, ": codes is ",
                    w.codes.scalar_type(), " ", w.codes.sym_sizes(), ", expected uint8 [N, ", bytes, "] for ", w.in_features,
                    " columns of ", w.format);
  check_affine(op, w.codes.sym_size(0), w.in_features, w.scales, w.zeros, w.offsets, w.perm, w.group_size);
}

void check_features(const char* op, const char* name, const at::Tensor& x, const c10::SymInt& features) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": ", name, " has no dimensions, expected [..., ", features, "]");
  TORCH_CHECK_VALUE(x.sym_size(-1) == features, op, ": ", name, " has ", x.sym_size(-1), " features, the weight expects ",
                    features);
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble, op, ": ", name,
                    " is ", type, ", expected float32, float16, bfloat16 or float64");
}

void check_handle(const char* op, const OptionalTensor& weight, const c10::SymInt& n, int64_t k) {
  if (!given(weight)) return;
  TORCH_CHECK_VALUE(weight->dim() == 2 && weight->sym_size(0) == n && weight->sym_size(1) == k && weight->is_floating_point(),
                    op, ": weight is ", weight->scalar_type(), " ", weight->sym_sizes(), ", expected floating point [N, K] = [",
                    n, ", ", k, "]");
}

}  // namespace subbyte
