#include "subbyte/io/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "subbyte/base/error.h"
#include "subbyte/io/byte_reader.h"
#include "subbyte/io/json_events.h"

namespace subbyte {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxDims = 64;  // numpy's and PyTorch's own limit
constexpr const char* kMetadataKey = "__metadata__";

std::string tensor_where(const std::string& file, const std::string& tensor) { return file + ": tensor '" + tensor + "'"; }

// Receives the header's JSON.
class HeaderBuilder {
 public:
  HeaderBuilder(const std::string& where, uint64_t data_begin, uint64_t data_bytes)
      : where_(where), data_begin_(data_begin), data_bytes_(data_bytes) {}

  void operator()(const JsonEvent& e) {
    const size_t depth = e.path.size();
    if (depth == 0) {
      if (e.kind != JsonEvent::kOpenObject && e.kind != JsonEvent::kClose) fail(e, "the header is not a JSON object");
      return;
    }
    const std::string& name = e.path[0];
    if (name == kMetadataKey) return metadata(e, depth);
    if (depth == 1) {
      if (e.kind == JsonEvent::kOpenObject) begin_entry(name);
      else if (e.kind == JsonEvent::kClose) end_entry(e);
      else fail(e, "is not an object");
      return;
    }
    field(e, e.path[1]);
  }

  SafetensorsHeader take() { return std::move(header_); }

 private:
  [[noreturn]] void fail(const JsonEvent& e, const std::string& text) const {
    if (e.path.empty()) throw FormatError(where_, e.offset_bytes, text);
    throw FormatError(tensor_where(where_, e.path[0]), e.offset_bytes, text);
  }

  void metadata(const JsonEvent& e, size_t depth) {
    if (depth == 1 && (e.kind == JsonEvent::kOpenObject || e.kind == JsonEvent::kClose)) return;
    if (depth != 2 || e.kind != JsonEvent::kString || e.in_array) fail(e, "metadata is not an object of strings");
    header_.metadata.emplace(e.path[1], e.text);
  }

  void begin_entry(const std::string& name) {
    entry_ = SafetensorsEntry{};
    entry_.name = name;
    has_dtype_ = has_shape_ = false;
    offsets_ = 0;
  }

  void field(const JsonEvent& e, const std::string& key) {
    if (e.path.size() != 2 || e.kind == JsonEvent::kOpenObject) fail(e, "'" + key + "' is an object");
    if (key == "dtype") {
      if (e.kind != JsonEvent::kString || e.in_array) fail(e, "dtype is not a string");
      if (!element_type_from_name(e.text, &entry_.dtype)) fail(e, "dtype '" + e.text + "' is unknown");
      has_dtype_ = true;
    } else if (key == "shape") {
      if (e.kind == JsonEvent::kOpenArray || e.kind == JsonEvent::kClose) {
        has_shape_ = true;
        return;
      }
      if (!e.in_array || e.kind != JsonEvent::kUnsigned || e.number > uint64_t(INT64_MAX))
        fail(e, "shape is not an array of sizes");
      if (entry_.shape.size() == kMaxDims) fail(e, "shape has more than 64 sizes");
      entry_.shape.push_back(int64_t(e.number));
    } else if (key == "data_offsets") {
      if (e.kind == JsonEvent::kOpenArray || e.kind == JsonEvent::kClose) return;
      if (!e.in_array || e.kind != JsonEvent::kUnsigned || offsets_ == 2)
        fail(e, "data_offsets is not an array of two offsets");
      if (e.number > data_bytes_)
        fail(e, detail::concat("data offset ", e.number, " lies beyond the data, which has ", data_bytes_, " bytes"));
      (offsets_++ == 0 ? entry_.begin : entry_.end) = data_begin_ + e.number;
    } else {
      fail(e, "unknown field '" + key + "'");
    }
  }

  void end_entry(const JsonEvent& e) {
    if (!has_dtype_ || !has_shape_ || offsets_ != 2) fail(e, "lacks dtype, shape or data_offsets");
    int64_t bytes = 0;
    if (!tensor_bytes(entry_.dtype, entry_.shape, &bytes)) fail(e, "shape " + shape_text(entry_.shape) + " overflows");
    if (entry_.end < entry_.begin || entry_.end - entry_.begin != uint64_t(bytes))
      fail(e, detail::concat("data_offsets [", entry_.begin - data_begin_, ", ", entry_.end - data_begin_, ") do not hold the ",
                             bytes, " bytes of ", element_type_name(entry_.dtype), " ", shape_text(entry_.shape)));
    header_.entries.push_back(std::move(entry_));
  }

  const std::string& where_;
  uint64_t data_begin_, data_bytes_;
  SafetensorsHeader header_;
  SafetensorsEntry entry_;
  bool has_dtype_ = false, has_shape_ = false;
  int offsets_ = 0;
};

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? std::string(".") : slash == 0 ? std::string("/") : path.substr(0, slash);
}

bool ends_with(const std::string& s, std::string_view tail) {
  return s.size() >= tail.size() && std::string_view(s).substr(s.size() - tail.size()) == tail;
}

[[noreturn]] void io_fail(const std::string& path, const char* what) {
  throw IoError(path + ": " + what + ": " + std::strerror(errno));
}

void write_all(int fd, const void* data, uint64_t count, uint64_t offset, const std::string& path) {
  const char* p = static_cast<const char*>(data);
  while (count > 0) {
    const ssize_t n = ::pwrite(fd, p, size_t(std::min<uint64_t>(count, uint64_t(1) << 30)), off_t(offset));
    if (n < 0) {
      if (errno == EINTR) continue;
      io_fail(path, "cannot write");
    }
    p += n;
    count -= uint64_t(n);
    offset += uint64_t(n);
  }
}

}  // namespace

SafetensorsHeader parse_safetensors(std::span<const uint8_t> file, const std::string& where) {
  ByteReader reader(file);
  const auto header_bytes = reader.read<uint64_t>(where, "header length");
  if (header_bytes > kMaxHeaderBytes)
    throw FormatError(where, 0, detail::concat("header length ", header_bytes, " is above ", kMaxHeaderBytes));
  const uint8_t* text = reader.take(header_bytes, where, "header");
  if (header_bytes == 0 || text[0] != '{') throw FormatError(where, 8, "the header does not begin with '{'");
  const uint64_t data_begin = reader.offset();
  HeaderBuilder builder(where, data_begin, reader.remaining());
  parse_json({text, size_t(header_bytes)}, where, 8, 3, [&](const JsonEvent& e) { builder(e); });
  SafetensorsHeader header = builder.take();
  // Empty tensors share their offset with a neighbour: they sort before it.
  std::sort(header.entries.begin(), header.entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t end = data_begin;
  for (const SafetensorsEntry& e : header.entries) {
    if (e.begin != end)
      throw FormatError(tensor_where(where, e.name), e.begin,
                        detail::concat("the data ", e.begin > end ? "leaves a gap after" : "overlaps the tensor that ends at",
                                       " byte ", end));
    end = e.end;
  }
  if (end != file.size())
    throw FormatError(where, end, detail::concat("the last tensor ends here, the file has ", file.size(), " bytes"));
  return header;
}

std::map<std::string, std::string> parse_safetensors_index(std::span<const uint8_t> file, const std::string& where) {
  if (file.size() > kMaxHeaderBytes) throw FormatError(where, 0, "the index is above 100 000 000 bytes");
  std::map<std::string, std::string> out;
  bool found = false;
  parse_json(file, where, 0, 16, [&](const JsonEvent& e) {
    if (e.path.empty()) {
      if (e.kind != JsonEvent::kOpenObject && e.kind != JsonEvent::kClose)
        throw FormatError(where, e.offset_bytes, "the index is not a JSON object");
      return;
    }
    if (e.path[0] != "weight_map") return;
    found = true;
    if (e.path.size() == 1 && (e.kind == JsonEvent::kOpenObject || e.kind == JsonEvent::kClose)) return;
    if (e.path.size() != 2 || e.kind != JsonEvent::kString || e.in_array)
      throw FormatError(where, e.offset_bytes, "weight_map is not an object of file names");
    if (e.text.empty() || e.text.find('/') != std::string::npos || e.text.find('\0') != std::string::npos || e.text == "." ||
        e.text == "..")
      throw FormatError(tensor_where(where, e.path[1]), e.offset_bytes,
                        "'" + e.text + "' is not the name of a file in the same folder");
    out.emplace(e.path[1], e.text);
  });
  if (!found) throw FormatError(where, file.size(), "the index has no weight_map");
  return out;
}

void SafetensorsFile::add(File file) {
  SafetensorsHeader header = parse_safetensors(file.bytes, file.where);
  const int index = int(files_.size());
  for (SafetensorsEntry& e : header.entries) {
    e.file = index;
    entries_.push_back(std::move(e));
  }
  for (const auto& [key, value] : header.metadata) metadata_.emplace(key, value);
  shard_metadata_.push_back(std::move(header.metadata));
  files_.push_back(std::move(file));
}

void SafetensorsFile::finish() {
  by_name_.reserve(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    const SafetensorsEntry& e = entries_[i];
    if (!by_name_.emplace(e.name, i).second) throw FormatError(tensor_where(path_of(e), e.name), e.begin, "is in two shards");
  }
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                                   std::shared_ptr<const void> owner) {
  auto out = std::shared_ptr<SafetensorsFile>(new SafetensorsFile());
  out->add(File{where, file, std::move(owner), nullptr});
  out->finish();
  return out;
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const std::string& given) {
  std::string path = given;
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    path += "/model.safetensors.index.json";
    if (!std::filesystem::exists(path, ignored)) path = given + "/model.safetensors";
  }
  auto out = std::shared_ptr<SafetensorsFile>(new SafetensorsFile());
  auto add = [&](const std::string& p) {
    auto map = std::make_shared<const MappedFile>(p);
    out->add(File{p, map->bytes(), map, map});
  };
  if (!ends_with(path, ".index.json")) {
    add(path);
    out->finish();
    return out;
  }
  const MappedFile index(path);
  const std::map<std::string, std::string> weight_map = parse_safetensors_index(index.bytes(), path);
  std::map<std::string, int> shards;
  for (const auto& [tensor, file] : weight_map) shards.emplace(file, 0);
  int count = 0;
  for (auto& [file, number] : shards) {
    number = count++;
    add(folder_of(path) + "/" + file);
  }
  out->finish();
  for (const SafetensorsEntry& e : out->entries_) {
    const auto it = weight_map.find(e.name);
    if (it == weight_map.end() || shards[it->second] != e.file)
      throw FormatError(tensor_where(out->path_of(e), e.name), e.begin, "the index says that it lies elsewhere");
  }
  for (const auto& [tensor, file] : weight_map)
    if (out->find(tensor) == nullptr)
      throw FormatError(tensor_where(path, tensor), 0, "is not in '" + file + "', where the index puts it");
  return out;
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &entries_[it->second];
}

SharedBytes SafetensorsFile::borrow(const SafetensorsEntry& e, uint64_t begin, uint64_t count) const {
  const std::span<const uint8_t> all = bytes_of(e);
  check_arg(begin <= all.size() && count <= all.size() - begin, "safetensors: bytes [", begin, ", +", count, ") of tensor '",
            e.name, "', which has ", all.size());
  return SharedBytes(all.subspan(begin, count), files_[size_t(e.file)].owner).aligned(element_type_bytes(e.dtype));
}

DenseTensor SafetensorsFile::load(const SafetensorsEntry& e) const {
  return DenseTensor{e.name, e.dtype, e.shape, borrow(e, 0, e.end - e.begin)};
}

void SafetensorsFile::release(const SafetensorsEntry& e, uint64_t begin, uint64_t count) const {
  const File& f = files_[size_t(e.file)];
  if (f.map != nullptr) f.map->release(e.begin + begin, count);
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorDeclaration> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), tensors_(std::move(tensors)), slots_(tensors_.size()) {
  std::unordered_set<std::string_view> names;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorDeclaration& t = tensors_[i];
    check_arg(!t.name.empty() && t.name != kMetadataKey, "safetensors writer: tensor ", i, " is named '", t.name,
              "', which the format does not allow");
    check_arg(names.insert(t.name).second, "safetensors writer: tensor '", t.name, "' is declared twice");
    int64_t bytes = 0;
    check_arg(tensor_bytes(t.dtype, t.shape, &bytes), "safetensors writer: tensor '", t.name, "' has shape ",
              shape_text(t.shape), ", which is negative or overflows");
    slots_[i].count = uint64_t(bytes);
  }
  std::vector<size_t> order(tensors_.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const int64_t ea = element_type_bytes(tensors_[a].dtype), eb = element_type_bytes(tensors_[b].dtype);
    return ea != eb ? ea > eb : tensors_[a].name < tensors_[b].name;
  });
  std::string header = "{";
  if (!metadata.empty()) {
    header += json_quoted(kMetadataKey, "key") + ":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      if (!first) header += ",";
      header += json_quoted(key, "metadata key") + ":" + json_quoted(value, "metadata value");
      first = false;
    }
    header += "}";
  }
  uint64_t offset = 0;
  for (const size_t i : order) {
    const TensorDeclaration& t = tensors_[i];
    slots_[i].begin = offset;
    check_arg(!__builtin_add_overflow(offset, slots_[i].count, &offset) && offset <= uint64_t(INT64_MAX),
              "safetensors writer: the tensors together overflow a file");
    if (header.size() > 1) header += ",";
    header += json_quoted(t.name, "tensor name") + ":{\"dtype\":\"" + element_type_name(t.dtype) + "\",\"shape\":[";
    for (size_t d = 0; d < t.shape.size(); ++d) {
      if (d != 0) header += ",";
      header += std::to_string(t.shape[d]);
    }
    header += "],\"data_offsets\":[" + std::to_string(slots_[i].begin) + "," + std::to_string(offset) + "]}";
  }
  header += "}";
  while ((header.size() + 8) % 64 != 0) header += ' ';
  check_arg(header.size() <= kMaxHeaderBytes, "safetensors writer: the header has ", header.size(), " bytes, expected at most ",
            kMaxHeaderBytes);
  for (Slot& s : slots_) s.begin += 8 + header.size();

  temporary_ = path_ + ".part-XXXXXX";
  fd_ = ::mkostemp(temporary_.data(), O_CLOEXEC);
  if (fd_ < 0) {
    const std::string failed = std::exchange(temporary_, std::string());
    io_fail(failed, "cannot create");
  }
  try {
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = uint8_t(uint64_t(header.size()) >> (8 * i));
    write_all(fd_, length, 8, 0, temporary_);
    write_all(fd_, header.data(), header.size(), 8, temporary_);
  } catch (...) {
    discard();
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() { discard(); }

void SafetensorsWriter::discard() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void SafetensorsWriter::append(size_t index, const void* data, uint64_t count) {
  check_arg(fd_ >= 0, "safetensors writer: append after finish");
  check_arg(index < slots_.size(), "safetensors writer: tensor ", index, " was not declared");
  Slot& s = slots_[index];
  check_arg(count <= s.count - s.written, "safetensors writer: tensor '", tensors_[index].name, "' gets more than its ",
            s.count, " bytes");
  if (count == 0) return;
  check_arg(data != nullptr, "safetensors writer: data is missing");
  write_all(fd_, data, count, s.begin + s.written, temporary_);
  s.written += count;
}

void SafetensorsWriter::finish() {
  check_arg(fd_ >= 0, "safetensors writer: finish was called before");
  for (size_t i = 0; i < slots_.size(); ++i)
    check_arg(slots_[i].written == slots_[i].count, "safetensors writer: tensor '", tensors_[i].name, "' has ",
              slots_[i].written, " of its ", slots_[i].count, " bytes");
  // mkostemp makes the file private; give it the permissions any new file would get. umask can only be read by setting it.
  const mode_t mask = ::umask(0);
  ::umask(mask);
  if (::fchmod(fd_, 0666 & ~mask) != 0 || ::fsync(fd_) != 0) io_fail(temporary_, "cannot sync");
  if (::close(std::exchange(fd_, -1)) != 0) io_fail(temporary_, "cannot close");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) io_fail(path_, "cannot rename into place");
  temporary_.clear();
  // The new name itself reaches the disk with the folder; file systems that cannot sync a folder lose nothing by it.
  if (const int dir = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); dir >= 0) {
    (void)::fsync(dir);
    ::close(dir);
  }
}

}  // namespace subbyte
