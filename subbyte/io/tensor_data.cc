#include "subbyte/io/tensor_data.h"

#include <cstring>
#include <new>

#include "subbyte/base/error.h"

namespace subbyte {
namespace {

struct ElementInfo {
  const char* name;
  int bytes;
};
constexpr ElementInfo kElements[kElementTypeCount] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
    {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}, {"C64", 8},
};

}  // namespace

const char* element_type_name(ElementType t) { return kElements[int(t)].name; }
int64_t element_type_bytes(ElementType t) { return kElements[int(t)].bytes; }

bool element_type_from_name(std::string_view name, ElementType* t) {
  for (int i = 0; i < kElementTypeCount; ++i) {
    if (name == kElements[i].name) {
      *t = ElementType(i);
      return true;
    }
  }
  return false;
}

bool element_type_to_dtype(ElementType t, DType* dtype) {
  switch (t) {
    case ElementType::kF16: *dtype = DType::kF16; return true;
    case ElementType::kBF16: *dtype = DType::kBF16; return true;
    case ElementType::kF32: *dtype = DType::kF32; return true;
    case ElementType::kF64: *dtype = DType::kF64; return true;
    default: return false;
  }
}

ElementType element_type_of(DType dtype) {
  switch (dtype) {
    case DType::kF16: return ElementType::kF16;
    case DType::kBF16: return ElementType::kBF16;
    case DType::kF64: return ElementType::kF64;
    default: return ElementType::kF32;
  }
}

bool tensor_bytes(ElementType t, std::span<const int64_t> shape, int64_t* bytes) {
  int64_t product = element_type_bytes(t);
  bool zero = false;
  for (const int64_t d : shape) {
    if (d < 0) return false;
    if (d == 0) zero = true;
    else if (__builtin_mul_overflow(product, d, &product)) return false;  // also beside a zero: no reader can index it
  }
  *bytes = zero ? 0 : product;
  return true;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i != 0) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + "]";
}

SharedBytes SharedBytes::allocate(int64_t count, uint8_t** writable) {
  *writable = nullptr;
  if (count == 0) return SharedBytes();
  constexpr std::align_val_t kAlignment{64};
  auto* p = static_cast<uint8_t*>(::operator new(size_t(count), kAlignment));
  std::shared_ptr<const void> owner(p, [](const void* q) { ::operator delete (const_cast<void*>(q), std::align_val_t{64}); });
  *writable = p;
  return SharedBytes({p, size_t(count)}, std::move(owner));
}

SharedBytes SharedBytes::aligned(int64_t alignment) const {
  if (size() == 0 || reinterpret_cast<uintptr_t>(data()) % uintptr_t(alignment) == 0) return *this;
  uint8_t* p = nullptr;
  SharedBytes copy = allocate(size(), &p);
  std::memcpy(p, data(), size_t(size()));
  return copy;
}

PackedMatrix PackedTensor::view() const {
  PackedMatrix w;
  w.layout = spec.layout;
  w.n = spec.n;
  w.k = spec.k;
  w.group_size = spec.group_size;
  w.codes = codes.data();
  w.scales = scales.data();
  w.zero_kind = spec.zero_kind;
  w.zeros = spec.zero_kind == ZeroKind::kFixed ? nullptr : zeros.data();
  w.perm = spec.has_perm ? reinterpret_cast<const int32_t*>(perm.data()) : nullptr;
  w.scale_dtype = spec.scale_dtype;
  w.zero_dtype = spec.zero_dtype;
  return w;
}

}  // namespace subbyte
