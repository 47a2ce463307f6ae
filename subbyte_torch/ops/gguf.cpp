// subbyte::gguf_index, subbyte::gguf_tensor: GGUF files for Python (subbyte/io/gguf.h). No tensor goes in, so neither has a
// device or a gradient; results are on the CPU and own their memory.
//
// gguf_index(path) -> JSON
//   {"version": 3, "metadata": {key: value}, "tensors": [{"name", "shape", "type", "packed": {"format", "group_size",
//   "zero_kind"} | null}]} An array of the metadata is {"type", "count", "values"}; beyond 1024 entries (a tokenizer's words)
//   "values" is null.
// gguf_tensor(path, name) -> [dense], or [codes, scales], or [codes, scales, offsets] as the index says.
#include <torch/library.h>

#include <charconv>
#include <cmath>

#include "subbyte/io/gguf.h"
#include "subbyte/io/json_events.h"
#include "subbyte/io/utf8.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/file_tensors.h"

namespace subbyte {
namespace {

constexpr const char* kIndexSchema = "gguf_index(str path) -> str";
constexpr const char* kTensorSchema = "gguf_tensor(str path, str name) -> Tensor[]";
constexpr uint64_t kListedEntries = 1024;

// Tokenizers hold pieces of characters, which JSON cannot say: they become U+FFFD.
std::string json_text(std::string_view text) { return json_quoted(utf8_replaced(text), "gguf_index"); }

std::string number(double v) {
  if (!std::isfinite(v)) return "null";
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof(text), v).ptr);
}

std::string json_of(const GgufArray& a) {
  std::string out =
      "{\"type\":" + json_text(gguf_value_type_name(a.type)) + ",\"count\":" + std::to_string(a.count) + ",\"values\":";
  if (a.count > kListedEntries) return out + "null}";
  out += '[';
  uint64_t offset = 0;
  for (uint64_t i = 0; i < a.count; ++i) {
    if (i != 0) out += ',';
    if (a.type == GgufValueType::kString) out += json_text(a.string_at(&offset));
    else if (a.type == GgufValueType::kF32 || a.type == GgufValueType::kF64) out += number(a.number(i));
    else if (a.type == GgufValueType::kBool) out += a.integer(i) != 0 ? "true" : "false";
    else out += std::to_string(a.integer(i));
  }
  return out + "]}";
}

struct JsonOf {
  std::string operator()(uint64_t v) const { return std::to_string(v); }
  std::string operator()(int64_t v) const { return std::to_string(v); }
  std::string operator()(double v) const { return number(v); }
  std::string operator()(bool v) const { return v ? "true" : "false"; }
  std::string operator()(std::string_view v) const { return json_text(v); }
  std::string operator()(const GgufArray& v) const { return json_of(v); }
};

std::string gguf_index(std::string_view path) {
  return translated([&] {
    const auto file = GgufFile::open(std::string(path));
    std::string out = "{\"version\":" + std::to_string(file->version()) + ",\"metadata\":{";
    const char* comma = "";
    for (const auto& [key, value] : file->values()) {
      out += comma + json_text(key) + ":" + std::visit(JsonOf{}, value.value);
      comma = ",";
    }
    out += "},\"tensors\":[";
    comma = "";
    for (const GgufTensor& t : file->tensors()) {
      out += comma + std::string("{\"name\":") + json_text(t.name) + ",\"shape\":[";
      for (size_t i = 0; i < t.shape.size(); ++i) out += (i != 0 ? "," : "") + std::to_string(t.shape[i]);
      out += "],\"type\":" + json_text(t.type.name) + ",\"packed\":";
      PackedSpec spec;
      if (file->packed_spec(t, &spec)) {
        out += "{\"format\":" + json_text(spec.layout.name()) + ",\"group_size\":" + std::to_string(spec.group_size) +
               ",\"zero_kind\":\"" + zero_kind_name(spec.zero_kind) + "\"}";
      } else {
        out += "null";
      }
      out += "}";
      comma = ",";
    }
    return out + "]}";
  });
}

std::vector<at::Tensor> gguf_tensor(std::string_view path, std::string_view name) {
  return translated([&]() -> std::vector<at::Tensor> {
    const auto file = GgufFile::open(std::string(path));
    const GgufTensor* t = file->find(name);
    check_arg(t != nullptr, "gguf_tensor: '", path, "' has no tensor '", name, "'");
    const LoadedTensor loaded = file->load(*t);
    if (const auto* dense = std::get_if<DenseTensor>(&loaded))
      return {owned_tensor(dense->bytes, dense->shape, dense->dtype, dense->name)};
    return owned_parts(std::get<PackedTensor>(loaded));
  });
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kIndexSchema, gguf_index);
  m.def(kTensorSchema, gguf_tensor);
}

}  // namespace
}  // namespace subbyte
