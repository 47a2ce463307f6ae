// Test support: small files in memory, written by hand (GGUF) or by the writers under test, and a temporary folder.
#pragma once
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "subbyte/base/int_math.h"

namespace subbyte::io_test {

using Bytes = std::vector<uint8_t>;

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "subbyte-test-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) ADD_FAILURE() << "no temporary folder";
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline Bytes read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return Bytes(std::istreambuf_iterator<char>(in), {});
}
inline void write_file(const std::string& path, const Bytes& b) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(b.data()), std::streamsize(b.size()));
}

class ByteWriter {
 public:
  template <class T>
  ByteWriter& put(T v) {
    const auto* p = reinterpret_cast<const uint8_t*>(&v);
    bytes.insert(bytes.end(), p, p + sizeof(T));
    return *this;
  }
  ByteWriter& string(const std::string& s) {
    put<uint64_t>(s.size());
    bytes.insert(bytes.end(), s.begin(), s.end());
    return *this;
  }
  Bytes bytes;
};

struct GgufTestTensor {
  std::string name;
  std::vector<uint64_t> dims;  // innermost first
  uint32_t type = 0;
  Bytes data;
};

// A GGUF file with key-values already encoded in `values` (value_count of them).
inline Bytes gguf_file(const std::vector<GgufTestTensor>& tensors, const Bytes& values = {}, uint64_t value_count = 0,
                       uint32_t version = 3, uint64_t alignment = 32) {
  ByteWriter w;
  w.put<uint32_t>(0x46554747).put<uint32_t>(version).put<uint64_t>(tensors.size()).put<uint64_t>(value_count);
  w.bytes.insert(w.bytes.end(), values.begin(), values.end());
  uint64_t offset = 0;
  for (const GgufTestTensor& t : tensors) {
    w.string(t.name).put<uint32_t>(uint32_t(t.dims.size()));
    for (const uint64_t d : t.dims) w.put<uint64_t>(d);
    w.put<uint32_t>(t.type).put<uint64_t>(offset);
    offset += uint64_t(round_up(int64_t(t.data.size()), int64_t(alignment)));
  }
  while (w.bytes.size() % alignment != 0) w.put<uint8_t>(0);
  for (const GgufTestTensor& t : tensors) {
    w.bytes.insert(w.bytes.end(), t.data.begin(), t.data.end());
    while (w.bytes.size() % alignment != 0) w.put<uint8_t>(0);
  }
  return w.bytes;
}

// A safetensors file with this header text.
inline Bytes safetensors_file(const std::string& header, size_t data_bytes) {
  ByteWriter w;
  w.string(header);
  for (size_t i = 0; i < data_bytes; ++i) w.put<uint8_t>(uint8_t(i));
  return w.bytes;
}

}  // namespace subbyte::io_test
