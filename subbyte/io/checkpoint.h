// Native checkpoints, schema version 1: a safetensors file (or shards with an index) in which a packed weight NAME is stored as
//   NAME.codes    U8 [N, row_bytes]         NAME.scales   F32, F16 or BF16 [N, G]
//   NAME.zeros or NAME.offsets, or neither  the same types, [N, G]
//   NAME.perm     I32 [K], optional
//   NAME.residual U8 [N, stream bytes of K codes of residual_bits], where the description says residual_bits
// described by the metadata key "subbyte", which also lists the further names of tensors that are stored once (tied weights).
// Every other tensor is an ordinary one. docs/checkpoint.md is the full text. A safetensors file without that key is a
// checkpoint without packed weights.
//
// Opening judges structure; loading a packed weight judges its content as well: codes are levels of their format, spare bits
// are zero, perm is a permutation. Whatever is wrong is a FormatError with tensor and byte offset.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "subbyte/io/safetensors.h"
#include "subbyte/io/tensor_data.h"

namespace subbyte {

inline constexpr int kCheckpointVersion = 1;

class CheckpointFile {
 public:
  // Paths as in SafetensorsFile::open. Throws IoError or FormatError.
  static std::shared_ptr<const CheckpointFile> open(const std::string& path);
  static std::shared_ptr<const CheckpointFile> from_bytes(std::span<const uint8_t> file, const std::string& where,
                                                          std::shared_ptr<const void> owner);

  // True when the file has the metadata key "subbyte".
  bool native() const { return native_; }
  const SafetensorsFile& file() const { return *file_; }
  // Packed weights by name, and the tensors that are no part of one, in the order of the data.
  const std::vector<PackedSpec>& packed() const { return packed_; }
  const std::vector<const SafetensorsEntry*>& dense() const { return dense_; }
  // By its own name or a tied one; null when there is none.
  const PackedSpec* find_packed(std::string_view name) const;
  // Further names: {name: name of the tensor that it is}.
  const std::map<std::string, std::string, std::less<>>& tied() const { return tied_; }
  // The name under which a tensor is stored: that of a tied name, else `name` itself.
  std::string_view stored_name(std::string_view name) const;

  // Borrowed from the file where addresses allow; keeps the file alive. `spec` is one of packed(), `rows` as in load_rows.
  PackedTensor load(const PackedSpec& spec) const { return load_rows(spec, 0, spec.n); }
  // Rows [row_begin, row_end) as a packed weight of their own.
  PackedTensor load_rows(const PackedSpec& spec, int64_t row_begin, int64_t row_end) const;
  // See MappedFile::release: the codes of these rows will not be read again soon.
  void release_rows(const PackedSpec& spec, int64_t row_begin, int64_t row_end) const;

 private:
  struct Parts {
    const SafetensorsEntry *codes = nullptr, *scales = nullptr, *zeros = nullptr, *perm = nullptr, *residual = nullptr;
  };
  static std::shared_ptr<const CheckpointFile> build(std::shared_ptr<const SafetensorsFile> file);
  struct Described {
    uint64_t in_features = 0, group_size = 0, residual_bits = 0;
  };
  void add_packed(const std::string& name, const std::string& format, const Described& told, const std::string& where);

  std::shared_ptr<const SafetensorsFile> file_;
  bool native_ = false;
  std::vector<PackedSpec> packed_;
  std::vector<Parts> parts_;
  std::vector<const SafetensorsEntry*> dense_;
  std::unordered_map<std::string_view, size_t> by_name_;
  std::map<std::string, std::string, std::less<>> tied_;
};

// Streaming writer of native checkpoints: SafetensorsWriter's promises (atomic, deterministic, any chunking).
class CheckpointWriter {
 public:
  enum class Part : uint8_t { kCodes, kScales, kZeros, kPerm, kResidual };  // kZeros: also offsets

  // Metadata "format": "pt" and "subbyte" are added; giving either is refused. std::invalid_argument for inconsistent sizes or
  // a name given twice, also through the parts of a packed weight. tied: further names of declared tensors, as in
  // CheckpointFile::tied.
  CheckpointWriter(const std::string& path, std::vector<TensorDeclaration> dense, std::vector<PackedSpec> packed,
                   std::map<std::string, std::string> metadata = {},
                   const std::map<std::string, std::string, std::less<>>& tied = {});
  void append_dense(size_t index, const void* data, uint64_t count) { writer_->append(index, data, count); }
  void append_packed(size_t index, Part part, const void* data, uint64_t count);
  void finish() { writer_->finish(); }

 private:
  std::vector<PackedSpec> packed_;
  std::vector<std::array<size_t, 5>> index_of_part_;
  std::unique_ptr<SafetensorsWriter> writer_;
};

// Writes tensors that are in memory.
void write_checkpoint(const std::string& path, const std::vector<LoadedTensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {},
                      const std::map<std::string, std::string, std::less<>>& tied = {});

}  // namespace subbyte
