// For the tests of linear and linear_grad_input: packed matrices with random content in guarded memory, their values and
// magnitudes in double, and vectors of any float type.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/error.h"
#include "subbyte/formats/packed_matrix.h"
#include "subbyte/ops/linear/weight_segment.h"

namespace subbyte::testing_matrix {

// Bytes that end right before an unreadable page; the bytes in front hold a pattern that intact() checks.
class GuardedBytes {
 public:
  explicit GuardedBytes(int64_t bytes, int fill = 0xff) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped_ = round_up(bytes + kFront, page) + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, size_t(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + mapped_ - page, size_t(page), PROT_NONE);
    data_ = base_ + mapped_ - page - bytes;
    std::memset(data_ - kFront, 0xa5, kFront);
    if (bytes > 0) std::memset(data_, fill, size_t(bytes));  // 0xff...: NaN in every float type
  }
  ~GuardedBytes() { munmap(base_, size_t(mapped_)); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  uint8_t* data() { return data_; }
  int64_t size() const { return bytes_; }
  bool intact() const {
    for (int64_t i = 1; i <= kFront; ++i)
      if (data_[-i] != 0xa5) return false;
    return true;
  }

 private:
  static constexpr int64_t kFront = 128;
  int64_t bytes_, mapped_;
  uint8_t *base_, *data_;
};

struct MatrixSpec {
  std::string layout;  // "uint4", or mixed
  int64_t n = 0, k = 0, group_size = 1;
  ZeroKind zero_kind = ZeroKind::kFixed;
  DType scale_dtype = DType::kF32, zero_dtype = DType::kF32;
  bool perm = false;
  std::string text() const {
    return detail::concat(layout, " N=", n, " K=", k, " group_size=", group_size, " zeros=", int(zero_kind), " scale ",
                          dtype_name(scale_dtype), " zero ", dtype_name(zero_dtype), perm ? " perm" : "");
  }
};

class TestMatrix {
 public:
  TestMatrix(const MatrixSpec& spec, uint32_t seed) : random_(seed) {
    w.layout = row_layout(spec.layout, spec.k);
    w.n = spec.n;
    w.k = spec.k;
    w.group_size = spec.group_size;
    w.scale_dtype = spec.scale_dtype;
    w.zero_dtype = spec.zero_dtype;
    w.zero_kind = spec.zero_kind;
    codes_ = std::make_unique<GuardedBytes>(w.codes_bytes(), 0);
    for (int64_t n = 0; n < w.n; ++n)
      for (int s = 0; s < w.layout.segment_count; ++s) {
        const Segment& segment = w.layout.segments[s];
        uint8_t* row = codes_->data() + n * w.layout.row_bytes + segment.byte_begin;
        for (int64_t k = 0; k < segment.k_count; ++k)
          set_code(row, k, format_bits(segment.format), random_() % uint32_t(format_levels(segment.format)));
      }
    const int64_t groups = w.n * w.groups();
    scales_ = std::make_unique<GuardedBytes>(groups * dtype_bytes(w.scale_dtype));
    zeros_ = std::make_unique<GuardedBytes>(groups * dtype_bytes(w.zero_dtype));
    for (int64_t i = 0; i < groups; ++i) {
      const Segment& s = segment_of(w.layout, i % w.groups() * w.group_size);
      const float scale = 0.01f * (1.0f + uniform()) * (random_() % 8 == 0 ? -1.0f : 1.0f);
      store_float(scales_->data(), w.scale_dtype, i, scale);
      const float zero = uniform() * float(format_levels(s.format) - 1);
      store_float(zeros_->data(), w.zero_dtype, i, w.zero_kind == ZeroKind::kOffsets ? -scale * zero : zero);
    }
    w.codes = codes_->data();
    w.scales = scales_->data();
    if (w.zero_kind != ZeroKind::kFixed) w.zeros = zeros_->data();
    if (spec.perm) {
      perm_ = std::make_unique<GuardedBytes>(4 * w.k);
      int32_t* p = reinterpret_cast<int32_t*>(perm_->data());
      for (int64_t k = 0; k < w.k; ++k) p[k] = int32_t(k);
      for (int64_t k = w.k - 1; k > 0; --k) std::swap(p[k], p[random_() % uint32_t(k + 1)]);
      w.perm = p;
    }
    values.resize(size_t(w.n * w.k));
    magnitudes.resize(size_t(w.n * w.k));
    for (int64_t n = 0; n < w.n; ++n)
      for (int64_t k = 0; k < w.k; ++k) {
        const int64_t i = n * w.groups() + k / w.group_size;
        const Format format = segment_of(w.layout, k).format;
        const double scale = load_double(w.scales, w.scale_dtype, i), zero = double(group_zero(w, format, i));
        const double centre = format_centre(format), code = packed_code(w, n, k);
        const double offset = w.zero_kind == ZeroKind::kOffsets ? scale * centre + zero : scale * (centre - zero);
        values[size_t(n * w.k + k)] = double(packed_value(w, n, k));
        magnitudes[size_t(n * w.k + k)] =
            std::abs(scale * (code - centre)) + std::abs(offset) + (w.zero_kind == ZeroKind::kOffsets ? std::abs(zero) : 0.0);
      }
  }
  float uniform() { return float(random_() >> 8) * 0x1p-24f; }
  float centred() { return 2.0f * uniform() - 1.0f; }
  std::mt19937& random() { return random_; }
  bool intact() const { return codes_->intact() && scales_->intact() && zeros_->intact(); }

  PackedMatrix w;
  std::vector<double> values, magnitudes;  // [N, K], stored column order

 private:
  std::mt19937 random_;
  std::unique_ptr<GuardedBytes> codes_, scales_, zeros_, perm_;
};

// A [rows, columns] array of type t, rows `stride` elements apart, the last row not padded.
inline int64_t strided_bytes(DType t, int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 ? 0 : ((rows - 1) * stride + columns) * dtype_bytes(t);
}

// The instruction sets of this machine, lowest first.
inline std::vector<Isa> present_isas() {
  std::vector<Isa> out;
  for (int i = 0; i < kIsaCount; ++i)
    if (Isa(i) <= detected_isa()) out.push_back(Isa(i));
  return out;
}

}  // namespace subbyte::testing_matrix
