#include "subbyte_torch/file_tensors.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "subbyte_torch/convert.h"

namespace subbyte {
namespace {

at::ScalarType scalar_type_of(ElementType t, const std::string& name) {
  switch (t) {
    case ElementType::kBool: return at::kBool;
    case ElementType::kU8: return at::kByte;
    case ElementType::kI8: return at::kChar;
    case ElementType::kF8E4M3: return at::kFloat8_e4m3fn;
    case ElementType::kF8E5M2: return at::kFloat8_e5m2;
    case ElementType::kI16: return at::kShort;
    case ElementType::kU16: return at::kUInt16;
    case ElementType::kI32: return at::kInt;
    case ElementType::kU32: return at::kUInt32;
    case ElementType::kI64: return at::kLong;
    case ElementType::kU64: return at::kUInt64;
    case ElementType::kF16: return at::kHalf;
    case ElementType::kBF16: return at::kBFloat16;
    case ElementType::kF32: return at::kFloat;
    case ElementType::kF64: return at::kDouble;
    case ElementType::kC64: return at::kComplexFloat;
  }
  TORCH_CHECK(false, "tensor '", name, "' has elements of type ", element_type_name(t), ", which PyTorch lacks");
}

}  // namespace

at::Tensor owned_tensor(const SharedBytes& bytes, at::IntArrayRef shape, ElementType type, const std::string& name) {
  at::Tensor out = at::empty(shape, at::TensorOptions(scalar_type_of(type, name)));
  TORCH_INTERNAL_ASSERT(int64_t(out.nbytes()) == bytes.size());
  if (bytes.size() > 0) std::memcpy(mutable_data_of(out), bytes.data(), size_t(bytes.size()));
  return out;
}

std::vector<at::Tensor> owned_parts(const PackedTensor& packed) {
  const PackedSpec& s = packed.spec;
  std::vector<at::Tensor> out{owned_tensor(packed.codes, {s.n, s.layout.row_bytes}, ElementType::kU8, s.name),
                              owned_tensor(packed.scales, {s.n, s.groups()}, element_type_of(s.scale_dtype), s.name)};
  if (s.zero_kind != ZeroKind::kFixed)
    out.push_back(owned_tensor(packed.zeros, {s.n, s.groups()}, element_type_of(s.zero_dtype), s.name));
  if (s.has_perm) out.push_back(owned_tensor(packed.perm, {s.k}, ElementType::kI32, s.name));
  if (s.residual_bits > 0)
    out.push_back(owned_tensor(packed.residual, {s.n, s.residual_row_bytes()}, ElementType::kU8, s.name));
  return out;
}

const char* zero_kind_name(ZeroKind kind) {
  return kind == ZeroKind::kZeros ? "zeros" : kind == ZeroKind::kOffsets ? "offsets" : "fixed";
}

}  // namespace subbyte
