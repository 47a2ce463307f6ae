#include "subbyte/ops/linear/linear.h"

#include <gtest/gtest.h>

#include <set>

#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/linear/float_test_matrix.h"
#include "subbyte/ops/linear/kernels.h"

namespace subbyte {
namespace {

using testing_matrix::GuardedBytes;
using testing_matrix::MatrixSpec;
using testing_matrix::present_isas;
using testing_matrix::strided_bytes;
using testing_matrix::TestMatrix;

struct Problem {
  MatrixSpec matrix;
  int64_t m = 0;
  DType dtype = DType::kF32;
  int64_t x_pad = 0, y_pad = 0;
  bool bias = false;
};

std::set<std::string> kernels_hit;

// Operands of one problem in guarded memory.
struct Operands {
  Operands(const Problem& problem, uint32_t seed)
      : matrix(problem.matrix, seed),
        x(strided_bytes(problem.dtype, problem.m, problem.matrix.k, problem.matrix.k + problem.x_pad)),
        y(strided_bytes(problem.dtype, problem.m, problem.matrix.n, problem.matrix.n + problem.y_pad)),
        bias(problem.bias ? problem.matrix.n * dtype_bytes(problem.dtype) : 0) {
    p.x = x.data();
    p.dtype = problem.dtype;
    p.m = problem.m;
    p.x_stride = problem.matrix.k + problem.x_pad;
    p.w = matrix.w;
    p.y = y.data();
    p.y_stride = problem.matrix.n + problem.y_pad;
    for (int64_t m = 0; m < problem.m; ++m)
      for (int64_t k = 0; k < problem.matrix.k; ++k) store_float(x.data(), problem.dtype, m * p.x_stride + k, matrix.centred());
    for (int64_t n = 0; n < problem.matrix.n && problem.bias; ++n)
      store_float(bias.data(), problem.dtype, n, 4.0f * matrix.centred());
    if (problem.bias) p.bias = bias.data();
    workspace = std::make_unique<GuardedBytes>(linear_workspace_bytes(p));
    p.workspace = workspace->data();
    p.workspace_bytes = workspace->size();
  }
  TestMatrix matrix;
  GuardedBytes x, y, bias;
  std::unique_ptr<GuardedBytes> workspace;
  LinearParams p;
};

// Runs the op and holds every element to the bound of linear.h; elements between rows must keep their NaN.
void check(const Problem& problem, uint32_t seed) {
  SCOPED_TRACE(detail::concat(problem.matrix.text(), " M=", problem.m, " x ", dtype_name(problem.dtype),
                              problem.bias ? " bias" : "", " isa ", isa_name(active_isa()), " seed ", seed));
  Operands o(problem, seed);
  for (int s = 0; s < o.p.w.layout.segment_count; ++s) {
    const Segment& segment = o.p.w.layout.segments[s];
    kernels_hit.insert(
        select_linear_kernel(problem.m, segment.format, problem.matrix.group_size, segment.k_count, problem.dtype, active_isa())
            .name);
  }
  linear(o.p);
  ASSERT_TRUE(o.x.intact() && o.y.intact() && o.bias.intact() && o.workspace->intact() && o.matrix.intact());
  const int64_t n_count = problem.matrix.n, k_count = problem.matrix.k;
  const double c = double(std::min<int64_t>(k_count, 512)) + double(k_count) / 8 + 16;
  const double eps = problem.dtype == DType::kF64 ? 0x1p-53 : 0x1p-24, eps_x = dtype_epsilon(problem.dtype);
  std::vector<double> x(static_cast<size_t>(k_count));
  for (int64_t m = 0; m < problem.m; ++m) {
    for (int64_t k = 0; k < k_count; ++k)
      x[size_t(k)] = load_double(o.p.x, problem.dtype, m * o.p.x_stride + (o.p.w.perm != nullptr ? o.p.w.perm[k] : k));
    for (int64_t n = 0; n < n_count; ++n) {
      double sum = 0, magnitude = 0;
      const double* value = o.matrix.values.data() + n * k_count;
      const double* size = o.matrix.magnitudes.data() + n * k_count;
      for (int64_t k = 0; k < k_count; ++k) {
        sum += x[size_t(k)] * value[k];
        magnitude += std::abs(x[size_t(k)]) * size[k];
      }
      const double bias = problem.bias ? load_double(o.p.bias, problem.dtype, n) : 0.0;
      sum += bias;
      if (problem.dtype == DType::kF64) magnitude += std::abs(bias);  // the reference adds it first
      const double got = load_double(o.p.y, problem.dtype, m * o.p.y_stride + n);
      const double bound = eps * c * magnitude + 1.01 * eps_x * std::abs(sum) + (problem.dtype == DType::kF16 ? 0x1p-25 : 0);
      ASSERT_LE(std::abs(got - sum), bound) << "m=" << m << " n=" << n << " got " << got << " expected " << sum;
    }
    for (int64_t n = n_count; n < o.p.y_stride && m + 1 < problem.m; ++n)
      ASSERT_TRUE(std::isnan(load_double(o.p.y, problem.dtype, m * o.p.y_stride + n))) << "wrote between rows, m=" << m;
  }
}

// Cycles through the settings that need no full cross, differently for every case.
Problem vary(Problem problem, uint32_t i) {
  constexpr DType kScales[] = {DType::kF32, DType::kF16, DType::kBF16};
  constexpr DType kInputs[] = {DType::kF32, DType::kBF16, DType::kF32, DType::kF16, DType::kF32, DType::kF64, DType::kF32};
  const int64_t sizes[] = {16, 32, 64, 100, 128, std::max<int64_t>(1, problem.matrix.k), 8, 7, problem.matrix.k + 9, 1};
  problem.matrix.group_size = sizes[i % 10];
  problem.matrix.zero_kind = ZeroKind(i / 10 % 3);
  problem.matrix.scale_dtype = kScales[i / 3 % 3];
  problem.matrix.zero_dtype = kScales[i / 5 % 3];
  problem.matrix.perm = i % 11 == 3;
  problem.dtype = kInputs[i % 7];
  problem.x_pad = i % 2 * 3;
  problem.y_pad = i / 2 % 2 * 5;
  problem.bias = i % 3 != 0;
  return problem;
}

TEST(Linear, KeepsItsBoundForEveryFormatAtSmallSizes) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    uint32_t i = 0;
    for (const FormatInfo& format : kFormats)
      for (const int64_t m : {1, 2, 3, 7, 8, 17})
        for (const int64_t n : {1, 5, 33, 64})
          for (const int64_t k : {1, 5, 64, 127, 200}) {
            ++i;
            if (isa == Isa::kScalar && i % 7 != 0) continue;
            check(vary(Problem{{format.name, n, k}, m}, i * 7919u % 9973u), i);
            if (testing::Test::HasFatalFailure()) return;
          }
  }
}

TEST(Linear, KeepsItsBoundForEveryFormatGroupSizeAndZeroKind) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    uint32_t i = 0;
    for (const FormatInfo& format : kFormats)
      for (const int64_t group_size : {16, 32, 64, 100, 128, 600, 3})
        for (const ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
          for (const int64_t m : {1, 2, 4, 9}) {
            ++i;
            if (isa == Isa::kScalar && i % 13 != 0) continue;
            Problem problem = vary(Problem{{format.name, 37, 600}, m}, i);
            problem.matrix.group_size = group_size;
            problem.matrix.zero_kind = kind;
            problem.dtype = DType::kF32;
            check(problem, i);
            if (testing::Test::HasFatalFailure()) return;
          }
  }
}

TEST(Linear, KeepsItsBoundAtLargeSizes) {
  struct Size {
    int64_t m, n, k;
  };
  constexpr Size kSizes[] = {{1, 4097, 576}, {333, 127, 300}, {64, 33, 1536}, {17, 34, 4097}, {8, 5, 4097},
                             {3, 1536, 64},  {7, 127, 1537},  {1, 576, 1536}, {333, 5, 1536}, {2, 4097, 127},
                             {1, 64, 4097},  {64, 576, 65},   {4, 33, 9000},  {900, 37, 300}};
  for (const Isa isa : present_isas()) {
    if (isa == Isa::kScalar) continue;
    ScopedIsa forced(isa);
    uint32_t i = 0;
    for (const Size& size : kSizes)
      for (const FormatInfo& format : kFormats) {
        ++i;
        Problem problem = vary(Problem{{format.name, size.n, size.k}, size.m}, i * 31u);
        if (problem.dtype == DType::kF64) problem.dtype = DType::kF32;
        check(problem, i);
        if (testing::Test::HasFatalFailure()) return;
      }
  }
}

TEST(Linear, KeepsItsBoundForMixedWidthRowsWithPermutedColumns) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    uint32_t i = 0;
    for (const char* layout : {"uint8*64+uint4*128+sign*70", "uint6*64+uint5*64+uint3*64+uint2*70", "uint7*192+ternary*70"})
      for (const int64_t group_size : {16, 32, 64})
        for (const ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
          for (const int64_t m : {1, 6, 19}) {
            Problem problem = vary(Problem{{layout, 21, 262}, m}, ++i);
            problem.matrix.group_size = group_size;
            problem.matrix.zero_kind = kind;
            problem.matrix.perm = i % 2 == 0;
            check(problem, i);
            if (testing::Test::HasFatalFailure()) return;
          }
  }
}

// Exact sums: small integers for x, powers of two for scales. A symmetric matrix must come out without any rounding.
TEST(Linear, SymmetricMatricesWithIntegerXAreExact) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    for (const FormatInfo& format : kFormats)
      for (const int64_t m : {1, 3, 20}) {
        Operands o(Problem{{format.name, 19, 300, 64}, m}, 5);
        float* scales = const_cast<float*>(static_cast<const float*>(o.p.w.scales));
        for (int64_t i = 0; i < 19 * o.p.w.groups(); ++i) scales[i] = 0.25f;
        float* x = reinterpret_cast<float*>(o.x.data());
        for (int64_t i = 0; i < m * 300; ++i) x[i] = float(int(i * 7 % 15) - 7);
        linear(o.p);
        for (int64_t r = 0; r < m; ++r)
          for (int64_t n = 0; n < 19; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < 300; ++k) sum += double(x[r * 300 + k]) * double(packed_value(o.p.w, n, k));
            ASSERT_EQ(double(reinterpret_cast<const float*>(o.y.data())[r * 19 + n]), sum)
                << format.name << " m=" << r << " n=" << n << " isa " << isa_name(isa);
          }
      }
  }
}

TEST(Linear, ResultDoesNotDependOnTheNumberOfThreads) {
  const int before = num_threads();
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    for (const char* layout : {"uint4", "sign", "uint5"})
      for (const int64_t m : {1, 4, 40, 150}) {
        if (isa == Isa::kScalar && (m > 1 || layout[0] == 's')) continue;
        const int64_t n = m == 150 ? 70 : 1031;  // few strips: rows are shared out as well
        Problem problem{{layout, n, 200, 32, ZeroKind::kZeros}, m, DType::kBF16, 0, 0, true};
        std::vector<std::vector<uint8_t>> results;
        for (const int threads : {1, 2, 3}) {
          set_num_threads(threads);
          Operands o(problem, 11);
          linear(o.p);
          results.emplace_back(o.y.data(), o.y.data() + o.y.size());
        }
        EXPECT_EQ(results[0], results[1]) << layout << " M=" << m << " isa " << isa_name(isa);
        EXPECT_EQ(results[0], results[2]) << layout << " M=" << m << " isa " << isa_name(isa);
      }
  }
  set_num_threads(before);
}

TEST(Linear, EmptySizesGiveTheBiasOrNothing) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    check(Problem{{"uint4", 7, 0, 32}, 3, DType::kF32, 0, 0, true}, 1);    // y = bias
    check(Problem{{"uint4", 7, 0, 32}, 3, DType::kBF16, 0, 2, false}, 2);  // y = 0
    check(Problem{{"uint3", 0, 40, 32}, 3}, 3);
    check(Problem{{"uint3", 9, 40, 32}, 0}, 4);
  }
}

TEST(Linear, EveryKernelOfThisMachineWasHeldToItsBound) {
  if (kernels_hit.empty()) GTEST_SKIP() << "runs after the other tests of Linear";
  int skipped = 0;
  for (const LinearKernel& kernel : linear_kernels()) {
    if (kernel.isa > detected_isa()) {
      ++skipped;
      continue;
    }
    EXPECT_TRUE(kernels_hit.count(kernel.name)) << kernel.name;
  }
  RecordProperty("kernels_skipped_for_lack_of_isa", skipped);
  if (skipped > 0) std::cout << "[  NOTE    ] " << skipped << " kernels of linear need an instruction set this machine lacks\n";
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "no error";
}

TEST(Linear, RefusesInconsistentArgumentsByName) {
  Operands o(Problem{{"uint4", 8, 64, 32, ZeroKind::kFixed, DType::kF32, DType::kF32, true}, 2}, 3);
  LinearParams p = o.p;
  p.x_stride = 63;
  EXPECT_EQ(error_of([&] { linear(p); }), "linear: row stride of x 63 is below K = 64");
  p = o.p;
  p.y_stride = 7;
  EXPECT_EQ(error_of([&] { linear(p); }), "linear: row stride of y 7 is below N = 8");
  p = o.p;
  p.m = -1;
  EXPECT_EQ(error_of([&] { linear(p); }), "linear: x has -1 rows, expected at least 0");
  p = o.p;
  p.x = nullptr;
  EXPECT_EQ(error_of([&] { linear(p); }), "linear: x or y are missing");
  const_cast<int32_t*>(o.p.w.perm)[5] = 64;
  EXPECT_EQ(error_of([&] { linear(o.p); }), "linear: perm[5] is 64, expected 0 <= perm < K = 64");
  if (detected_isa() == Isa::kScalar) return;
  Operands q(Problem{{"uint4", 8, 64, 32}, 2}, 3);
  const std::string bytes = std::to_string(q.p.workspace_bytes);
  q.p.workspace_bytes -= 1;
  EXPECT_EQ(error_of([&] { linear(q.p); }), "linear: the workspace has " + std::to_string(q.p.workspace_bytes) +
                                                " bytes, expected linear_workspace_bytes() = " + bytes);
}

TEST(LinearTable, EndsWithTheReferenceAndSelectsWithinTheInstructionSet) {
  const auto table = linear_kernels();
  ASSERT_FALSE(table.empty());
  EXPECT_STREQ(table.back().name, "linear_reference");
  EXPECT_EQ(table.back().isa, Isa::kScalar);
  std::set<std::string> names;
  for (const LinearKernel& kernel : table) EXPECT_TRUE(names.insert(kernel.name).second) << kernel.name;
  for (int isa = 0; isa < kIsaCount; ++isa)
    for (int f = 0; f < kFormatCount; ++f)
      for (const int64_t m : {1, 2, 6, 7, 100})
        for (const int64_t group_size : {1, 8, 100, 128}) {
          const LinearKernel& kernel = select_linear_kernel(m, Format(f), group_size, 4096, DType::kF32, Isa(isa));
          EXPECT_LE(kernel.isa, Isa(isa));
          EXPECT_LE(m, kernel.max_m);
          EXPECT_TRUE(linear_kernel_serves(kernel, Format(f), group_size, 4096, DType::kF32));
          EXPECT_EQ(kernel.form == LinearForm::kReference, isa == 0) << kernel.name;
        }
}

#if defined(__x86_64__)
TEST(LinearTable, FewRowsStreamCodesManyRowsUseTilesAndFloat64TheReference) {
  const auto name = [](int64_t m, Format f, int64_t group_size, DType t, Isa isa) {
    return std::string(select_linear_kernel(m, f, group_size, 4096, t, isa).name);
  };
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kAvx2), "linear_f32_rows_avx2");
  EXPECT_EQ(name(1, Format::kUint4, 4, DType::kF32, Isa::kAvx2), "linear_f32_tile6x16_avx2");  // group ends in a lane
  EXPECT_EQ(name(1, Format::kUint4, 5000, DType::kF32, Isa::kAvx2), "linear_f32_rows_avx2");   // one group
  EXPECT_EQ(name(512, Format::kUint4, 128, DType::kBF16, Isa::kAvx2), "linear_f32_tile6x16_avx2");
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kAvx512), "linear_f32_rows_avx512");
  EXPECT_EQ(name(512, Format::kUint4, 128, DType::kF16, Isa::kAvx512Vnni), "linear_f32_tile14x32_avx512");
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF64, Isa::kAvx2), "linear_reference");
  EXPECT_EQ(name(4, Format::kUint8, 128, DType::kF32, Isa::kAvx2), "linear_f32_rows_avx2");
  EXPECT_EQ(name(4, Format::kSign, 128, DType::kF32, Isa::kAvx2), "linear_f32_tile6x16_avx2");  // narrow codes: two rows
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kScalar), "linear_reference");
}
#endif

}  // namespace
}  // namespace subbyte
