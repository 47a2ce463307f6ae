// linear_a8, x float32, N = K = 4096, weights cold: every call takes another matrix of a pool of 320 MiB. Times every kernel of
// the table that this machine has, alone and with all threads. Counters, the best of calls that alternate with the read:
//   weight_GBps  bytes of codes a second      of_read  the same over a plain read of as many bytes
//   Gops         2 M N K a second
// A kernel is timed only after rows of its result have just matched the reference.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kN = 4096, kK = 4096, kPoolBytes = int64_t(320) << 20;

struct AlignedDelete {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t, AlignedDelete>;
Bytes allocate(int64_t bytes) {
  void* p = std::aligned_alloc(4096, size_t(round_up(bytes, 4096)));
  if (p == nullptr) throw std::bad_alloc();
  return Bytes(static_cast<uint8_t*>(p));
}

uint8_t* pool() {
  static const Bytes bytes = [] {
    Bytes b = allocate(kPoolBytes);
    uint64_t state = 88172645463325252ull;  // xorshift64: written, so that no page is the shared zero page
    for (int64_t i = 0; i < kPoolBytes / 8; ++i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      reinterpret_cast<uint64_t*>(b.get())[i] = state;
    }
    return b;
  }();
  return bytes.get();
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double read_seconds(const uint8_t* p, int64_t bytes) {
  const double start = seconds();
  parallel_for(bytes / 4096, 64, [&](int64_t begin, int64_t end) {
    const uint64_t* q = reinterpret_cast<const uint64_t*>(p + begin * 4096);
    uint64_t sum[16] = {};
    for (int64_t i = 0; i < (end - begin) * 512; i += 16)
      for (int j = 0; j < 16; ++j) sum[j] += q[i + j];
    for (const uint64_t s : sum) benchmark::DoNotOptimize(s);
  });
  return seconds() - start;
}

double best(const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); }

struct Setup {
  Setup(int bits, int64_t m, int64_t group_size, bool zeros)
      : x(size_t(m * kK)), y(size_t(m * kN)), scales(size_t(kN * ceil_div(kK, group_size))), zero_points(scales.size()) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = uniform24(philox_word(1, 0, i)) * 2 - 1;
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = 0.01f + 0.01f * uniform24(philox_word(2, 0, i));
    for (size_t i = 0; i < scales.size(); ++i) zero_points[i] = float(philox_word(3, 0, i) % (1u << bits));
    p.x = x.data();
    p.y = y.data();
    p.m = m;
    p.x_stride = kK;
    p.y_stride = kN;
    p.w.layout = row_layout(format_from_bits(bits), kK);
    p.w.n = kN;
    p.w.k = kK;
    p.w.group_size = group_size;
    p.w.codes = pool();
    p.w.scales = scales.data();
    if (zeros) {
      p.w.zero_kind = ZeroKind::kZeros;
      p.w.zeros = zero_points.data();
    }
  }
  bool matches_reference(const LinearA8Kernel& kernel) {
    linear_a8(kernel, p);
    const int64_t rows = p.m > 16 ? 2 : 16;
    std::vector<float> want(size_t(p.m * rows));
    LinearA8Params q = p;
    q.w.n = rows;
    q.y = want.data();
    q.y_stride = rows;
    reference::linear_a8(q);
    double error = 0, norm = 0;
    for (int64_t m = 0; m < p.m; ++m)
      for (int64_t n = 0; n < rows; ++n) {
        const double w = want[size_t(m * rows + n)], d = y[size_t(m * kN + n)] - w;
        error += d * d;
        norm += w * w;
      }
    return error <= 1e-11 * norm;
  }
  std::vector<float> x, y, scales, zero_points;
  LinearA8Params p;
};

void run(benchmark::State& state, const LinearA8Kernel& kernel, int bits, int64_t m, int64_t group_size, bool zeros,
         int threads) {
  Setup setup(bits, m, group_size, zeros);
  LinearA8Params& p = setup.p;
  const Bytes workspace = allocate(linear_a8_workspace_bytes(kernel, p) + 64);
  p.workspace = workspace.get();
  p.workspace_bytes = linear_a8_workspace_bytes(kernel, p);
  const int before = num_threads();
  set_num_threads(threads);
  if (!setup.matches_reference(kernel)) state.SkipWithError("differs from the reference");
  const int64_t bytes = p.w.codes_bytes(), copies = kPoolBytes / bytes;
  std::vector<double> calls, reads;
  int64_t i = 0;
  for (auto _ : state) {
    p.w.codes = pool() + (i * 7 + 3) % copies * bytes;
    const double start = seconds();
    linear_a8(kernel, p);
    calls.push_back(seconds() - start);
    state.SetIterationTime(calls.back());
    if (m <= 8 && i % 2 == 0) reads.push_back(read_seconds(pool() + (i * 11 + 5) % copies * bytes, bytes));
    ++i;
  }
  set_num_threads(before);
  if (calls.empty()) return;
  const double call = best(calls);
  state.counters["us"] = call * 1e6;
  state.counters["Gops"] = 2e-9 * double(m) * kN * kK / call;
  if (reads.empty()) return;
  state.counters["weight_GBps"] = double(bytes) / call * 1e-9;
  state.counters["of_read"] = best(reads) / call;
}

const bool registered = [] {
  const int all = num_threads();
  for (const LinearA8Kernel& kernel : linear_a8_kernels()) {
    if (kernel.isa == Isa::kScalar || kernel.isa > detected_isa()) continue;
    for (int threads = 1; threads <= all; threads += std::max(1, all - 1)) {
      for (const int64_t m : {1, 2, 4, 8, 16, 64, 512}) {
        const bool few = kernel.shape == LinearA8Kernel::Shape::kRowdot;
        if (few && m > 8) continue;
        for (const int bits : {8, 4, 3, 2, 1})
          for (const int64_t group_size : {int64_t(128), kK, int64_t(32)}) {
            if (!serves(kernel, row_layout(format_from_bits(bits), kK), group_size)) continue;
            for (const bool zeros : {false, true}) {
              if (zeros && (bits != 4 || group_size != 128)) continue;
              const std::string name = std::string(kernel.name) + "/bits:" + std::to_string(bits) + "/m:" + std::to_string(m) +
                                       "/group:" + (group_size == kK ? "row" : std::to_string(group_size)) +
                                       (zeros ? "/zeros" : "") + "/threads:" + std::to_string(threads);
              benchmark::RegisterBenchmark(
                  name.c_str(),
                  [=, &kernel](benchmark::State& state) { run(state, kernel, bits, m, group_size, zeros, threads); })
                  ->UseManualTime()
                  ->Unit(benchmark::kMicrosecond);
            }
          }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace subbyte
