#include "subbyte/io/checkpoint.h"

#include <unordered_set>

#include "subbyte/base/error.h"
#include "subbyte/io/json_events.h"

namespace subbyte {
namespace {

constexpr const char* kKey = "subbyte";
// Far above any layer, and small enough that no product of sizes below overflows.
constexpr uint64_t kMaxColumns = uint64_t(1) << 40;
constexpr size_t kNoTensor = SIZE_MAX;

struct WeightRecord {
  std::string name, format;
  uint64_t in_features = 0, group_size = 0, residual_bits = 0;
  bool has_format = false, has_in_features = false, has_group_size = false;
};

struct Schema {
  std::vector<WeightRecord> weights;
  std::vector<std::pair<std::string, std::string>> tied;
};

Schema parse_schema(const std::string& text, const std::string& where) {
  Schema schema;
  std::vector<WeightRecord>& out = schema.weights;
  bool has_version = false;
  auto fail = [&](const std::string& what, const std::string& expectation) { throw FormatError(where + what, 8, expectation); };
  const std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  parse_json(bytes, where, 8, 4, [&](const JsonEvent& e) {
    const size_t depth = e.path.size();
    if (depth == 0) {
      if (e.kind != JsonEvent::kOpenObject && e.kind != JsonEvent::kClose) fail("", "is not a JSON object");
      return;
    }
    if (e.path[0] == "version") {
      if (depth != 1 || e.kind != JsonEvent::kUnsigned || e.in_array) fail("", "version is not a number");
      if (e.number != uint64_t(kCheckpointVersion))
        fail("", detail::concat("version is ", e.number, ", this reader knows version ", kCheckpointVersion));
      has_version = true;
      return;
    }
    if (e.path[0] == "tied") {
      if (depth == 1 && (e.kind == JsonEvent::kOpenObject || e.kind == JsonEvent::kClose)) return;
      if (depth != 2 || e.kind != JsonEvent::kString || e.in_array) fail("", "tied is not an object of names");
      schema.tied.emplace_back(e.path[1], e.text);
      return;
    }
    if (e.path[0] != "weights") return;  // later writers may say more about the file as a whole
    if (depth == 1) {
      if (e.kind != JsonEvent::kOpenObject && e.kind != JsonEvent::kClose) fail("", "weights is not an object");
      return;
    }
    const std::string what = ": weight '" + e.path[1] + "'";
    if (depth == 2) {
      if (e.kind == JsonEvent::kOpenObject) {
        out.emplace_back();
        out.back().name = e.path[1];
      } else if (e.kind != JsonEvent::kClose) {
        fail(what, "is not an object");
      } else if (const WeightRecord& w = out.back(); !w.has_format || !w.has_in_features || !w.has_group_size) {
        fail(what, "lacks format, in_features or group_size");
      }
      return;
    }
    WeightRecord& w = out.back();
    const std::string& key = e.path[2];
    if (depth != 3 || e.in_array) fail(what, "'" + key + "' is not a plain value");
    if (key == "format" && e.kind == JsonEvent::kString) {
      w.format = e.text;
      w.has_format = true;
    } else if (key == "in_features" && e.kind == JsonEvent::kUnsigned) {
      w.in_features = e.number;
      w.has_in_features = true;
    } else if (key == "group_size" && e.kind == JsonEvent::kUnsigned) {
      w.group_size = e.number;
      w.has_group_size = true;
    } else if (key == "residual_bits" && e.kind == JsonEvent::kUnsigned) {
      w.residual_bits = e.number;
    } else {
      fail(what, "'" + key + "' is unknown or of the wrong kind");
    }
  });
  if (!has_version) fail("", "has no version");
  return schema;
}

// First byte of [row of `layout` at p] that is no encoding of codes of their format, or -1.
int64_t bad_code_byte(const uint8_t* p, const RowLayout& layout) {
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int bits = format_bits(s.format), levels = format_levels(s.format);
    const int64_t bytes = stream_bytes(s.k_count, bits);
    const int used = int(s.k_count % 8) * bits % 8;
    if (bytes > 0 && used != 0 && p[s.byte_begin + bytes - 1] >> used != 0) return s.byte_begin + bytes - 1;
    if (levels == 1 << bits) continue;
    const uint8_t* row = p + s.byte_begin;
    if (bits == 2 && levels == 3) {  // four codes a byte: 3 is both bits set
      uint8_t any = 0;
      for (int64_t b = 0; b < bytes; ++b) any |= uint8_t(row[b] & (row[b] >> 1) & 0x55);
      if (any == 0) continue;
    }
    for (int64_t k = 0; k < s.k_count; ++k)
      if (get_code(row, k, bits) >= uint32_t(levels)) return s.byte_begin + k / 8 * bits + k % 8 * bits / 8;
  }
  return -1;
}

const char* zeros_suffix(ZeroKind kind) { return kind == ZeroKind::kOffsets ? ".offsets" : ".zeros"; }

}  // namespace

void CheckpointFile::add_packed(const std::string& name, const std::string& format, const Described& told,
                                const std::string& where) {
  const auto [in_features, group_size, residual_bits] = told;
  const std::string what = where + ": weight '" + name + "'";
  if (in_features > kMaxColumns || group_size < 1 || group_size > kMaxColumns)
    throw FormatError(what, 8, detail::concat("in_features ", in_features, " or group_size ", group_size, " is out of range"));
  PackedSpec spec;
  spec.name = name;
  spec.k = int64_t(in_features);
  spec.group_size = int64_t(group_size);
  try {
    spec.layout = row_layout(format, spec.k);
  } catch (const std::invalid_argument& e) {
    throw FormatError(what, 8, e.what());
  }
  for (int i = 0; i + 1 < spec.layout.segment_count; ++i) {
    const Segment& s = spec.layout.segments[i];
    if ((s.k_begin + s.k_count) % spec.group_size != 0)
      throw FormatError(what, 8, detail::concat("format segment ", i, " ends inside a group of ", group_size, " columns"));
  }

  if (residual_bits > uint64_t(8 - spec.layout.max_bits()))
    throw FormatError(what, 8,
                      detail::concat("residual_bits is ", residual_bits, " beside codes of ", spec.layout.max_bits(),
                                     " bits, expected at most 8 together"));
  spec.residual_bits = int(residual_bits);

  Parts parts;
  parts.codes = file_->find(name + ".codes");
  parts.scales = file_->find(name + ".scales");
  const SafetensorsEntry *zeros = file_->find(name + ".zeros"), *offsets = file_->find(name + ".offsets");
  parts.perm = file_->find(name + ".perm");
  if (parts.codes == nullptr || parts.scales == nullptr)
    throw FormatError(what, 8,
                      std::string("the file has no tensor '") + name + (parts.codes == nullptr ? ".codes'" : ".scales'"));
  auto fail = [&](const SafetensorsEntry& e, const std::string& expectation) {
    throw FormatError(file_->path_of(e) + ": tensor '" + e.name + "'", e.begin, expectation);
  };
  auto demand_shape = [&](const SafetensorsEntry& e, std::initializer_list<int64_t> shape) {
    if (e.shape != std::vector<int64_t>(shape))
      fail(e, "shape is " + shape_text(e.shape) + ", expected " + shape_text({shape.begin(), shape.size()}));
  };
  auto float_type = [&](const SafetensorsEntry& e) {
    DType t = DType::kF64;
    if (!element_type_to_dtype(e.dtype, &t) || t == DType::kF64)
      fail(e, std::string("dtype is ") + element_type_name(e.dtype) + ", expected F32, F16 or BF16");
    return t;
  };
  if (zeros != nullptr && offsets != nullptr) fail(*zeros, "the weight has zeros and offsets, expected at most one of them");
  if (parts.codes->dtype != ElementType::kU8)
    fail(*parts.codes, std::string("dtype is ") + element_type_name(parts.codes->dtype) + ", expected U8");
  spec.n = parts.codes->shape.empty() ? 0 : parts.codes->shape[0];
  demand_shape(*parts.codes, {spec.n, spec.layout.row_bytes});
  spec.scale_dtype = float_type(*parts.scales);
  demand_shape(*parts.scales, {spec.n, spec.groups()});
  parts.zeros = zeros != nullptr ? zeros : offsets;
  if (parts.zeros != nullptr) {
    spec.zero_kind = zeros != nullptr ? ZeroKind::kZeros : ZeroKind::kOffsets;
    spec.zero_dtype = float_type(*parts.zeros);
    demand_shape(*parts.zeros, {spec.n, spec.groups()});
  }
  if (parts.perm != nullptr) {
    spec.has_perm = true;
    if (parts.perm->dtype != ElementType::kI32)
      fail(*parts.perm, std::string("dtype is ") + element_type_name(parts.perm->dtype) + ", expected I32");
    demand_shape(*parts.perm, {spec.k});
  }
  if (spec.residual_bits > 0) {
    parts.residual = file_->find(name + ".residual");
    if (parts.residual == nullptr) throw FormatError(what, 8, "the file has no tensor '" + name + ".residual'");
    if (parts.residual->dtype != ElementType::kU8)
      fail(*parts.residual, std::string("dtype is ") + element_type_name(parts.residual->dtype) + ", expected U8");
    demand_shape(*parts.residual, {spec.n, spec.residual_row_bytes()});
  }
  packed_.push_back(std::move(spec));
  parts_.push_back(parts);
}

std::shared_ptr<const CheckpointFile> CheckpointFile::build(std::shared_ptr<const SafetensorsFile> file) {
  auto out = std::shared_ptr<CheckpointFile>(new CheckpointFile());
  out->file_ = std::move(file);
  const SafetensorsFile& f = *out->file_;
  for (size_t shard = 0; shard < f.shard_metadata().size(); ++shard) {  // each shard describes weights of its own
    const auto it = f.shard_metadata()[shard].find(kKey);
    if (it == f.shard_metadata()[shard].end()) continue;
    out->native_ = true;
    const std::string where = f.shard_path(shard) + ": metadata 'subbyte'";
    Schema schema = parse_schema(it->second, where);
    for (const WeightRecord& w : schema.weights)
      out->add_packed(w.name, w.format, {w.in_features, w.group_size, w.residual_bits}, where);
    for (auto& [name, other] : schema.tied)
      if (const auto [at, fresh] = out->tied_.emplace(std::move(name), std::move(other)); !fresh)
        throw FormatError(where + ": '" + at->first + "'", 8, "is tied in two shards");
  }
  for (size_t i = 0; i < out->packed_.size(); ++i)
    if (!out->by_name_.emplace(out->packed_[i].name, i).second)
      throw FormatError(f.shard_path(0) + ": metadata 'subbyte': weight '" + out->packed_[i].name + "'", 8,
                        "is described in two shards");
  std::unordered_map<const SafetensorsEntry*, std::string_view> owner_of;
  for (size_t i = 0; i < out->parts_.size(); ++i) {
    const Parts& p = out->parts_[i];
    for (const SafetensorsEntry* e : {p.codes, p.scales, p.zeros, p.perm, p.residual}) {
      if (e == nullptr) continue;
      if (const auto [it, fresh] = owner_of.emplace(e, out->packed_[i].name); !fresh)
        throw FormatError(f.path_of(*e) + ": tensor '" + e->name + "'", e->begin, "belongs to two packed weights");
    }
  }
  for (const SafetensorsEntry& e : f.entries()) {
    if (owner_of.find(&e) != owner_of.end()) continue;
    if (out->by_name_.find(e.name) != out->by_name_.end())
      throw FormatError(f.path_of(e) + ": tensor '" + e.name + "'", e.begin, "is stored dense and packed");
    out->dense_.push_back(&e);
  }
  for (const auto& [name, other] : out->tied_) {
    const SafetensorsEntry* entry = f.find(other);
    const bool stored = out->by_name_.count(other) != 0 || (entry != nullptr && owner_of.count(entry) == 0);
    if (!stored || out->by_name_.count(name) != 0 || f.find(name) != nullptr)
      throw FormatError(f.shard_path(0) + ": metadata 'subbyte': '" + name + "'", 8,
                        "is tied to '" + other + "', " + (stored ? "but stored too" : "which the file does not hold"));
  }
  return out;
}

std::string_view CheckpointFile::stored_name(std::string_view name) const {
  const auto it = tied_.find(name);
  return it == tied_.end() ? name : std::string_view(it->second);
}

std::shared_ptr<const CheckpointFile> CheckpointFile::open(const std::string& path) {
  return build(SafetensorsFile::open(path));
}

std::shared_ptr<const CheckpointFile> CheckpointFile::from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                                 std::shared_ptr<const void> owner) {
  return build(SafetensorsFile::from_bytes(file, where, std::move(owner)));
}

const PackedSpec* CheckpointFile::find_packed(std::string_view name) const {
  const auto it = by_name_.find(stored_name(name));
  return it == by_name_.end() ? nullptr : &packed_[it->second];
}

PackedTensor CheckpointFile::load_rows(const PackedSpec& spec, int64_t row_begin, int64_t row_end) const {
  const auto it = by_name_.find(spec.name);
  check_arg(it != by_name_.end(), "checkpoint: weight '", spec.name, "' is not in the file");
  const PackedSpec& stored = packed_[it->second];
  const Parts& parts = parts_[it->second];
  check_arg(0 <= row_begin && row_begin <= row_end && row_end <= stored.n, "checkpoint: rows [", row_begin, ", ", row_end,
            ") of ", stored.n);
  PackedTensor out;
  out.spec = stored;
  out.spec.n = row_end - row_begin;
  auto rows_of = [&](const SafetensorsEntry* e, int64_t row_bytes) {
    if (e == nullptr) return SharedBytes();
    return file_->borrow(*e, uint64_t(row_begin * row_bytes), uint64_t(out.spec.n * row_bytes));
  };
  out.codes = rows_of(parts.codes, stored.layout.row_bytes);
  out.scales = rows_of(parts.scales, stored.groups() * dtype_bytes(stored.scale_dtype));
  out.zeros = rows_of(parts.zeros, stored.groups() * dtype_bytes(stored.zero_dtype));
  out.residual = rows_of(parts.residual, stored.residual_row_bytes());
  if (stored.has_perm) out.perm = file_->load(*parts.perm).bytes;

  if (stored.layout.row_bytes > 0) {
    for (int64_t n = 0; n < out.spec.n; ++n) {
      const int64_t bad = bad_code_byte(out.codes.data() + n * stored.layout.row_bytes, stored.layout);
      if (bad >= 0)
        throw FormatError(file_->path_of(*parts.codes) + ": tensor '" + parts.codes->name + "'",
                          parts.codes->begin + uint64_t((row_begin + n) * stored.layout.row_bytes + bad),
                          "the byte holds a code outside its format, or spare bits that are not zero");
    }
  }
  // Every pattern of a residual means something; only its spare bits can be wrong. Rows without such are not read.
  const int used = int(stored.k % 8) * stored.residual_bits % 8;
  for (int64_t n = 0; used != 0 && n < out.spec.n; ++n) {
    const int64_t last = (n + 1) * stored.residual_row_bytes() - 1;
    if (out.residual.data()[last] >> used != 0)
      throw FormatError(file_->path_of(*parts.residual) + ": tensor '" + parts.residual->name + "'",
                        parts.residual->begin + uint64_t(row_begin * stored.residual_row_bytes() + last),
                        "the byte holds spare bits that are not zero");
  }
  if (stored.has_perm) {
    std::vector<bool> seen(size_t(stored.k), false);
    const auto* perm = reinterpret_cast<const int32_t*>(out.perm.data());
    for (int64_t k = 0; k < stored.k; ++k) {
      const int32_t p = perm[k];
      if (p < 0 || p >= stored.k || seen[size_t(p)])
        throw FormatError(
            file_->path_of(*parts.perm) + ": tensor '" + parts.perm->name + "'", parts.perm->begin + uint64_t(k) * 4,
            detail::concat("perm[", k, "] is ", p, p < 0 || p >= stored.k ? ", outside [0, " : ", for the second time in [0, ",
                           stored.k, ")"));
      seen[size_t(p)] = true;
    }
  }
  return out;
}

void CheckpointFile::release_rows(const PackedSpec& spec, int64_t row_begin, int64_t row_end) const {
  const auto it = by_name_.find(spec.name);
  if (it == by_name_.end()) return;
  const int64_t row_bytes = packed_[it->second].layout.row_bytes;
  file_->release(*parts_[it->second].codes, uint64_t(row_begin * row_bytes), uint64_t((row_end - row_begin) * row_bytes));
}

CheckpointWriter::CheckpointWriter(const std::string& path, std::vector<TensorDeclaration> dense,
                                   std::vector<PackedSpec> packed, std::map<std::string, std::string> metadata,
                                   const std::map<std::string, std::string, std::less<>>& tied)
    : packed_(std::move(packed)) {
  check_arg(metadata.count(kKey) == 0 && metadata.count("format") == 0,
            "checkpoint writer: metadata keys 'subbyte' and 'format' are the writer's own");
  std::unordered_set<std::string> dense_names;
  for (const TensorDeclaration& t : dense) dense_names.insert(t.name);
  std::string schema = detail::concat("{\"version\":", kCheckpointVersion, ",\"weights\":{");
  bool first = true;
  for (const PackedSpec& s : packed_) {
    check_arg(s.n >= 0 && s.k >= 0 && s.group_size >= 1 && s.layout.k == s.k, "checkpoint writer: weight '", s.name, "' is [",
              s.n, ", ", s.k, "] in groups of ", s.group_size, " with a layout for ", s.layout.k, " columns");
    check_arg(s.scale_dtype != DType::kF64 && s.zero_dtype != DType::kF64, "checkpoint writer: weight '", s.name,
              "' has float64 scales or zeros, expected float32, float16 or bfloat16");
    check_arg(s.residual_bits >= 0 && s.residual_bits + s.layout.max_bits() <= 8, "checkpoint writer: weight '", s.name,
              "' has a residual of ", s.residual_bits, " bits beside codes of ", s.layout.max_bits(),
              ", expected at most 8 together");
    check_arg(dense_names.count(s.name) == 0, "checkpoint writer: weight '", s.name, "' is declared dense and packed");
    if (!first) schema += ",";
    schema += json_quoted(s.name, "weight name") + ":{\"format\":\"" + s.layout.name() +
              "\",\"in_features\":" + std::to_string(s.k) + ",\"group_size\":" + std::to_string(s.group_size);
    if (s.residual_bits > 0) schema += ",\"residual_bits\":" + std::to_string(s.residual_bits);
    schema += "}";
    first = false;
    std::array<size_t, 5> index{};
    index.fill(kNoTensor);
    auto declare = [&](Part part, const char* suffix, ElementType type, std::vector<int64_t> shape) {
      index[size_t(part)] = dense.size();
      dense.push_back({s.name + suffix, type, std::move(shape)});
    };
    declare(Part::kCodes, ".codes", ElementType::kU8, {s.n, s.layout.row_bytes});
    declare(Part::kScales, ".scales", element_type_of(s.scale_dtype), {s.n, s.groups()});
    if (s.zero_kind != ZeroKind::kFixed)
      declare(Part::kZeros, zeros_suffix(s.zero_kind), element_type_of(s.zero_dtype), {s.n, s.groups()});
    if (s.has_perm) declare(Part::kPerm, ".perm", ElementType::kI32, {s.k});
    if (s.residual_bits > 0) declare(Part::kResidual, ".residual", ElementType::kU8, {s.n, s.residual_row_bytes()});
    index_of_part_.push_back(index);
  }
  schema += "}";
  if (!tied.empty()) {
    std::unordered_set<std::string> names = std::move(dense_names);  // of tensors that a name may be tied to
    for (const PackedSpec& s : packed_) names.insert(s.name);
    first = true;
    for (const auto& [name, other] : tied) {
      check_arg(names.count(other) != 0 && names.count(name) == 0, "checkpoint writer: '", name, "' is tied to '", other,
                names.count(other) != 0 ? "', but declared too" : "', which was not declared");
      schema += (first ? ",\"tied\":{" : ",") + json_quoted(name, "tied name") + ":" + json_quoted(other, "tied name");
      first = false;
    }
    schema += "}";
  }
  metadata[kKey] = schema + "}";
  metadata["format"] = "pt";
  writer_ = std::make_unique<SafetensorsWriter>(path, std::move(dense), metadata);
}

void CheckpointWriter::append_packed(size_t index, Part part, const void* data, uint64_t count) {
  check_arg(index < packed_.size(), "checkpoint writer: packed weight ", index, " was not declared");
  const size_t tensor = index_of_part_[index][size_t(part)];
  check_arg(tensor != kNoTensor, "checkpoint writer: weight '", packed_[index].name, "' was declared without this part");
  writer_->append(tensor, data, count);
}

void write_checkpoint(const std::string& path, const std::vector<LoadedTensor>& tensors,
                      const std::map<std::string, std::string>& metadata,
                      const std::map<std::string, std::string, std::less<>>& tied) {
  std::vector<TensorDeclaration> dense;
  std::vector<PackedSpec> packed;
  for (const LoadedTensor& t : tensors) {
    if (const auto* d = std::get_if<DenseTensor>(&t)) dense.push_back({d->name, d->dtype, d->shape});
    else packed.push_back(std::get<PackedTensor>(t).spec);
  }
  CheckpointWriter writer(path, std::move(dense), std::move(packed), metadata, tied);
  size_t dense_index = 0, packed_index = 0;
  for (const LoadedTensor& t : tensors) {
    if (const auto* d = std::get_if<DenseTensor>(&t)) {
      writer.append_dense(dense_index++, d->bytes.data(), uint64_t(d->bytes.size()));
      continue;
    }
    const auto& p = std::get<PackedTensor>(t);
    using Part = CheckpointWriter::Part;
    writer.append_packed(packed_index, Part::kCodes, p.codes.data(), uint64_t(p.codes.size()));
    writer.append_packed(packed_index, Part::kScales, p.scales.data(), uint64_t(p.scales.size()));
    if (p.spec.zero_kind != ZeroKind::kFixed)
      writer.append_packed(packed_index, Part::kZeros, p.zeros.data(), uint64_t(p.zeros.size()));
    if (p.spec.has_perm) writer.append_packed(packed_index, Part::kPerm, p.perm.data(), uint64_t(p.perm.size()));
    if (p.spec.residual_bits > 0)
      writer.append_packed(packed_index, Part::kResidual, p.residual.data(), uint64_t(p.residual.size()));
    ++packed_index;
  }
  writer.finish();
}

}  // namespace subbyte
