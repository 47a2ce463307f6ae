// For tests: reads testdata/golden/*.txt, whose format tools/make_golden.py describes.
#pragma once
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "subbyte/base/testdata_test.h"
#include "subbyte/formats/packed_matrix.h"

namespace subbyte::testing {

struct GoldenCase {
  std::string name, scheme;
  RowLayout layout;
  int64_t n = 0, k = 0, group_size = 0;
  ZeroKind zero_kind = ZeroKind::kFixed;
  DType scale_dtype = DType::kF32, zero_dtype = DType::kF32;
  std::vector<int32_t> perm;                 // empty when there is none
  std::vector<uint8_t> scales, zeros;        // raw little-endian patterns
  std::vector<uint8_t> codes, packed;        // [n, k], [n, row_bytes]
  std::vector<uint32_t> values;              // [n, k], input order
  std::vector<float> input;                  // [n, k], input order
  std::vector<uint8_t> nearest, stochastic;  // [n, k], stored order
  uint64_t seed = 0, offset = 0, first_row = 0;

  PackedMatrix view() const {
    PackedMatrix w;
    w.layout = layout;
    w.n = n;
    w.k = k;
    w.group_size = group_size;
    w.codes = packed.data();
    w.scales = scales.data();
    w.zeros = zero_kind == ZeroKind::kFixed ? nullptr : zeros.data();
    w.perm = perm.empty() ? nullptr : perm.data();
    w.scale_dtype = scale_dtype;
    w.zero_dtype = zero_dtype;
    w.zero_kind = zero_kind;
    return w;
  }
};

inline std::vector<GoldenCase> read_golden(const std::string& file) {
  const std::string path = testdata_dir() + "/golden/" + file;
  std::ifstream in(path);
  EXPECT_TRUE(in.good()) << path << " cannot be read";
  auto dtype = [](const std::string& s) { return s == "float32" ? DType::kF32 : s == "float16" ? DType::kF16 : DType::kBF16; };
  auto patterns = [](std::istringstream& words, DType t, std::vector<uint8_t>& out) {
    std::string word;
    while (words >> word) {
      const uint32_t bits = uint32_t(std::stoul(word, nullptr, 16));
      for (int i = 0; i < int(dtype_bytes(t)); ++i) out.push_back(uint8_t(bits >> (8 * i)));
    }
  };
  auto codes = [](std::istringstream& words, std::vector<uint8_t>& out) {
    int code;
    while (words >> code) out.push_back(uint8_t(code));
  };
  std::vector<GoldenCase> cases;
  std::string line, layout;
  GoldenCase c;
  while (std::getline(in, line)) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string key, word;
    words >> key;
    if (key == "case") c = GoldenCase{}, words >> c.name;
    else if (key == "layout") words >> layout;
    else if (key == "n") words >> c.n;
    else if (key == "k") words >> c.k, c.layout = row_layout(layout, c.k);
    else if (key == "group") words >> c.group_size;
    else if (key == "zero_kind")
      words >> word, c.zero_kind = word == "fixed" ? ZeroKind::kFixed : word == "zeros" ? ZeroKind::kZeros : ZeroKind::kOffsets;
    else if (key == "scale_dtype") words >> word, c.scale_dtype = dtype(word);
    else if (key == "zero_dtype") words >> word, c.zero_dtype = dtype(word);
    else if (key == "scheme") words >> c.scheme;
    else if (key == "seed") words >> c.seed;
    else if (key == "offset") words >> c.offset;
    else if (key == "first_row") words >> c.first_row;
    else if (key == "scales") patterns(words, c.scale_dtype, c.scales);
    else if (key == "zeros") patterns(words, c.zero_dtype, c.zeros);
    else if (key == "codes") codes(words, c.codes);
    else if (key == "nearest") codes(words, c.nearest);
    else if (key == "stochastic") codes(words, c.stochastic);
    else if (key == "perm") {
      if (line != "perm none") {
        int32_t p;
        while (words >> p) c.perm.push_back(p);
      }
    } else if (key == "packed") {
      std::string hex;
      words >> hex;
      for (size_t i = 0; i + 1 < hex.size(); i += 2) c.packed.push_back(uint8_t(std::stoul(hex.substr(i, 2), nullptr, 16)));
    } else if (key == "values") {
      while (words >> word) c.values.push_back(uint32_t(std::stoul(word, nullptr, 16)));
    } else if (key == "input") {
      while (words >> word) c.input.push_back(std::bit_cast<float>(uint32_t(std::stoul(word, nullptr, 16))));
    } else if (key == "end") {
      cases.push_back(c);
    } else {
      ADD_FAILURE() << path << ": unknown key '" << key << "'";
    }
  }
  EXPECT_FALSE(cases.empty()) << path << " holds no case";
  return cases;
}

// <format>.txt of every format in the registry, and mixed.txt. A format without its file fails.
inline std::vector<GoldenCase> read_packed_golden() {
  std::vector<GoldenCase> all = read_golden("mixed.txt");
  for (const FormatInfo& f : kFormats)
    for (GoldenCase& c : read_golden(std::string(f.name) + ".txt")) all.push_back(std::move(c));
  return all;
}

}  // namespace subbyte::testing
