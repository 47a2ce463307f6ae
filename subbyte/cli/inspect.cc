// subbyte inspect: what a model file holds. Reads headers only; tensor data is not touched.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "subbyte/cli/commands.h"
#include "subbyte/io/model_file.h"

namespace subbyte::cli {
namespace {

using Json = nlohmann::ordered_json;
constexpr size_t kShownText = 60, kShownElements = 8;

int64_t elements(const ModelTensor& t) {
  int64_t n = 1;
  for (const int64_t d : t.shape) n *= d;
  return n;
}

double bits_per_weight(int64_t bytes, int64_t elems) { return elems > 0 ? double(bytes) * 8 / double(elems) : 0.0; }

Json gguf_value_json(const GgufValue& value) {
  return std::visit(
      [&](const auto& v) -> Json {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::string_view>) {
          return std::string(v);
        } else if constexpr (std::is_same_v<T, GgufArray>) {
          Json first = Json::array();
          if (v.type == GgufValueType::kString) {
            v.for_each_string([&](std::string_view s) {
              first.push_back(std::string(s.substr(0, kShownText)));
              return first.size() < kShownElements;
            });
          } else {
            for (uint64_t i = 0; i < v.count && i < kShownElements; ++i) {
              if (v.type == GgufValueType::kF32 || v.type == GgufValueType::kF64 || v.type == GgufValueType::kU64)
                first.push_back(v.number(i));
              else first.push_back(v.integer(i));
            }
          }
          return Json{{"type", gguf_value_type_name(v.type)}, {"count", v.count}, {"first", first}};
        } else {
          return v;
        }
      },
      value.value);
}

Json metadata_json(const ModelFile& model) {
  Json out = Json::object();
  if (model.gguf() != nullptr) {
    for (const auto& [key, value] : model.gguf()->values()) out[key] = gguf_value_json(value);
  } else {
    for (const auto& [key, value] : model.checkpoint()->file().metadata()) out[key] = value;
  }
  return out;
}

Json tensor_json(const ModelTensor& t) {
  Json j = {{"name", t.name},
            {"type", t.type},
            {"stored_type", t.stored_type},
            {"shape", t.shape},
            {"bytes", t.bytes},
            {"bits_per_weight", bits_per_weight(t.bytes, elements(t))},
            {"loadable", t.spec.has_value() || t.dtype.has_value()}};
  if (t.spec) {
    const PackedSpec& s = *t.spec;
    j["format"] = s.layout.name();
    j["group_size"] = s.group_size;
    j["scale_dtype"] = dtype_name(s.scale_dtype);
    j["zero_kind"] = s.zero_kind == ZeroKind::kFixed ? "fixed" : s.zero_kind == ZeroKind::kZeros ? "zeros" : "offsets";
    if (s.zero_kind != ZeroKind::kFixed) j["zero_dtype"] = dtype_name(s.zero_dtype);
    j["has_perm"] = s.has_perm;
    j["residual_bits"] = s.residual_bits;
  }
  return j;
}

void inspect(const std::string& path, bool as_json) {
  const auto model = ModelFile::open(path);
  int64_t total_bytes = 0, total_elems = 0, packed_bytes = 0, packed_elems = 0;
  size_t unreadable = 0, name_width = 4;
  for (const ModelTensor& t : model->tensors()) {
    total_bytes += t.bytes;
    total_elems += elements(t);
    if (t.spec) {
      packed_bytes += t.bytes;
      packed_elems += elements(t);
    }
    if (!t.spec && !t.dtype) ++unreadable;
    name_width = std::max(name_width, std::min<size_t>(printable(t.name).size(), 60));
  }
  if (as_json) {
    Json tensors = Json::array();
    for (const ModelTensor& t : model->tensors()) tensors.push_back(tensor_json(t));
    const Json out = {{"file", path},
                      {"kind", model_file_kind_name(model->kind())},
                      {"metadata", metadata_json(*model)},
                      {"tensors", tensors},
                      {"tied", model->tied()},
                      {"totals",
                       {{"tensors", model->tensors().size()},
                        {"parameters", total_elems},
                        {"bytes", total_bytes},
                        {"bits_per_weight", bits_per_weight(total_bytes, total_elems)},
                        {"packed_parameters", packed_elems},
                        {"packed_bytes", packed_bytes},
                        {"not_loadable", unreadable}}}};
    // Names and strings of a file need not be UTF-8.
    fmt::print("{}\n", out.dump(2, ' ', false, Json::error_handler_t::replace));
    return;
  }
  fmt::print("{}: {}, {} tensors\n\n", printable(path), model_file_kind_name(model->kind()), model->tensors().size());
  fmt::print("{:<{}}  {:<12}  {:<18}  {:>6}  {:>10}  {:>10}\n", "name", name_width, "type", "shape", "group", "bits/weight",
             "bytes");
  for (const ModelTensor& t : model->tensors()) {
    std::string type = t.type == t.stored_type ? t.type : t.type + " (" + t.stored_type + ")";
    if (t.spec && t.spec->residual_bits > 0) type += fmt::format(" (+{} bits)", t.spec->residual_bits);
    const bool known = t.bytes > 0 || elements(t) == 0;
    fmt::print("{:<{}}  {:<12}  {:<18}  {:>6}  {:>10}  {:>10}{}\n", printable(t.name), name_width, type, shape_text(t.shape),
               t.spec ? std::to_string(t.spec->group_size) : "",
               known ? fmt::format("{:.3f}", bits_per_weight(t.bytes, elements(t))) : "?", known ? bytes_text(t.bytes) : "?",
               t.spec || t.dtype ? "" : "  not loadable");
  }
  fmt::print("\n{} parameters in {}, {:.3f} bits a weight", total_elems, bytes_text(total_bytes),
             bits_per_weight(total_bytes, total_elems));
  if (packed_elems > 0)
    fmt::print("; packed: {} parameters in {}, {:.3f} bits a weight", packed_elems, bytes_text(packed_bytes),
               bits_per_weight(packed_bytes, packed_elems));
  fmt::print("\n");
  if (unreadable > 0) fmt::print("{} tensors have types that cannot be loaded\n", unreadable);
  for (const auto& [name, other] : model->tied()) fmt::print("{} is {}, stored once\n", printable(name), printable(other));
  const Json metadata = metadata_json(*model);
  if (!metadata.empty()) fmt::print("\nmetadata\n");
  for (const auto& [key, value] : metadata.items()) {
    std::string text =
        value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (text.size() > kShownText * 2) text = text.substr(0, kShownText * 2) + fmt::format("... ({} bytes)", text.size());
    fmt::print("  {} = {}\n", printable(key), printable(text));
  }
}

}  // namespace

void add_inspect(CLI::App& app) {
  struct Options {
    std::string file;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "List the tensors of a model file: type, shape, bits per weight, bytes");
  command
      ->add_option("FILE", options->file, "A safetensors file, its index.json or folder, a native checkpoint, or a GGUF file")
      ->required();
  command->add_flag("--json", options->json, "Machine-readable output, with all metadata");
  command->callback([options] { inspect(options->file, options->json); });
}

}  // namespace subbyte::cli
