// safetensors files: u64 little-endian header length, JSON header, tensor data. The reader judges every byte of the header
// before it gives anything out; the writer streams.
//
// Accepted: header of at most 100 000 000 bytes beginning with '{', padded with white space at its end; per tensor exactly the
// fields dtype, shape, data_offsets; "__metadata__" with string values only; data without gaps or overlaps that ends at the
// file's last byte. Anything else is a FormatError with the file's path, tensor and byte offset. Memory used is proportional to
// the header. Source: the format's description in the safetensors repository, version 0.4.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "subbyte/io/mapped_file.h"
#include "subbyte/io/tensor_data.h"

namespace subbyte {

struct SafetensorsEntry {
  std::string name;
  ElementType dtype = ElementType::kF32;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes of the file, counted from its first
  int file = 0;                 // which shard
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // in the order of the data
  std::map<std::string, std::string> metadata;
};

// Judges a whole file in memory. `where` begins every error's text.
SafetensorsHeader parse_safetensors(std::span<const uint8_t> file, const std::string& where);
// The "weight_map" of model.safetensors.index.json: tensor name -> file name. File names with '/' in them, which would reach
// out of the checkpoint's folder, are refused.
std::map<std::string, std::string> parse_safetensors_index(std::span<const uint8_t> file, const std::string& where);

// One file, or all shards of a checkpoint as one.
class SafetensorsFile {
 public:
  // `path`: a .safetensors file, a .safetensors.index.json, or a folder with model.safetensors(.index.json) inside.
  // Throws IoError or FormatError. Shards and index must agree exactly on which tensor lies where; metadata of the shards is
  // merged, except that equal keys with different values keep the first shard's.
  static std::shared_ptr<const SafetensorsFile> open(const std::string& path);
  // The same over bytes in memory (one file); `owner` keeps them alive.
  static std::shared_ptr<const SafetensorsFile> from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                           std::shared_ptr<const void> owner);

  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Metadata and path of each shard, in the order of SafetensorsEntry::file.
  const std::vector<std::map<std::string, std::string>>& shard_metadata() const { return shard_metadata_; }
  const std::string& shard_path(size_t i) const { return files_[i].where; }
  const SafetensorsEntry* find(std::string_view name) const;
  // Path of the file that holds `e`.
  const std::string& path_of(const SafetensorsEntry& e) const { return files_[size_t(e.file)].where; }
  std::span<const uint8_t> bytes_of(const SafetensorsEntry& e) const {
    return files_[size_t(e.file)].bytes.subspan(e.begin, e.end - e.begin);
  }
  // The tensor, borrowed from the file where its address allows, else copied. Keeps the file alive.
  DenseTensor load(const SafetensorsEntry& e) const;
  // Bytes [begin, begin + count) of the tensor, begin a multiple of the element size; borrowed or copied like load's.
  SharedBytes borrow(const SafetensorsEntry& e, uint64_t begin, uint64_t count) const;
  // See MappedFile::release.
  void release(const SafetensorsEntry& e, uint64_t begin, uint64_t count) const;

 private:
  struct File {
    std::string where;
    std::span<const uint8_t> bytes;
    std::shared_ptr<const void> owner;
    std::shared_ptr<const MappedFile> map;  // null for bytes in memory
  };
  void add(File file);
  void finish();

  std::vector<File> files_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::map<std::string, std::string>> shard_metadata_;
  std::unordered_map<std::string_view, size_t> by_name_;
};

struct TensorDeclaration {
  std::string name;
  ElementType dtype = ElementType::kF32;
  std::vector<int64_t> shape;
};

// Streaming writer: declare all tensors, append the bytes of each in order and in any chunking (tensors may be interleaved),
// finish. The file appears under its name, complete and synced to disk, when finish() returns; before, the data is in a
// temporary file in the same folder, which disappears when the writer is destroyed unfinished.
//   Order in the file: element size descending, then name, so that every tensor is aligned to its element size; the header is
//   padded to a multiple of 64 bytes. The same declarations, metadata and data give the same bytes.
class SafetensorsWriter {
 public:
  // Throws std::invalid_argument (duplicate, empty or reserved name, negative size, overflow, text that is not UTF-8, header
  // too long) or IoError.
  SafetensorsWriter(const std::string& path, std::vector<TensorDeclaration> tensors,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The next `count` bytes of tensor `index` (position in `tensors`). std::invalid_argument when that is more than declared.
  void append(size_t index, const void* data, uint64_t count);
  // std::invalid_argument naming the first tensor that lacks data; IoError when the disk refuses.
  void finish();

 private:
  struct Slot {
    uint64_t begin = 0, count = 0, written = 0;
  };
  void discard() noexcept;

  std::string path_, temporary_;
  std::vector<TensorDeclaration> tensors_;
  std::vector<Slot> slots_;
  int fd_ = -1;
};

}  // namespace subbyte
