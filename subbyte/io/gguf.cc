#include "subbyte/io/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "subbyte/base/error.h"
#include "subbyte/io/byte_reader.h"
#include "subbyte/io/utf8.h"

namespace subbyte {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMaxNameBytes = 64;
constexpr int kGroup = 32;

constexpr uint32_t kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kI8 = 24, kI16 = 25, kI32 = 26, kI64 = 27, kF64 = 28,
                   kBF16 = 30;
constexpr GgufTypeInfo kTypes[] = {
    {kF32, "F32", 1, 4},      {kF16, "F16", 1, 2},      {kQ4_0, "Q4_0", 32, 18},  {kQ4_1, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {kQ8_0, "Q8_0", 32, 34},  {9, "Q8_1", 32, 40},
    {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136}, {kI8, "I8", 1, 1},        {kI16, "I16", 1, 2},
    {kI32, "I32", 1, 4},      {kI64, "I64", 1, 8},      {kF64, "F64", 1, 8},      {29, "IQ1_M", 256, 56},
    {kBF16, "BF16", 1, 2},    {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},    {41, "Q1_0", 128, 18},    {42, "Q2_0", 64, 18},
};

// Bytes of one value; 0 for strings and arrays, which carry their own length, and -1 for unknown types.
int value_bytes(GgufValueType t) {
  switch (t) {
    case GgufValueType::kU8:
    case GgufValueType::kI8:
    case GgufValueType::kBool: return 1;
    case GgufValueType::kU16:
    case GgufValueType::kI16: return 2;
    case GgufValueType::kU32:
    case GgufValueType::kI32:
    case GgufValueType::kF32: return 4;
    case GgufValueType::kU64:
    case GgufValueType::kI64:
    case GgufValueType::kF64: return 8;
    case GgufValueType::kString:
    case GgufValueType::kArray: return 0;
  }
  return -1;
}

uint16_t load_u16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

std::string_view read_string(ByteReader& reader, const std::string& where, const char* what, uint64_t max_bytes) {
  const uint64_t at = reader.offset();
  const auto count = reader.read<uint64_t>(where, what);
  if (count > max_bytes)
    throw FormatError(where, at, detail::concat(what, " has ", count, " bytes, expected at most ", max_bytes));
  return {reinterpret_cast<const char*>(reader.take(count, where, what)), size_t(count)};
}

// Names go into error messages and terminals: bytes outside printable ASCII are shown as \xNN.
std::string printable(std::string_view text) {
  static const char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, 80)) {
    const auto u = uint8_t(c);
    if (u >= 0x20 && u < 0x7f) out += c;
    else out += std::string("\\x") + kHex[u >> 4] + kHex[u & 15];
  }
  return out;
}

}  // namespace

const char* gguf_value_type_name(GgufValueType t) {
  static constexpr const char* kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                           "bool", "string", "array", "u64", "i64", "f64"};
  return uint32_t(t) < std::size(kNames) ? kNames[uint32_t(t)] : "unknown";
}

GgufTypeInfo gguf_type_info(uint32_t id) {
  for (const GgufTypeInfo& t : kTypes)
    if (t.id == id) return t;
  GgufTypeInfo unknown;
  unknown.id = id;
  return unknown;
}

int64_t GgufArray::integer(uint64_t i) const {
  check_arg(i < count, "GGUF array: element ", i, " of ", count);
  ByteReader reader(bytes, i * uint64_t(std::max(value_bytes(type), 0)));
  switch (type) {
    case GgufValueType::kBool:
    case GgufValueType::kU8: return reader.read<uint8_t>("GGUF array", "element");
    case GgufValueType::kI8: return reader.read<int8_t>("GGUF array", "element");
    case GgufValueType::kU16: return reader.read<uint16_t>("GGUF array", "element");
    case GgufValueType::kI16: return reader.read<int16_t>("GGUF array", "element");
    case GgufValueType::kU32: return reader.read<uint32_t>("GGUF array", "element");
    case GgufValueType::kI32: return reader.read<int32_t>("GGUF array", "element");
    case GgufValueType::kI64: return reader.read<int64_t>("GGUF array", "element");
    case GgufValueType::kU64: {
      const auto v = reader.read<uint64_t>("GGUF array", "element");
      check_arg(v <= uint64_t(INT64_MAX), "GGUF array: element ", i, " is ", v, ", above int64");
      return int64_t(v);
    }
    default: break;
  }
  throw std::invalid_argument(detail::concat("GGUF array of ", gguf_value_type_name(type), ", expected integers"));
}

double GgufArray::number(uint64_t i) const {
  check_arg(i < count, "GGUF array: element ", i, " of ", count);
  ByteReader reader(bytes, i * uint64_t(std::max(value_bytes(type), 0)));
  if (type == GgufValueType::kF32) return double(reader.read<float>("GGUF array", "element"));
  if (type == GgufValueType::kF64) return reader.read<double>("GGUF array", "element");
  if (type == GgufValueType::kU64) return double(reader.read<uint64_t>("GGUF array", "element"));
  return double(integer(i));
}

std::string_view GgufArray::string_at(uint64_t* offset) const {
  check_arg(type == GgufValueType::kString && *offset <= bytes.size(), "GGUF array of ", gguf_value_type_name(type),
            ", expected strings");
  ByteReader reader(bytes, *offset);
  const std::string_view text = read_string(reader, "GGUF array", "string", UINT64_MAX);
  *offset = reader.offset();
  return text;
}

int64_t GgufTensor::rows() const {
  int64_t n = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) n *= shape[i];
  return n;
}

GgufValue GgufFile::read_value(ByteReader& r, GgufValueType type, const std::string& key) const {
  using T = GgufValueType;
  auto boolean = [&]() {
    const uint64_t at = r.offset();
    const auto v = r.read<uint8_t>(key, "bool");
    if (v > 1) throw FormatError(key, at, detail::concat("bool is ", int(v), ", expected 0 or 1"));
    return v == 1;
  };
  switch (type) {
    case T::kU8: return {type, uint64_t(r.read<uint8_t>(key, "value"))};
    case T::kU16: return {type, uint64_t(r.read<uint16_t>(key, "value"))};
    case T::kU32: return {type, uint64_t(r.read<uint32_t>(key, "value"))};
    case T::kU64: return {type, r.read<uint64_t>(key, "value")};
    case T::kI8: return {type, int64_t(r.read<int8_t>(key, "value"))};
    case T::kI16: return {type, int64_t(r.read<int16_t>(key, "value"))};
    case T::kI32: return {type, int64_t(r.read<int32_t>(key, "value"))};
    case T::kI64: return {type, r.read<int64_t>(key, "value")};
    case T::kF32: return {type, double(r.read<float>(key, "value"))};
    case T::kF64: return {type, r.read<double>(key, "value")};
    case T::kBool: return {type, boolean()};
    case T::kString: return {type, read_string(r, key, "string", UINT64_MAX)};
    case T::kArray: break;
  }
  GgufArray array;
  const uint64_t at = r.offset();
  array.type = GgufValueType(r.read<uint32_t>(key, "element type"));
  const int element_bytes = value_bytes(array.type);
  if (element_bytes < 0 || array.type == T::kArray)
    throw FormatError(key, at, detail::concat("arrays of type ", uint32_t(array.type), " are not readable"));
  array.count = r.read<uint64_t>(key, "array length");
  const uint64_t begin = r.offset();
  if (array.type == T::kString) {
    // 8 bytes a string at least, so a length that lies ends soon.
    for (uint64_t i = 0; i < array.count; ++i) read_string(r, key, "string in array", UINT64_MAX);
  } else {
    if (array.count > r.remaining() / uint64_t(element_bytes))
      throw FormatError(key, begin, detail::concat("an array of ", array.count, " elements does not fit in the file"));
    r.take(array.count * uint64_t(element_bytes), key, "array");
  }
  array.bytes = bytes_.subspan(begin, r.offset() - begin);
  if (array.type == T::kBool)
    for (uint64_t i = 0; i < array.count; ++i)
      if (array.bytes[i] > 1) throw FormatError(key, begin + i, "bool in array is neither 0 nor 1");
  return {type, array};
}

void GgufFile::parse() {
  ByteReader r(bytes_);
  if (r.read<uint32_t>(where_, "magic") != kMagic) throw FormatError(where_, 0, "the file does not begin with 'GGUF'");
  const auto version = r.read<uint32_t>(where_, "version");
  if (version != 2 && version != 3) {
    const bool big_endian = version != 0 && (version & 0xffffu) == 0;
    throw FormatError(where_, 4,
                      big_endian ? std::string("the file is big-endian, expected little-endian")
                                 : detail::concat("version is ", version, ", expected 2 or 3"));
  }
  version_ = int(version);
  const auto tensor_count = r.read<uint64_t>(where_, "tensor count");
  const auto value_count = r.read<uint64_t>(where_, "key-value count");
  // The smallest key-value pair has 13 bytes, the smallest tensor description 24.
  if (value_count > r.remaining() / 13)
    throw FormatError(where_, 16, detail::concat(value_count, " key-value pairs do not fit in the file"));
  if (tensor_count > r.remaining() / 24)
    throw FormatError(where_, 8, detail::concat(tensor_count, " tensors do not fit in the file"));

  for (uint64_t i = 0; i < value_count; ++i) {
    const uint64_t at = r.offset();
    const std::string key(read_string(r, detail::concat(where_, ": key-value ", i), "key", 65535));
    const std::string where = where_ + ": key '" + printable(key) + "'";
    if (key.empty()) throw FormatError(where, at, "the key is empty");
    if (!is_utf8(key)) throw FormatError(where, at, "the key is not valid UTF-8");
    const uint64_t type_at = r.offset();
    const auto type = GgufValueType(r.read<uint32_t>(where, "value type"));
    if (value_bytes(type) < 0) throw FormatError(where, type_at, detail::concat("value type ", uint32_t(type), " is unknown"));
    values_.emplace_back(key, read_value(r, type, where));
  }
  for (size_t i = 0; i < values_.size(); ++i)
    if (!value_by_key_.emplace(values_[i].first, i).second)
      throw FormatError(where_ + ": key '" + printable(values_[i].first) + "'", r.offset(), "is given twice");

  uint64_t alignment = 32;
  if (const GgufValue* v = find_value("general.alignment"); v != nullptr) {
    if (v->type != GgufValueType::kU32)
      throw FormatError(where_ + ": key 'general.alignment'", r.offset(), "is not of type u32");
    alignment = std::get<uint64_t>(v->value);
    if (!std::has_single_bit(alignment))
      throw FormatError(where_ + ": key 'general.alignment'", r.offset(),
                        detail::concat("is ", alignment, ", expected a power of two"));
  }

  for (uint64_t i = 0; i < tensor_count; ++i) {
    const uint64_t at = r.offset();
    GgufTensor t;
    t.name = std::string(read_string(r, detail::concat(where_, ": tensor ", i), "tensor name", kMaxNameBytes));
    const std::string where = where_ + ": tensor '" + printable(t.name) + "'";
    if (t.name.empty()) throw FormatError(where, at, "the name is empty");
    if (!is_utf8(t.name)) throw FormatError(where, at, "the name is not valid UTF-8");
    const auto dims = r.read<uint32_t>(where, "number of dimensions");
    if (dims > kMaxDims) throw FormatError(where, at, detail::concat("has ", dims, " dimensions, expected at most ", kMaxDims));
    uint64_t elems = 1;
    for (uint32_t d = 0; d < dims; ++d) {
      const uint64_t dim_at = r.offset();
      const auto size = r.read<uint64_t>(where, "dimension");
      if (size > uint64_t(INT64_MAX) || (size != 0 && __builtin_mul_overflow(elems, size, &elems)) ||
          elems > uint64_t(INT64_MAX) / 64)
        throw FormatError(where, dim_at, detail::concat("dimension ", size, " overflows"));
      t.shape.insert(t.shape.begin(), int64_t(size));
    }
    t.type = gguf_type_info(r.read<uint32_t>(where, "type"));
    const uint64_t offset_at = r.offset();
    t.begin = r.read<uint64_t>(where, "offset");  // relative to the data until below
    if (t.begin % alignment != 0)
      throw FormatError(where, offset_at,
                        detail::concat("data offset ", t.begin, " is not a multiple of the alignment ", alignment));
    if (std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end()) elems = 0;
    if (t.type.block != 0) {
      if (t.columns() % t.type.block != 0)
        throw FormatError(
            where, at,
            detail::concat(t.type.name, " rows have ", t.columns(), " values, expected a multiple of ", t.type.block));
      if (__builtin_mul_overflow(elems / uint64_t(t.type.block), uint64_t(t.type.block_bytes), &t.bytes))
        throw FormatError(where, at, "the size overflows");
    }
    tensors_.push_back(std::move(t));
  }

  const uint64_t header_end = r.offset();
  const uint64_t padding = (alignment - header_end % alignment) % alignment;
  const uint64_t data_begin = std::min<uint64_t>(header_end + padding, bytes_.size());
  const uint64_t data_bytes = bytes_.size() - data_begin;
  std::vector<const GgufTensor*> by_offset;
  for (GgufTensor& t : tensors_) {
    if (t.begin > data_bytes || t.bytes > data_bytes - t.begin)
      throw FormatError(where_ + ": tensor '" + printable(t.name) + "'", data_begin,
                        detail::concat("data [", t.begin, ", +", t.bytes, ") lies beyond the ", data_bytes, " bytes of data"));
    t.begin += data_begin;
    by_offset.push_back(&t);
  }
  std::sort(by_offset.begin(), by_offset.end(), [](const GgufTensor* a, const GgufTensor* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->bytes < b->bytes;
  });
  for (size_t i = 1; i < by_offset.size(); ++i)
    if (by_offset[i - 1]->begin + by_offset[i - 1]->bytes > by_offset[i]->begin)
      throw FormatError(where_ + ": tensor '" + printable(by_offset[i]->name) + "'", by_offset[i]->begin,
                        "the data overlaps that of tensor '" + printable(by_offset[i - 1]->name) + "'");
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (!tensor_by_name_.emplace(tensors_[i].name, i).second)
      throw FormatError(where_ + ": tensor '" + printable(tensors_[i].name) + "'", header_end, "is described twice");
}

std::shared_ptr<const GgufFile> GgufFile::from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                     std::shared_ptr<const void> owner) {
  auto out = std::shared_ptr<GgufFile>(new GgufFile());
  out->where_ = where;
  out->bytes_ = file;
  out->owner_ = std::move(owner);
  out->parse();
  return out;
}

std::shared_ptr<const GgufFile> GgufFile::open(const std::string& path) {
  auto out = std::shared_ptr<GgufFile>(new GgufFile());
  out->map_ = std::make_shared<const MappedFile>(path);
  out->where_ = path;
  out->bytes_ = out->map_->bytes();
  out->owner_ = out->map_;
  out->parse();
  return out;
}

const GgufValue* GgufFile::find_value(std::string_view key) const {
  const auto it = value_by_key_.find(key);
  return it == value_by_key_.end() ? nullptr : &values_[it->second].second;
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto it = tensor_by_name_.find(name);
  return it == tensor_by_name_.end() ? nullptr : &tensors_[it->second];
}

bool GgufFile::packed_spec(const GgufTensor& t, PackedSpec* spec) const {
  const uint32_t id = t.type.id;
  if ((id != kQ4_0 && id != kQ4_1 && id != kQ8_0) || t.shape.size() > 2) return false;
  *spec = PackedSpec{};
  spec->name = t.name;
  spec->n = t.rows();
  spec->k = t.columns();
  spec->layout = row_layout(id == kQ8_0 ? Format::kUint8 : Format::kUint4, spec->k);
  spec->group_size = kGroup;
  spec->zero_kind = id == kQ4_1 ? ZeroKind::kOffsets : ZeroKind::kFixed;
  return true;
}

bool GgufFile::dense_type(const GgufTensor& t, ElementType* dtype) const {
  switch (t.type.id) {
    case kF32: *dtype = ElementType::kF32; return true;
    case kF16: *dtype = ElementType::kF16; return true;
    case kBF16: *dtype = ElementType::kBF16; return true;
    case kF64: *dtype = ElementType::kF64; return true;
    case kI8: *dtype = ElementType::kI8; return true;
    case kI16: *dtype = ElementType::kI16; return true;
    case kI32: *dtype = ElementType::kI32; return true;
    case kI64: *dtype = ElementType::kI64; return true;
    default: return false;
  }
}

void GgufFile::convert_rows(const GgufTensor& t, int64_t row_begin, int64_t row_end, uint8_t* codes, uint16_t* scales,
                            uint16_t* offsets) const {
  const uint32_t id = t.type.id;
  check_arg(id == kQ4_0 || id == kQ4_1 || id == kQ8_0, "GGUF convert_rows: tensor '", printable(t.name), "' is ", t.type.name,
            ", expected Q4_0, Q4_1 or Q8_0");
  check_arg(0 <= row_begin && row_begin <= row_end && row_end <= t.rows(), "GGUF convert_rows: rows [", row_begin, ", ",
            row_end, ") of ", t.rows());
  const int64_t blocks_a_row = t.columns() / kGroup;
  const int64_t count = (row_end - row_begin) * blocks_a_row;
  const uint8_t* block = bytes_.data() + t.begin + uint64_t(row_begin * blocks_a_row) * uint64_t(t.type.block_bytes);
  for (int64_t i = 0; i < count; ++i, block += t.type.block_bytes) {
    scales[i] = load_u16(block);
    if (id == kQ8_0) {
      for (int j = 0; j < kGroup; ++j) codes[j] = uint8_t(block[2 + j] ^ 0x80);  // q + 128
      codes += kGroup;
      continue;
    }
    const uint8_t* qs = block + 2;
    if (id == kQ4_1) {
      offsets[i] = load_u16(block + 2);
      qs = block + 4;
    }
    // Byte j holds values j and j + 16; canonical byte j holds values 2j and 2j + 1.
    for (int j = 0; j < 8; ++j) {
      codes[j] = uint8_t((qs[2 * j] & 15) | (qs[2 * j + 1] & 15) << 4);
      codes[8 + j] = uint8_t(qs[2 * j] >> 4 | (qs[2 * j + 1] & 0xf0));
    }
    codes += kGroup / 2;
  }
}

LoadedTensor GgufFile::load(const GgufTensor& t) const {
  ElementType dtype;
  if (dense_type(t, &dtype)) {
    const SharedBytes bytes(bytes_of(t), owner_);
    return DenseTensor{t.name, dtype, t.shape, bytes.aligned(element_type_bytes(dtype))};
  }
  PackedTensor out;
  if (!packed_spec(t, &out.spec))
    throw FormatError(
        where_ + ": tensor '" + printable(t.name) + "'", t.begin,
        detail::concat("type ", t.type.id, " (", t.type.name, ") with ", t.shape.size(),
                       " dimensions is not readable, expected F32, F16, BF16, F64, I8 to I64, or Q4_0, Q4_1, Q8_0 with "
                       "at most two dimensions"));
  uint8_t *codes = nullptr, *scales = nullptr, *offsets = nullptr;
  out.codes = SharedBytes::allocate(out.spec.codes_bytes(), &codes);
  out.scales = SharedBytes::allocate(out.spec.scales_bytes(), &scales);
  out.zeros = SharedBytes::allocate(out.spec.zeros_bytes(), &offsets);
  convert_rows(t, 0, out.spec.n, codes, reinterpret_cast<uint16_t*>(scales), reinterpret_cast<uint16_t*>(offsets));
  return out;
}

void GgufFile::release(const GgufTensor& t, uint64_t begin, uint64_t count) const {
  if (map_ != nullptr) map_->release(t.begin + begin, count);
}

}  // namespace subbyte
