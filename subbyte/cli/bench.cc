// subbyte bench: what this machine could do (memory, arithmetic), then what the ops do, as shares of that. Weights are cold:
// each call takes another copy from a ring larger than the caches. A result is compared with the reference before it is timed.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/cli/commands.h"
#include "subbyte/cli/peaks.h"
#include "subbyte/formats/packed_matrix.h"
#include "subbyte/io/tensor_data.h"
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/linear/kernels.h"
#include "subbyte/ops/linear/linear.h"
#include "subbyte/ops/linear_a8/kernels.h"
#include "subbyte/ops/linear_a8/linear_a8.h"

namespace subbyte::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Options {
  int threads = 0;
  std::string shape = "4096x4096";
  std::vector<int64_t> m = {1, 8, 64};
  std::vector<std::string> formats = {"sign", "ternary", "uint2", "uint4", "uint8"};
  int64_t group_size = 128;
  double seconds = 0.2;
  bool json = false;
};

struct Limits {
  double read_bytes = 0, fma_flops = 0, dot_ops = 0;  // a second, all threads; 0: not measured here
};

// Best of a few runs: others' work on the machine only ever slows a run down.
template <class F>
double best_seconds(double budget, F&& f) {
  double best = 1e30;
  const auto start = Clock::now();
  do {
    const auto t = Clock::now();
    f();
    best = std::min(best, seconds_since(t));
  } while (seconds_since(start) < budget);
  return best;
}

double peak(void (*rounds)(int64_t, float*) noexcept, int64_t ops_a_round, double budget) {
  constexpr int64_t kRounds = 200000;
  const int threads = num_threads();
  std::vector<float> sinks(size_t(threads) * 16);  // one cache line each
  const double t = best_seconds(budget, [&] {
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rounds(kRounds, &sinks[size_t(i) * 16]);
    });
  });
  return double(kRounds) * double(ops_a_round) * threads / t;
}

int64_t last_level_cache_bytes() {
  const long l3 = ::sysconf(_SC_LEVEL3_CACHE_SIZE);
  return l3 > 0 ? l3 : 32 << 20;
}

Limits measure_limits(double budget) {
  Limits out;
  // Four times the last cache, at most 1 GiB; every page is written, since untouched pages are one shared page of zeros.
  const int64_t words = std::min<int64_t>(std::max<int64_t>(4 * last_level_cache_bytes(), 128 << 20), int64_t(1) << 30) / 8;
  std::vector<uint64_t> memory(size_t(words), 1);
  // The better of two readers: what the hardware prefetches by itself, and with the lines ahead asked for, as kernels do. On
  // some processors the first reaches half of the second.
  for (const int64_t lines_ahead : {int64_t(0), int64_t(32)}) {
    std::atomic<uint64_t> sum{0};
    const double t = best_seconds(budget, [&] {
      parallel_for(words / 8, 1 << 13, [&](int64_t begin, int64_t end) {
        uint64_t part[8] = {};
        for (int64_t line = begin; line < end; ++line) {
          const uint64_t* p = memory.data() + line * 8;
          if (lines_ahead != 0) __builtin_prefetch(p + std::min(lines_ahead, words / 8 - 1 - line) * 8);
          for (int i = 0; i < 8; ++i) part[i] += p[i];
        }
        for (const uint64_t v : part) sum += v;
      });
    });
    out.read_bytes = std::max(out.read_bytes, double(words / 8 * 64) / t);
  }
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::kAvx512) out.fma_flops = peak(fma_rounds_avx512, kFmaFlopsAvx512, budget);
  else if (isa >= Isa::kAvx2) out.fma_flops = peak(fma_rounds_avx2, kFmaFlopsAvx2, budget);
  if (isa >= Isa::kAvx512Vnni) out.dot_ops = peak(dot_rounds_avx512_vnni, kDotOpsAvx512Vnni, budget);
  else if (isa >= Isa::kAvx2) out.dot_ops = peak(dot_rounds_avx2, kDotOpsAvx2, budget);
#endif
  return out;
}

// Copies of one packed matrix with random codes and scales near 1 / sqrt(K).
struct Ring {
  Ring(Format f, int64_t n, int64_t k, int64_t group_size, int64_t bytes_wanted) {
    PackedSpec s;
    s.layout = row_layout(f, k);
    s.n = n;
    s.k = k;
    s.group_size = group_size;
    const int64_t one = std::max<int64_t>(1, s.codes_bytes() + s.scales_bytes());
    const int64_t count = std::min<int64_t>(std::max<int64_t>(2, ceil_div(bytes_wanted, one)), 256);
    for (int64_t i = 0; i < count; ++i) {
      PackedTensor t;
      t.spec = s;
      uint8_t *codes = nullptr, *scales = nullptr;
      t.codes = SharedBytes::allocate(s.codes_bytes(), &codes);
      t.scales = SharedBytes::allocate(s.scales_bytes(), &scales);
      if (i > 0) {
        std::memcpy(codes, copies[0].codes.data(), size_t(s.codes_bytes()));
        std::memcpy(scales, copies[0].scales.data(), size_t(s.scales_bytes()));
      } else {
        std::memset(codes, 0, size_t(s.codes_bytes()));
        for (int64_t r = 0; r < n; ++r)
          for (int64_t c = 0; c < k; ++c)
            set_code(codes + r * s.layout.row_bytes, c, format_bits(f),
                     philox_word(1, 0, uint64_t(r * k + c)) % uint32_t(format_levels(f)));
        for (int64_t g = 0; g < n * s.groups(); ++g)
          store_float(scales, DType::kF16, g, (1.0f + uniform24(philox_word(2, 0, uint64_t(g)))) / std::sqrt(float(k)));
      }
      copies.push_back(std::move(t));
    }
    bytes = one;
  }
  std::vector<PackedTensor> copies;
  int64_t bytes = 0;
};

PackedMatrix rows_of(PackedMatrix w, int64_t begin, int64_t count) {
  const int64_t g = begin * w.groups();
  w.codes += begin * w.layout.row_bytes;
  w.scales = static_cast<const uint8_t*>(w.scales) + g * dtype_bytes(w.scale_dtype);
  w.n = count;
  return w;
}

struct Result {
  std::string op, format, kernel;
  int64_t m = 0;
  double seconds = 0, bytes = 0, ops = 0, memory_share = 0, arithmetic_share = 0;
};

// Checks rows of the weight at the start, the middle and the end; throws when a value is outside the op's written bound.
constexpr int64_t kCheckedRows = 4;

template <class CheckRow>
void check_rows(int64_t n, CheckRow&& check) {
  const int64_t count = std::min(n, kCheckedRows);
  for (const int64_t begin : {int64_t(0), (n - count) / 2, n - count}) check(begin, count);
}

void demand(bool ok, const char* op, const char* format, int64_t m, int64_t n, double got, double expected, double bound) {
  if (!ok)
    throw std::runtime_error(fmt::format("{} {}: y[{}, {}] is {}, the reference says {} +- {}; nothing was timed", op, format,
                                         m, n, got, expected, bound));
}

// sum_k |x| (|s (q - c)| + |o|), c the middle code.
double magnitude(const PackedMatrix& w, Format f, const float* x, int64_t row, bool a8_rounding) {
  const float c = float(format_levels(f) / 2), z = format_fixed_zero(f);
  double sum = 0, largest = 0;
  if (a8_rounding)
    for (int64_t k = 0; k < w.k; ++k) largest = std::max(largest, double(std::fabs(x[k])));
  for (int64_t k = 0; k < w.k; ++k) {
    const float s = load_float(w.scales, w.scale_dtype, row * w.groups() + k / w.group_size);
    const double o = double(s) * double(c - z);
    sum += (std::fabs(double(x[k])) + largest / 254) *
           (std::fabs(double(s) * (double(packed_code(w, row, k)) - c)) + std::fabs(o));
  }
  return sum;
}

class Bench {
 public:
  Bench(const Options& o, int64_t n, int64_t k) : o_(o), n_(n), k_(k) {}

  void run() {
    limits_ = measure_limits(o_.seconds);
    int64_t largest_m = 1;
    for (const int64_t m : o_.m) largest_m = std::max(largest_m, m);
    x_.resize(size_t(largest_m * k_));
    for (size_t i = 0; i < x_.size(); ++i) x_[i] = 2 * uniform24(philox_word(3, 0, i)) - 1;
    y_.resize(size_t(largest_m * n_));
    for (const std::string& name : o_.formats) {
      const Format f = format_from_name(name);
      const Ring ring(f, n_, k_, o_.group_size, 3 * last_level_cache_bytes());
      dequantize_case(f, ring);
      for (const int64_t m : o_.m) linear_case(f, ring, m);
      for (const int64_t m : o_.m) linear_a8_case(f, ring, m);
    }
  }

  void print() const {
    const CpuInfo cpu = cpu_info();
    fmt::print("{}, {} threads, {}\n", cpu.brand, num_threads(), isa_name(active_isa()));
    fmt::print("limits: read {:.1f} GB/s", limits_.read_bytes / 1e9);
    if (limits_.fma_flops > 0) fmt::print(", float32 multiply-add {:.0f} Gflop/s", limits_.fma_flops / 1e9);
    if (limits_.dot_ops > 0) fmt::print(", int8 dot product {:.0f} Gop/s", limits_.dot_ops / 1e9);
    fmt::print("\nweights [{}, {}], groups of {}, cold; share of the limit: memory, arithmetic\n\n", n_, k_, o_.group_size);
    fmt::print("{:<11} {:<8} {:>5} {:>10} {:>8} {:>9} {:>7} {:>7}  {}\n", "op", "format", "M", "us", "GB/s", "Gop/s", "mem",
               "arith", "kernel");
    for (const Result& r : results_)
      fmt::print("{:<11} {:<8} {:>5} {:>10.1f} {:>8.1f} {:>9.1f} {:>6.1f}% {:>6.1f}%  {}\n", r.op, r.format,
                 r.op == "dequantize" ? "" : std::to_string(r.m), r.seconds * 1e6, r.bytes / r.seconds / 1e9,
                 r.ops / r.seconds / 1e9, r.memory_share * 100, r.arithmetic_share * 100, r.kernel);
  }

  Json json() const {
    Json rows = Json::array();
    for (const Result& r : results_)
      rows.push_back({{"op", r.op},
                      {"format", r.format},
                      {"m", r.m},
                      {"n", n_},
                      {"k", k_},
                      {"seconds", r.seconds},
                      {"kernel", r.kernel},
                      {"bytes", r.bytes},
                      {"ops", r.ops},
                      {"memory_share", r.memory_share},
                      {"arithmetic_share", r.arithmetic_share}});
    return {{"cpu", cpu_info().brand},
            {"threads", num_threads()},
            {"isa", isa_name(active_isa())},
            {"group_size", o_.group_size},
            {"limits",
             {{"read_bytes_per_second", limits_.read_bytes}, {"fma_flops", limits_.fma_flops}, {"int8_ops", limits_.dot_ops}}},
            {"results", rows}};
  }

 private:
  void add(const char* op, Format f, int64_t m, std::string kernel, double seconds, double bytes, double ops, double peak_ops) {
    results_.push_back({op, format_name(f), std::move(kernel), m, seconds, bytes, ops, bytes / seconds / limits_.read_bytes,
                        peak_ops > 0 ? ops / seconds / peak_ops : 0.0});
  }

  template <class F>
  double time_cold(const Ring& ring, F&& f) {
    size_t next = 0;
    return best_seconds(o_.seconds, [&] {
      f(ring.copies[next].view());
      next = (next + 1) % ring.copies.size();
    });
  }

  void dequantize_case(Format f, const Ring& ring) {
    std::vector<float> out(size_t(n_ * k_), NAN);
    DequantizeParams p;
    p.out = out.data();
    p.out_stride = k_;
    p.w = ring.copies[0].view();
    dequantize(p);
    check_rows(n_, [&](int64_t begin, int64_t count) {
      for (int64_t n = begin; n < begin + count; ++n)
        for (int64_t k = 0; k < k_; ++k) {
          const float expected = packed_value(p.w, n, k);
          demand(std::memcmp(&out[size_t(n * k_ + k)], &expected, 4) == 0, "dequantize", format_name(f), n, k,
                 out[size_t(n * k_ + k)], expected, 0);
        }
    });
    const double t = time_cold(ring, [&](const PackedMatrix& w) {
      p.w = w;
      dequantize(p);
    });
    add("dequantize", f, 0, "", t, double(ring.bytes) + double(n_ * k_) * 4, 0, 0);
  }

  void linear_case(Format f, const Ring& ring, int64_t m) {
    LinearParams p;
    p.x = x_.data();
    p.m = m;
    p.x_stride = k_;
    p.y = y_.data();
    p.y_stride = n_;
    p.w = ring.copies[0].view();
    use_workspace(p, linear_workspace_bytes(p));
    std::fill(y_.begin(), y_.end(), NAN);
    linear(p);
    check_rows(n_, [&](int64_t begin, int64_t count) {
      std::vector<float> expected(size_t(m * count));
      LinearParams r = p;
      r.w = rows_of(p.w, begin, count);
      r.y = expected.data();
      r.y_stride = count;
      reference::linear_rows(r, 0, count);
      for (int64_t i = 0; i < m; i += std::max<int64_t>(1, m / 4))
        for (int64_t n = 0; n < count; ++n) {
          const double want = expected[size_t(i * count + n)], got = y_[size_t(i * n_ + begin + n)];
          const double bound =
              0x1p-24 * ((double(k_) / 8 + 16) * magnitude(p.w, f, x_.data() + i * k_, begin + n, false) + 2 * std::fabs(want));
          demand(std::fabs(got - want) <= bound, "linear", format_name(f), i, begin + n, got, want, bound);
        }
    });
    const double t = time_cold(ring, [&](const PackedMatrix& w) {
      p.w = w;
      linear(p);
    });
    add("linear", f, m, select_linear_kernel(m, f, o_.group_size, k_, DType::kF32, active_isa()).name, t,
        double(ring.bytes) + double(m * (n_ + k_)) * 4, 2.0 * double(m) * double(n_) * double(k_), limits_.fma_flops);
  }

  void linear_a8_case(Format f, const Ring& ring, int64_t m) {
    LinearA8Params p;
    p.x = x_.data();
    p.m = m;
    p.x_stride = k_;
    p.y = y_.data();
    p.y_stride = n_;
    p.w = ring.copies[0].view();
    use_workspace(p, linear_a8_workspace_bytes(p));
    std::fill(y_.begin(), y_.end(), NAN);
    linear_a8(p);
    check_rows(n_, [&](int64_t begin, int64_t count) {
      std::vector<float> expected(size_t(m * count));
      LinearA8Params r = p;
      r.w = rows_of(p.w, begin, count);
      r.y = expected.data();
      r.y_stride = count;
      reference::linear_a8(r);
      const double steps = 2.0 * double(p.w.groups()) + 8;
      for (int64_t i = 0; i < m; i += std::max<int64_t>(1, m / 4))
        for (int64_t n = 0; n < count; ++n) {
          const double want = expected[size_t(i * count + n)], got = y_[size_t(i * n_ + begin + n)];
          const double bound = 0x1p-24 * (steps * magnitude(p.w, f, x_.data() + i * k_, begin + n, true) + 2 * std::fabs(want));
          demand(std::fabs(got - want) <= bound, "linear_a8", format_name(f), i, begin + n, got, want, bound);
        }
    });
    const double t = time_cold(ring, [&](const PackedMatrix& w) {
      p.w = w;
      linear_a8(p);
    });
    add("linear_a8", f, m, select_linear_a8_kernel(m, p.w.layout, o_.group_size, active_isa()).name, t,
        double(ring.bytes) + double(m * (n_ + k_)) * 4, 2.0 * double(m) * double(n_) * double(k_), limits_.dot_ops);
  }

  template <class Params>
  void use_workspace(Params& p, int64_t bytes) {
    uint8_t* workspace = nullptr;
    workspace_ = SharedBytes::allocate(bytes, &workspace);
    p.workspace = workspace;
    p.workspace_bytes = bytes;
  }

  const Options& o_;
  int64_t n_, k_;
  Limits limits_;
  std::vector<float> x_, y_;
  SharedBytes workspace_;
  std::vector<Result> results_;
};

void run(const Options& o) {
  int64_t n = 0, k = 0;
  const size_t cross = o.shape.find('x');
  auto number = [&](std::string_view text, int64_t* v) {
    const auto r = std::from_chars(text.data(), text.data() + text.size(), *v);
    return r.ec == std::errc() && r.ptr == text.data() + text.size() && *v > 0 && *v <= (1 << 20);
  };
  if (cross == std::string::npos || !number(std::string_view(o.shape).substr(0, cross), &n) ||
      !number(std::string_view(o.shape).substr(cross + 1), &k))
    throw UsageError("shape '" + o.shape + "' is not NxK, each from 1 to 1048576");
  try {
    for (const std::string& f : o.formats) format_from_name(f);
  } catch (const std::invalid_argument& e) {
    throw UsageError(e.what());
  }
  if (o.threads > 0) set_num_threads(o.threads);
  Bench bench(o, n, k);
  bench.run();
  if (o.json) fmt::print("{}\n", bench.json().dump(2));
  else bench.print();
}

}  // namespace

void add_bench(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("bench", "Measure this machine's limits, then the ops, as shares of them");
  c->add_option("--threads,-t", o->threads, "Threads (default: SUBBYTE_NUM_THREADS, else all)")->check(CLI::Range(1, 4096));
  c->add_option("--shape", o->shape, "Weight as NxK: output x input features")->capture_default_str();
  c->add_option("--m", o->m, "Rows of x, comma-separated")->delimiter(',')->check(CLI::Range(1, 65536))->capture_default_str();
  c->add_option("--formats", o->formats, "Formats, comma-separated")->delimiter(',')->capture_default_str();
  c->add_option("--group-size,-g", o->group_size, "Columns that share a scale")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  c->add_option("--seconds", o->seconds, "Time for each measurement")->check(CLI::Range(0.001, 60.0))->capture_default_str();
  c->add_flag("--json", o->json, "Machine-readable output");
  c->callback([o] { run(*o); });
}

}  // namespace subbyte::cli
