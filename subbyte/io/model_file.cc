#include "subbyte/io/model_file.h"

#include <cstring>
#include <filesystem>

#include "subbyte/base/error.h"

namespace subbyte {
namespace {

bool is_gguf(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  const MappedFile file(path);
  return file.bytes().size() >= 4 && std::memcmp(file.bytes().data(), "GGUF", 4) == 0;
}

}  // namespace

const char* model_file_kind_name(ModelFileKind kind) {
  switch (kind) {
    case ModelFileKind::kSafetensors: return "safetensors";
    case ModelFileKind::kCheckpoint: return "subbyte checkpoint";
    case ModelFileKind::kGguf: return "GGUF";
  }
  return "unknown";
}

std::shared_ptr<const ModelFile> ModelFile::open(const std::string& path) {
  auto out = std::shared_ptr<ModelFile>(new ModelFile());
  if (is_gguf(path)) {
    out->kind_ = ModelFileKind::kGguf;
    out->gguf_ = GgufFile::open(path);
    for (const GgufTensor& t : out->gguf_->tensors()) {
      ModelTensor m;
      m.name = t.name;
      m.shape = t.shape;
      m.bytes = int64_t(t.bytes);
      m.type = m.stored_type = t.type.block != 0 ? std::string(t.type.name) : "type " + std::to_string(t.type.id);
      PackedSpec spec;
      ElementType dtype;
      if (out->gguf_->packed_spec(t, &spec)) {
        m.type = spec.layout.name();
        m.shape = {spec.n, spec.k};
        m.spec = std::move(spec);
      } else if (out->gguf_->dense_type(t, &dtype)) {
        m.dtype = dtype;
      }
      out->tensors_.push_back(std::move(m));
    }
  } else {
    out->checkpoint_ = CheckpointFile::open(path);
    out->kind_ = out->checkpoint_->native() ? ModelFileKind::kCheckpoint : ModelFileKind::kSafetensors;
    for (const PackedSpec& spec : out->checkpoint_->packed()) {
      ModelTensor m;
      m.name = spec.name;
      m.shape = {spec.n, spec.k};
      m.type = m.stored_type = spec.layout.name();
      m.bytes = spec.bytes();
      m.spec = spec;
      out->tensors_.push_back(std::move(m));
    }
    for (const SafetensorsEntry* e : out->checkpoint_->dense()) {
      ModelTensor m;
      m.name = e->name;
      m.shape = e->shape;
      m.type = m.stored_type = element_type_name(e->dtype);
      m.bytes = int64_t(e->end - e->begin);
      m.dtype = e->dtype;
      out->tensors_.push_back(std::move(m));
    }
  }
  for (size_t i = 0; i < out->tensors_.size(); ++i) out->by_name_.emplace(out->tensors_[i].name, i);
  return out;
}

int64_t ModelFile::find(std::string_view name) const {
  const auto it = by_name_.find(checkpoint_ != nullptr ? checkpoint_->stored_name(name) : name);
  return it == by_name_.end() ? -1 : int64_t(it->second);
}

const std::map<std::string, std::string, std::less<>>& ModelFile::tied() const {
  static const std::map<std::string, std::string, std::less<>> kNone;
  return checkpoint_ != nullptr ? checkpoint_->tied() : kNone;
}

LoadedTensor ModelFile::load_rows(size_t i, int64_t row_begin, int64_t row_end) const {
  check_arg(i < tensors_.size(), "model file: tensor ", i, " of ", tensors_.size());
  const ModelTensor& m = tensors_[i];
  check_arg(0 <= row_begin && row_begin <= row_end && row_end <= rows(i), "model file: rows [", row_begin, ", ", row_end,
            ") of ", rows(i));
  if (m.spec && checkpoint_) return checkpoint_->load_rows(*m.spec, row_begin, row_end);
  if (m.spec) {
    PackedTensor out;
    out.spec = *m.spec;
    out.spec.n = row_end - row_begin;
    uint8_t *codes = nullptr, *scales = nullptr, *offsets = nullptr;
    out.codes = SharedBytes::allocate(out.spec.codes_bytes(), &codes);
    out.scales = SharedBytes::allocate(out.spec.scales_bytes(), &scales);
    out.zeros = SharedBytes::allocate(out.spec.zeros_bytes(), &offsets);
    gguf_->convert_rows(gguf_->tensors()[i], row_begin, row_end, codes, reinterpret_cast<uint16_t*>(scales),
                        reinterpret_cast<uint16_t*>(offsets));
    return out;
  }
  if (gguf_) {
    DenseTensor t = std::get<DenseTensor>(gguf_->load(gguf_->tensors()[i]));  // refuses types that are neither
    if (row_begin == 0 && row_end == rows(i)) return t;
    const int64_t row_bytes = t.bytes.size() / rows(i);
    t.bytes = SharedBytes(t.bytes.span().subspan(size_t(row_begin * row_bytes), size_t((row_end - row_begin) * row_bytes)),
                          t.bytes.owner());
    t.shape[0] = row_end - row_begin;
    return t;
  }
  const SafetensorsEntry& e = *checkpoint_->file().find(m.name);
  const uint64_t row_bytes = rows(i) > 0 ? (e.end - e.begin) / uint64_t(rows(i)) : 0;
  DenseTensor t{e.name, e.dtype, e.shape,
                checkpoint_->file().borrow(e, uint64_t(row_begin) * row_bytes, uint64_t(row_end - row_begin) * row_bytes)};
  if (!t.shape.empty()) t.shape[0] = row_end - row_begin;
  return t;
}

void ModelFile::release_rows(size_t i, int64_t row_begin, int64_t row_end) const {
  const ModelTensor& m = tensors_[i];
  const int64_t n = rows(i);
  if (n == 0) return;
  if (m.spec && checkpoint_) return checkpoint_->release_rows(*m.spec, row_begin, row_end);
  const int64_t row_bytes = m.bytes / n;
  const auto begin = uint64_t(row_begin * row_bytes), count = uint64_t((row_end - row_begin) * row_bytes);
  if (gguf_) gguf_->release(gguf_->tensors()[i], begin, count);
  else checkpoint_->file().release(*checkpoint_->file().find(m.name), begin, count);
}

}  // namespace subbyte
