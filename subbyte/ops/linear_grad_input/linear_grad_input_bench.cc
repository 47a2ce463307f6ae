// How fast linear_grad_input streams packed weights, as GB/s of code bytes and as a share of the memory read bandwidth that
// this run measured, on weights that no cache holds (copies over 256 MiB in turn). Every shape is first held to the reference.
#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/ops/linear_grad_input/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kColdBytes = int64_t(256) << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t[], Free>;
Bytes allocate(int64_t bytes) { return Bytes(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(round_up(bytes + 1, 64))))); }

// Sums the array as 64-bit words: bytes a second that all threads together read.
double read_bandwidth(const uint8_t* data, int64_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(bytes / 4096, 64, [&](int64_t begin, int64_t end) {
      uint64_t sum[8] = {};
      for (int64_t i = begin * 512; i < end * 512; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
      uint64_t total = 0;
      for (const uint64_t s : sum) total += s;
      benchmark::DoNotOptimize(total);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, double(bytes) / seconds);
  }
  return best;
}

// gy and gx float32; the first columns are compared with the reference.
void grad_input_cold(benchmark::State& state, Format format, int64_t m, int64_t n, int64_t k, int64_t group_size,
                     ZeroKind zeros) {
  PackedMatrix w;
  w.layout = row_layout(format, k);
  w.n = n;
  w.k = k;
  w.group_size = group_size;
  w.scale_dtype = DType::kF16;
  w.zero_dtype = DType::kF16;
  w.zero_kind = zeros;
  const int64_t copy_bytes = round_up(w.codes_bytes(), 4096), copies = max_i64(1, kColdBytes / copy_bytes);
  const int64_t groups = n * w.groups();
  Bytes codes = allocate(copies * copy_bytes), scales = allocate(groups * 2), zero = allocate(groups * 2);
  Bytes gy = allocate(m * n * 4), gx = allocate(m * k * 4), expected = allocate(m * k * 4);
  uint32_t* words = reinterpret_cast<uint32_t*>(codes.get());
  for (int64_t i = 0; i < copies * copy_bytes / 4; ++i) words[i] = uint32_t(uint64_t(i) * 2654435761u >> 7) ^ uint32_t(i << 13);
  if (format == Format::kTernary)  // code 3 does not exist
    for (int64_t i = 0; i < copies * copy_bytes / 4; ++i) words[i] &= ~((words[i] >> 1) & 0x55555555u);
  for (int64_t i = 0; i < groups; ++i) {
    store_float(scales.get(), DType::kF16, i, 0.01f * (1.0f + uniform24(philox_word(1, 0, uint64_t(i)))));
    store_float(zero.get(), DType::kF16, i, float(format_centre(format)) + 0.25f);
  }
  float* gys = reinterpret_cast<float*>(gy.get());
  for (int64_t i = 0; i < m * n; ++i) gys[i] = 2.0f * uniform24(philox_word(2, 0, uint64_t(i))) - 1.0f;
  w.codes = codes.get();
  w.scales = scales.get();
  if (zeros != ZeroKind::kFixed) w.zeros = zero.get();

  LinearGradInputParams p;
  p.gy = gy.get();
  p.m = m;
  p.gy_stride = n;
  p.w = w;
  p.gx = gx.get();
  p.gx_stride = k;
  p.workspace_bytes = linear_grad_input_workspace_bytes(p);
  Bytes workspace = allocate(p.workspace_bytes);
  p.workspace = workspace.get();
  linear_grad_input(p);
  LinearGradInputParams r = p;
  r.gx = expected.get();
  const int64_t columns = min_i64(k, 8);
  reference::linear_grad_input_columns(r, 0, columns);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const double got = reinterpret_cast<float*>(gx.get())[i * k + j];
      const double want = reinterpret_cast<float*>(expected.get())[i * k + j];
      if (!(std::abs(got - want) <= 1e-4 * std::abs(want) + 1e-4)) {
        state.SkipWithError("linear_grad_input differs from its reference");
        return;
      }
    }
  const double bandwidth = read_bandwidth(codes.get(), copies * copy_bytes);
  int64_t copy = 0;
  for (auto _ : state) {
    p.w.codes = codes.get() + copy * copy_bytes;
    linear_grad_input(p);
    benchmark::ClobberMemory();
    copy = copy + 1 < copies ? copy + 1 : 0;
  }
  const double bytes = double(w.codes_bytes()) + double(groups) * (zeros == ZeroKind::kFixed ? 2.0 : 4.0);
  state.counters["weight_GB/s"] = benchmark::Counter(bytes * double(state.iterations()) * 1e-9, benchmark::Counter::kIsRate);
  state.counters["of_read_bw"] =
      benchmark::Counter(bytes * double(state.iterations()) / bandwidth, benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * double(m) * double(n) * double(k) * double(state.iterations()), benchmark::Counter::kIsRate);
  state.SetLabel(select_linear_grad_input_kernel(m, format, group_size, k, DType::kF32, active_isa()).name);
}

const int registered = [] {
  const auto add = [](Format f, int64_t m, int64_t n, int64_t k, int64_t group_size, ZeroKind zeros, const char* what) {
    const std::string name = std::string("linear_grad_input/") + format_name(f) + "/M:" + std::to_string(m) +
                             "/N:" + std::to_string(n) + "/K:" + std::to_string(k) + "/g:" + std::to_string(group_size) + what;
    benchmark::RegisterBenchmark(name.c_str(), grad_input_cold, f, m, n, k, group_size, zeros)
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
  };
  for (int f = 0; f < kFormatCount; ++f) add(Format(f), 1, 4096, 4096, 128, ZeroKind::kFixed, "");
  add(Format::kUint4, 1, 4096, 4096, 32, ZeroKind::kFixed, "");
  add(Format::kUint4, 1, 4096, 4096, 128, ZeroKind::kZeros, "/zeros");
  for (const int64_t m : {2, 4, 8, 16, 64, 512}) add(Format::kUint4, m, 4096, 4096, 128, ZeroKind::kFixed, "");
  add(Format::kUint4, 64, 4096, 4096, 100, ZeroKind::kFixed, "");
  add(Format::kUint4, 64, 576, 1536, 64, ZeroKind::kFixed, "");
  return 0;
}();

}  // namespace
}  // namespace subbyte
