// For tests: packed matrices with random content, and the shapes that codec kernels can get wrong.
#pragma once
#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "subbyte/formats/packed_matrix.h"

namespace subbyte::testing {

struct MatrixShape {
  std::string layout;
  int64_t n, k, group_size;
  ZeroKind zero_kind = ZeroKind::kFixed;
  DType scale_dtype = DType::kF32, zero_dtype = DType::kF32;
  bool permuted = false;

  std::string name() const {
    const char* kinds[] = {"fixed", "zeros", "offsets"};
    return layout + " " + std::to_string(n) + "x" + std::to_string(k) + " group " + std::to_string(group_size) + " " +
           kinds[int(zero_kind)] + " " + dtype_name(scale_dtype) + "/" + dtype_name(zero_dtype) + (permuted ? " perm" : "");
  }
};

// Owns the arrays of a packed matrix. Codes are below the levels of their format, spare bits are random garbage: readers must
// not look at them.
struct RandomMatrix {
  RandomMatrix(const MatrixShape& shape, uint32_t seed) : rng(seed) {
    w.layout = row_layout(shape.layout, shape.k);
    w.n = shape.n;
    w.k = shape.k;
    w.group_size = shape.group_size;
    w.zero_kind = shape.zero_kind;
    w.scale_dtype = shape.scale_dtype;
    w.zero_dtype = shape.zero_dtype;
    codes.resize(size_t(w.codes_bytes()));
    for (uint8_t& b : codes) b = uint8_t(rng());
    for (int64_t n = 0; n < w.n; ++n)
      for (int64_t k = 0; k < w.k; ++k) {
        const Segment& s = segment_of(w.layout, k);
        set_code(codes.data() + n * w.layout.row_bytes + s.byte_begin, k - s.k_begin, format_bits(s.format),
                 rng() % uint32_t(format_levels(s.format)));
      }
    const int64_t count = w.n * w.groups();
    scales.resize(size_t(count * dtype_bytes(w.scale_dtype)));
    zeros.resize(w.zero_kind == ZeroKind::kFixed ? 0 : size_t(count * dtype_bytes(w.zero_dtype)));
    std::uniform_real_distribution<float> unit(0.0f, 1.0f);
    for (int64_t i = 0; i < count; ++i) {
      store_float(scales.data(), w.scale_dtype, i,
                  rng() % 16 == 0 ? 0.0f : (rng() % 8 == 0 ? -0.02f : 0.01f) * (0.2f + unit(rng)));
      if (w.zero_kind == ZeroKind::kZeros)
        store_float(zeros.data(), w.zero_dtype, i, rng() % 2 == 0 ? 9 * unit(rng) : float(rng() % 16));
      if (w.zero_kind == ZeroKind::kOffsets) store_float(zeros.data(), w.zero_dtype, i, unit(rng) - 0.7f);
    }
    w.codes = codes.data();
    w.scales = scales.data();
    w.zeros = zeros.empty() ? nullptr : zeros.data();
    if (shape.permuted) {
      perm.resize(size_t(w.k));
      std::iota(perm.begin(), perm.end(), 0);
      std::shuffle(perm.begin(), perm.end(), rng);
      w.perm = perm.data();
    }
  }
  RandomMatrix(const RandomMatrix&) = delete;
  RandomMatrix& operator=(const RandomMatrix&) = delete;

  std::mt19937 rng;
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<int32_t> perm;
  PackedMatrix w;
};

// Every format with row lengths around every vector width (8, 16, 64) and piece (512), groups that end inside vectors, mixed
// rows whose segments end anywhere, permutations, and all parameter types.
inline std::vector<MatrixShape> codec_shapes() {
  std::vector<MatrixShape> shapes;
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  size_t i = 0;
  for (const FormatInfo& f : kFormats)
    for (int64_t k : {0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 511, 513, 1030}) {
      const int64_t groups[] = {1, 3, 8, 16, 20, 32, 64, 100, 128, 5000};
      for (int repeat = 0; repeat < 3; ++repeat, ++i)
        shapes.push_back({f.name, 1 + int64_t(i % 3), k, groups[(i * 7 + i / 10) % 10], ZeroKind(repeat), types[i % 3],
                          types[i / 3 % 3], i % 4 == 3});
    }
  for (ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
    for (bool permuted : {false, true}) {
      shapes.push_back({"uint8*64+uint4*100+sign*3", 3, 167, 4, kind, DType::kF16, DType::kF16, permuted});
      shapes.push_back({"uint7*5+uint3*15+ternary*10+uint5*3", 4, 33, 5, kind, DType::kF32, DType::kBF16, permuted});
      shapes.push_back({"uint2*512+uint6*544+uint3*77", 2, 1133, 32, kind, DType::kBF16, DType::kF32, permuted});
      shapes.push_back({"sign*1+uint8*1+uint5*1+uint3*1", 5, 4, 1, kind, DType::kF32, DType::kF16, permuted});
    }
  return shapes;
}

}  // namespace subbyte::testing
