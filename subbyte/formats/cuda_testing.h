// What the device tests share: guarded device memory, a stream of their own, random packed matrices. Tests only.
#pragma once
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "subbyte/base/stream.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/formats/packed_matrix.h"

namespace subbyte::testing {

inline void require(cudaError_t e) { ASSERT_EQ(e, cudaSuccess) << cudaGetErrorString(e); }

// Device memory of exactly `bytes` bytes between guards, `shift` bytes away from a 256-byte boundary, filled with 0xff (NaN in
// every float type). With SUBBYTE_TEST_GUARDS=0 the guards go, so that compute-sanitizer sees a read past the end.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t bytes, int64_t shift = 0) : bytes_(bytes), shift_(shift) {
    const char* text = std::getenv("SUBBYTE_TEST_GUARDS");
    guard_ = text != nullptr && text[0] == '0' ? 0 : 256;
    total_ = guard_ + shift_ + bytes_ + guard_;
    require(cudaMalloc(&base_, size_t(total_ > 0 ? total_ : 1)));
    std::vector<uint8_t> fill(size_t(total_), 0xa5);
    std::memset(fill.data() + guard_ + shift_, 0xff, size_t(bytes_));
    upload(base_, fill.data(), total_);
  }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& host, int64_t shift = 0) : DeviceBuffer(int64_t(host.size() * sizeof(T)), shift) {
    if (bytes_ > 0) upload(data(), host.data(), bytes_);
  }
  ~DeviceBuffer() { cudaFree(base_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(base_) + guard_ + shift_; }
  template <class T = uint8_t>
  std::vector<T> host() const {
    std::vector<uint8_t> all(static_cast<size_t>(total_));
    require(cudaMemcpy(all.data(), base_, size_t(total_), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < total_; ++i) {
      if (i >= guard_ + shift_ && i < guard_ + shift_ + bytes_) continue;
      if (all[size_t(i)] != 0xa5) {
        ADD_FAILURE() << "guard overwritten at byte " << i - guard_ - shift_ << " of " << bytes_;
        break;
      }
    }
    std::vector<T> out(size_t(bytes_) / sizeof(T));
    if (!out.empty()) std::memcpy(out.data(), all.data() + guard_ + shift_, out.size() * sizeof(T));
    return out;
  }

 private:
  // cudaMemcpy from pageable memory may return before the bytes have arrived, and a non-blocking stream would not wait.
  static void upload(void* to, const void* from, int64_t bytes) {
    require(cudaMemcpy(to, from, size_t(bytes), cudaMemcpyHostToDevice));
    require(cudaDeviceSynchronize());
  }

  void* base_ = nullptr;
  int64_t bytes_, shift_, guard_, total_;
};

// A stream that does not wait for the default one.
class TestStream {
 public:
  TestStream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~TestStream() { cudaStreamDestroy(stream_); }
  Stream stream() const { return Stream{stream_}; }
  cudaStream_t raw() const { return stream_; }
  void wait() const { require(cudaStreamSynchronize(stream_)); }
  // Waits; the text of the error that a device has reported (value_watch.h), empty when there is none.
  std::string reported() const {
    wait();
    try {
      cuda::throw_watched();
    } catch (const std::exception& e) {
      return e.what();
    }
    return {};
  }
  // The report begins so.
  void expect_report(const std::string& beginning) const {
    const std::string text = reported();
    EXPECT_EQ(text.substr(0, beginning.size()), beginning) << text;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t bits() {
    state_ += 0x9E3779B97F4A7C15ull;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  float uniform() { return float(bits() >> 40) * 0x1p-24f; }  // [0, 1)
  float centred() { return uniform() + uniform() - 1.0f; }    // [-1, 1)

 private:
  uint64_t state_;
};

inline std::vector<uint8_t> random_floats(Random& r, int64_t count, DType t, float scale = 1.0f) {
  std::vector<uint8_t> out(static_cast<size_t>(count * dtype_bytes(t)));
  for (int64_t i = 0; i < count; ++i) store_float(out.data(), t, i, scale * r.centred());
  return out;
}

// A random packed matrix on the host and on the device.
struct TestMatrix {
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<int32_t> perm;
  PackedMatrix host, device;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers;

  TestMatrix(Random& r, const std::string& format, int64_t n, int64_t k, int64_t group_size, DType scale_dtype, ZeroKind kind,
             DType zero_dtype, bool permuted, int64_t shift = 0) {
    host.layout = row_layout(format, k);
    host.n = n;
    host.k = k;
    host.group_size = group_size;
    host.scale_dtype = scale_dtype;
    host.zero_kind = kind;
    host.zero_dtype = zero_dtype;
    const int64_t groups = host.groups();
    codes.assign(size_t(n * host.layout.row_bytes), 0);
    for (int64_t i = 0; i < n; ++i)
      for (int s = 0; s < host.layout.segment_count; ++s) {
        const Segment& seg = host.layout.segments[size_t(s)];
        for (int64_t j = 0; j < seg.k_count; ++j)
          set_code(codes.data() + i * host.layout.row_bytes + seg.byte_begin, j, format_bits(seg.format),
                   uint32_t(r.below(format_levels(seg.format))));
      }
    scales.resize(size_t(n * groups * dtype_bytes(scale_dtype)));
    for (int64_t i = 0; i < n * groups; ++i) store_float(scales.data(), scale_dtype, i, 0.01f + 0.02f * r.uniform());
    if (kind != ZeroKind::kFixed) {
      zeros.resize(size_t(n * groups * dtype_bytes(zero_dtype)));
      for (int64_t i = 0; i < n * groups; ++i)
        store_float(zeros.data(), zero_dtype, i, kind == ZeroKind::kZeros ? 4.0f * r.uniform() : 0.1f * r.centred());
    }
    if (permuted) {
      perm.resize(size_t(k));
      for (int64_t i = 0; i < k; ++i) perm[size_t(i)] = int32_t(i);
      for (int64_t i = k - 1; i > 0; --i) std::swap(perm[size_t(i)], perm[size_t(r.below(i + 1))]);
    }
    host.codes = codes.data();
    host.scales = scales.data();
    host.zeros = kind == ZeroKind::kFixed ? nullptr : zeros.data();
    host.perm = permuted ? perm.data() : nullptr;
    device = host;
    device.codes = keep(codes, shift);
    device.scales = keep(scales, shift * dtype_bytes(scale_dtype));
    if (kind != ZeroKind::kFixed) device.zeros = keep(zeros, 0);
    if (permuted) device.perm = reinterpret_cast<const int32_t*>(keep(perm, 0));
  }

  template <class T>
  const uint8_t* keep(const std::vector<T>& v, int64_t shift) {
    buffers.push_back(std::make_unique<DeviceBuffer>(v, shift));
    return buffers.back()->data();
  }

  // [N, K] float32 values in stored order.
  std::vector<float> values() const {
    std::vector<float> out(size_t(host.n * host.k));
    for (int64_t n = 0; n < host.n; ++n)
      for (int64_t k = 0; k < host.k; ++k) out[size_t(n * host.k + k)] = packed_value(host, n, k);
    return out;
  }
  // |s (q - c)| + |o| + |offset| of every weight: what the error bound of linear.h weighs |x| with.
  std::vector<float> magnitudes() const {
    std::vector<float> out(size_t(host.n * host.k));
    for (int64_t n = 0; n < host.n; ++n)
      for (int64_t k = 0; k < host.k; ++k) {
        const Format f = segment_of(host.layout, k).format;
        const int64_t i = n * host.groups() + k / host.group_size;
        const float s = load_float(host.scales, host.scale_dtype, i), c = float(format_levels(f) / 2);
        const float o = affine_value(c, s, group_zero(host, f, i), host.zero_kind);
        out[size_t(n * host.k + k)] =
            std::fabs(s * (float(packed_code(host, n, k)) - c)) + std::fabs(o) +
            (host.zero_kind == ZeroKind::kOffsets ? std::fabs(load_float(host.zeros, host.zero_dtype, i)) : 0.0f);
      }
    return out;
  }
  std::string name() const {
    return host.layout.name() + " [" + std::to_string(host.n) + ", " + std::to_string(host.k) + "] group_size " +
           std::to_string(host.group_size) + " scales " + dtype_name(host.scale_dtype) + " kind " +
           std::to_string(int(host.zero_kind)) + (perm.empty() ? "" : " perm");
  }
};

// A covering walk over formats, sizes, group sizes, types and kinds: every value of each axis meets every format, neighbours
// of the other axes change with each step.
struct MatrixCase {
  std::string format;
  int64_t n, k, group_size;
  DType scale_dtype, zero_dtype;
  ZeroKind kind;
  bool permuted;
  int64_t shift;
};
inline std::vector<MatrixCase> matrix_cases(bool small) {
  const int64_t ks[] = {1, 5, 64, 127, 576, 1536, 4097}, groups[] = {16, 32, 64, 100, 128, 1 << 20};
  const int64_t ns[] = {64, 5, 127, 33, 1, 576, 8};
  const DType types[] = {DType::kBF16, DType::kF16, DType::kF32};
  std::vector<MatrixCase> out;
  int i = 0;
  for (int f = 0; f < kFormatCount; ++f)
    for (int64_t k : ks) {
      for (int repeat = 0; repeat < (small ? 1 : 3); ++repeat, ++i) {
        MatrixCase c;
        c.format = kFormats[f].name;
        c.n = ns[(i * 3 + f) % 7];
        c.k = k;
        c.group_size = groups[(i + f) % 6];
        c.scale_dtype = types[i % 3];
        c.zero_dtype = types[(i / 3) % 3];
        c.kind = ZeroKind((i / 2 + f) % 3);
        c.permuted = (i % 4) == 3;
        c.shift = i % 5 == 4 ? 1 : 0;
        out.push_back(c);
      }
    }
  const char* mixed[] = {"uint8*64+uint4*448+uint2*64", "sign*100+uint3*300+uint5*87", "uint7*128+ternary*128+uint6*320"};
  const int64_t mixed_k[] = {576, 487, 576}, mixed_group[] = {64, 100, 32};
  for (int m = 0; m < 3; ++m)
    for (int kind = 0; kind < 3; ++kind)
      out.push_back({mixed[m], ns[(m + kind) % 7], mixed_k[m], mixed_group[m], types[kind], types[m], ZeroKind(kind),
                     (m + kind) % 2 == 1, 0});
  return out;
}
inline TestMatrix make_matrix(Random& r, const MatrixCase& c) {
  return TestMatrix(r, c.format, c.n, c.k, c.group_size, c.scale_dtype, c.kind, c.zero_dtype, c.permuted, c.shift);
}

}  // namespace subbyte::testing
