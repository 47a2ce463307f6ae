// GGUF files, versions 2 and 3, little-endian: memory-mapped, every field checked before use, nothing allocated beyond a small
// multiple of the file's own header.
//
// Tensors of type Q4_0, Q4_1 and Q8_0 go straight into packed form, with no float in between, in groups of 32:
//   Q4_0   uint4, fixed zero 8, scales f16 = d                 value d * (q - 8)
//   Q4_1   uint4, scales f16 = d, offsets f16 = m              value d * q + m
//   Q8_0   uint8, code = q + 128, fixed zero 128, scales = d   value d * (code - 128)
// so the dequantized values are those of the file, bit for bit. F32, F16, BF16, F64 and I8 to I64 are dense tensors. The other
// types are known by name and size, listed, and refused by conversion.
// Source: the GGUF description in the ggml repository; layout of the blocks: docs/formats.md.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "subbyte/io/mapped_file.h"
#include "subbyte/io/tensor_data.h"

namespace subbyte {

enum class GgufValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12
};
const char* gguf_value_type_name(GgufValueType t);

// An array of a key-value pair, viewed in the file; its bounds were checked when the file was opened. Arrays of arrays are
// refused there, as by every reader of such files.
struct GgufArray {
  GgufValueType type = GgufValueType::kU8;
  uint64_t count = 0;
  std::span<const uint8_t> bytes;

  // Element i as int64, double or bool, by type. std::invalid_argument when i or the type do not fit.
  int64_t integer(uint64_t i) const;
  double number(uint64_t i) const;
  // Walks the strings in order; f returns false to stop.
  template <class F>
  void for_each_string(F&& f) const;
  // The string that starts at byte *offset of `bytes`; moves *offset behind it.
  std::string_view string_at(uint64_t* offset) const;
};

// Integers are kept in their widest form; `type` tells the stored one. Strings point into the file.
struct GgufValue {
  GgufValueType type = GgufValueType::kU8;
  std::variant<uint64_t, int64_t, double, bool, std::string_view, GgufArray> value;
};

// A tensor type of GGUF: `block` values take `block_bytes` bytes. block is 0 for ids this reader does not know.
struct GgufTypeInfo {
  uint32_t id = 0;
  const char* name = "unknown";
  int block = 0;
  int block_bytes = 0;
};
GgufTypeInfo gguf_type_info(uint32_t id);

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first, as in PyTorch (the file has them the other way round)
  GgufTypeInfo type;
  uint64_t begin = 0, bytes = 0;  // in the file; bytes is 0 when the type is unknown

  int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const;  // product of the other dimensions
};

class GgufFile {
 public:
  // Throws IoError or FormatError.
  static std::shared_ptr<const GgufFile> open(const std::string& path);
  static std::shared_ptr<const GgufFile> from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                    std::shared_ptr<const void> owner);

  int version() const { return version_; }
  const std::string& where() const { return where_; }
  // In the file's order.
  const std::vector<std::pair<std::string, GgufValue>>& values() const { return values_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufValue* find_value(std::string_view key) const;
  const GgufTensor* find(std::string_view name) const;
  std::span<const uint8_t> bytes_of(const GgufTensor& t) const { return bytes_.subspan(t.begin, t.bytes); }

  // True for Q4_0, Q4_1, Q8_0 with at most two dimensions; `spec` then says what load gives.
  bool packed_spec(const GgufTensor& t, PackedSpec* spec) const;
  // True for the dense types; *dtype is the element type.
  bool dense_type(const GgufTensor& t, ElementType* dtype) const;
  // Dense (borrowed from the file where its address allows) or packed (new memory). FormatError naming type and tensor for a
  // type that is neither.
  LoadedTensor load(const GgufTensor& t) const;
  // Rows [row_begin, row_end) of a tensor for which packed_spec is true, into rows of canonical codes, scales [rows, G] and
  // (Q4_1) offsets [rows, G]. For conversions that must not hold a whole tensor.
  void convert_rows(const GgufTensor& t, int64_t row_begin, int64_t row_end, uint8_t* codes, uint16_t* scales,
                    uint16_t* offsets) const;
  // See MappedFile::release.
  void release(const GgufTensor& t, uint64_t begin, uint64_t count) const;

 private:
  void parse();
  GgufValue read_value(class ByteReader& reader, GgufValueType type, const std::string& key) const;

  std::string where_;
  std::span<const uint8_t> bytes_;
  std::shared_ptr<const void> owner_;
  std::shared_ptr<const MappedFile> map_;
  int version_ = 0;
  std::vector<std::pair<std::string, GgufValue>> values_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> value_by_key_, tensor_by_name_;
};

template <class F>
void GgufArray::for_each_string(F&& f) const {
  uint64_t offset = 0;
  for (uint64_t i = 0; i < count; ++i)
    if (!f(string_at(&offset))) return;
}

}  // namespace subbyte
