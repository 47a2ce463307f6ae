// subbyte::checkpoint_load: native checkpoints and safetensors files for Python (subbyte/io/checkpoint.h). No tensor goes in,
// so the operator has neither a device nor a gradient; results are on the CPU and own their memory.
//
// checkpoint_load(path) -> (JSON, tensors)
//   {"metadata": {key: value}, "tied": {name: name}, "tensors": [{"name", "packed": {"format", "in_features", "group_size",
//   "parts": [name], "residual_bits"} | null}]}. `tensors` are those of the list, one after the other; a packed one has a
//   tensor for each of its parts.
#include <torch/library.h>

#include "subbyte/io/checkpoint.h"
#include "subbyte/io/json_events.h"
#include "subbyte_torch/convert.h"
#include "subbyte_torch/file_tensors.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "checkpoint_load(str path) -> (str, Tensor[])";

std::string json_text(const std::string& text) { return json_quoted(text, "checkpoint_load"); }

template <class Map>
std::string json_object(const Map& map) {
  std::string out = "{";
  for (const auto& [key, value] : map) out += (out.size() > 1 ? "," : "") + json_text(key) + ":" + json_text(value);
  return out + "}";
}

std::tuple<std::string, std::vector<at::Tensor>> checkpoint_load(std::string_view path) {
  return translated([&]() -> std::tuple<std::string, std::vector<at::Tensor>> {
    const auto file = CheckpointFile::open(std::string(path));
    auto metadata = file->file().metadata();
    metadata.erase("subbyte");
    std::string index = "{\"metadata\":" + json_object(metadata) + ",\"tied\":" + json_object(file->tied()) + ",\"tensors\":[";
    std::vector<at::Tensor> tensors;
    const char* comma = "";
    const auto begin_entry = [&](const std::string& name) {
      index += comma;
      index += "{\"name\":";
      index += json_text(name);
      comma = ",";
    };
    for (const PackedSpec& s : file->packed()) {
      const std::vector<at::Tensor> parts = owned_parts(file->load(s));
      tensors.insert(tensors.end(), parts.begin(), parts.end());
      begin_entry(s.name);
      index += ",\"packed\":{\"format\":" + json_text(s.layout.name());
      index += ",\"in_features\":" + std::to_string(s.k) + ",\"group_size\":" + std::to_string(s.group_size);
      index += ",\"parts\":[\"codes\",\"scales\"";
      if (s.zero_kind != ZeroKind::kFixed) index += std::string(",\"") + zero_kind_name(s.zero_kind) + "\"";
      if (s.has_perm) index += ",\"perm\"";
      if (s.residual_bits > 0) index += ",\"residual\"";
      index += "],\"residual_bits\":" + std::to_string(s.residual_bits) + "}}";
    }
    for (const SafetensorsEntry* e : file->dense()) {
      tensors.push_back(owned_tensor(file->file().load(*e).bytes, e->shape, e->dtype, e->name));
      begin_entry(e->name);
      index += ",\"packed\":null}";
    }
    return {index + "]}", std::move(tensors)};
  });
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema, checkpoint_load); }

}  // namespace
}  // namespace subbyte
