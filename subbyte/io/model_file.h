// One face for every file that holds a model: safetensors (one file, shards, a folder), native checkpoints, GGUF. Tensor by
// tensor, or a block of rows at a time; each is dense or packed.
//
//   auto model = ModelFile::open(path);
//   for (size_t i = 0; i < model->tensors().size(); ++i) use(model->load(i));
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "subbyte/io/checkpoint.h"
#include "subbyte/io/gguf.h"
#include "subbyte/io/tensor_data.h"

namespace subbyte {

enum class ModelFileKind : uint8_t { kSafetensors, kCheckpoint, kGguf };
const char* model_file_kind_name(ModelFileKind kind);  // "safetensors", "subbyte checkpoint", "GGUF"

struct ModelTensor {
  std::string name;
  std::vector<int64_t> shape;        // of the weight, not of its packed parts
  std::string type;                  // "F16", "uint4", "Q4_K" ...
  std::string stored_type;           // GGUF: the file's own name of the type, "Q4_1"; else as `type`
  int64_t bytes = 0;                 // all parts; 0 when the type is unknown
  std::optional<PackedSpec> spec;    // of packed tensors
  std::optional<ElementType> dtype;  // of dense tensors; a tensor with neither cannot be loaded
};

class ModelFile {
 public:
  // The kind is told by the first bytes, not by the name. Throws IoError or FormatError.
  static std::shared_ptr<const ModelFile> open(const std::string& path);

  ModelFileKind kind() const { return kind_; }
  // GGUF: the file's order; checkpoints: packed weights, then dense tensors; each sorted as stored.
  const std::vector<ModelTensor>& tensors() const { return tensors_; }
  // Position in tensors(), by a tensor's own name or a tied one, or -1.
  int64_t find(std::string_view name) const;
  // Throws FormatError when content or type cannot be loaded.
  LoadedTensor load(size_t i) const { return load_rows(i, 0, rows(i)); }
  // Rows of a tensor: its first dimension; a tensor without dimensions has one row.
  int64_t rows(size_t i) const { return tensors_[i].shape.empty() ? 1 : tensors_[i].shape[0]; }
  // Rows [row_begin, row_end) as a tensor of their own.
  LoadedTensor load_rows(size_t i, int64_t row_begin, int64_t row_end) const;
  // These rows will not be read again soon: their pages leave resident memory (MappedFile::release).
  void release_rows(size_t i, int64_t row_begin, int64_t row_end) const;

  // Further names of tensors, in native checkpoints: {name: name of the tensor in tensors() that it is}.
  const std::map<std::string, std::string, std::less<>>& tied() const;

  // The file behind it; null for the other kind.
  const GgufFile* gguf() const { return gguf_.get(); }
  const CheckpointFile* checkpoint() const { return checkpoint_.get(); }

 private:
  ModelFileKind kind_ = ModelFileKind::kSafetensors;
  std::shared_ptr<const GgufFile> gguf_;
  std::shared_ptr<const CheckpointFile> checkpoint_;
  std::vector<ModelTensor> tensors_;
  std::unordered_map<std::string_view, size_t> by_name_;
};

}  // namespace subbyte
