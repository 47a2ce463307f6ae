// Test support: what the fuzz targets and the tests of hostile input do with a file: open it from memory, load everything in
// it, touch every loaded byte. A FormatError is a fine end; anything else that escapes is a defect.
#pragma once
#include <cstdint>
#include <memory>
#include <span>

#include "subbyte/base/error.h"
#include "subbyte/io/checkpoint.h"
#include "subbyte/io/gguf.h"
#include "subbyte/io/safetensors.h"

namespace subbyte::io_test {

// Keeps the compiler from dropping the reads.
inline uint64_t touch(const SharedBytes& b) {
  uint64_t sum = 0;
  for (const uint8_t v : b.span()) sum += v;
  return sum;
}
inline uint64_t touch(const LoadedTensor& t) {
  if (const auto* d = std::get_if<DenseTensor>(&t)) return touch(d->bytes);
  const auto& p = std::get<PackedTensor>(t);
  const PackedMatrix w = p.view();
  validate(w, "file");
  validate_perm(w, "file");
  uint64_t sum = touch(p.codes) + touch(p.scales) + touch(p.zeros) + touch(p.perm);
  if (w.n > 0 && w.k > 0) sum += packed_code(w, w.n - 1, w.k - 1);
  return sum;
}

// Each returns true when the whole file was accepted.
inline bool parse_whole_safetensors(std::span<const uint8_t> bytes) {
  try {
    const auto file = SafetensorsFile::from_bytes(bytes, "input", nullptr);
    volatile uint64_t sum = 0;
    for (const SafetensorsEntry& e : file->entries()) sum = sum + touch(file->load(e));
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

inline bool parse_whole_index(std::span<const uint8_t> bytes) {
  try {
    parse_safetensors_index(bytes, "input");
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

inline bool parse_whole_checkpoint(std::span<const uint8_t> bytes) {
  try {
    const auto file = CheckpointFile::from_bytes(bytes, "input", nullptr);
    volatile uint64_t sum = 0;
    for (const SafetensorsEntry* e : file->dense()) sum = sum + touch(file->file().load(*e));
    for (const PackedSpec& s : file->packed()) sum = sum + touch(file->load(s));
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

inline bool parse_whole_gguf(std::span<const uint8_t> bytes) {
  try {
    const auto file = GgufFile::from_bytes(bytes, "input", nullptr);
    volatile uint64_t sum = 0;
    for (const auto& [key, value] : file->values()) {
      sum = sum + key.size();
      if (const auto* text = std::get_if<std::string_view>(&value.value))
        for (const char c : *text) sum = sum + uint8_t(c);
      if (const auto* array = std::get_if<GgufArray>(&value.value)) {
        if (array->type == GgufValueType::kString) {
          array->for_each_string([&](std::string_view s) {
            for (const char c : s) sum = sum + uint8_t(c);
            return true;
          });
        } else if (array->count > 0) {
          sum = sum + (array->number(array->count - 1) > 0 ? 1 : 0);
        }
      }
    }
    for (const GgufTensor& t : file->tensors()) {
      PackedSpec spec;
      ElementType dtype;
      if (file->packed_spec(t, &spec) || file->dense_type(t, &dtype)) sum = sum + touch(file->load(t));
    }
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

}  // namespace subbyte::io_test
