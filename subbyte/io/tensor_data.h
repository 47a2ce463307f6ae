// Tensors as files hold them: dense ones and packed weights, with memory that is owned or borrowed from a mapped file.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

// Element types by their safetensors names.
enum class ElementType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kI64,
  kU64,
  kF64,
  kC64
};
inline constexpr int kElementTypeCount = 16;
// "BOOL", "U8", ... "C64".
const char* element_type_name(ElementType t);
int64_t element_type_bytes(ElementType t);
// False when the name is unknown; *t is then left alone.
bool element_type_from_name(std::string_view name, ElementType* t);
// False when t is no float type that kernels read (F16, BF16, F32, F64).
bool element_type_to_dtype(ElementType t, DType* dtype);
ElementType element_type_of(DType dtype);
// Bytes of a dense tensor; false when a size is negative or the product does not fit in int64.
bool tensor_bytes(ElementType t, std::span<const int64_t> shape, int64_t* bytes);
// "[2, 3]".
std::string shape_text(std::span<const int64_t> shape);

// Bytes that stay alive as long as any copy of this object does. Read-only, cheap to copy.
class SharedBytes {
 public:
  SharedBytes() = default;
  // Borrows: `owner` keeps `bytes` alive.
  SharedBytes(std::span<const uint8_t> bytes, std::shared_ptr<const void> owner) : bytes_(bytes), owner_(std::move(owner)) {}
  // New memory, aligned to 64 bytes, uninitialised; *writable points to it (null when count is 0).
  static SharedBytes allocate(int64_t count, uint8_t** writable);

  const uint8_t* data() const { return bytes_.data(); }
  int64_t size() const { return int64_t(bytes_.size()); }
  std::span<const uint8_t> span() const { return bytes_; }
  const std::shared_ptr<const void>& owner() const { return owner_; }
  // These bytes if their address is a multiple of `alignment`, else a copy whose address is.
  SharedBytes aligned(int64_t alignment) const;

 private:
  std::span<const uint8_t> bytes_;
  std::shared_ptr<const void> owner_;
};

struct DenseTensor {
  std::string name;
  ElementType dtype = ElementType::kF32;
  std::vector<int64_t> shape;
  SharedBytes bytes;  // row-major; the address is a multiple of the element size
};

// What is known of a packed weight without its content (formats/packed_matrix.h says what the parts mean).
struct PackedSpec {
  std::string name;
  RowLayout layout;
  int64_t n = 0, k = 0;
  int64_t group_size = 1;
  DType scale_dtype = DType::kF16;
  ZeroKind zero_kind = ZeroKind::kFixed;
  DType zero_dtype = DType::kF16;
  bool has_perm = false;
  int residual_bits = 0;  // of the residual plane that training keeps beside the codes (ops/packed_update); 0: none

  int64_t groups() const { return ceil_div(k, group_size); }
  int64_t codes_bytes() const { return n * layout.row_bytes; }
  int64_t scales_bytes() const { return n * groups() * dtype_bytes(scale_dtype); }
  int64_t zeros_bytes() const { return zero_kind == ZeroKind::kFixed ? 0 : n * groups() * dtype_bytes(zero_dtype); }
  int64_t perm_bytes() const { return has_perm ? k * 4 : 0; }
  int64_t residual_row_bytes() const { return stream_bytes(k, residual_bits); }
  int64_t residual_bytes() const { return n * residual_row_bytes(); }
  int64_t bytes() const { return codes_bytes() + scales_bytes() + zeros_bytes() + perm_bytes() + residual_bytes(); }
};

struct PackedTensor {
  PackedSpec spec;
  SharedBytes codes, scales, zeros, perm;  // zeros: also offsets, as spec.zero_kind says; empty parts where there are none
  SharedBytes residual;                    // who only computes with the weight need not look at it

  // The deployed weight. Valid while this object lives.
  PackedMatrix view() const;
};

using LoadedTensor = std::variant<DenseTensor, PackedTensor>;

}  // namespace subbyte
