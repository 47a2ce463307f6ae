#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

#include <gtest/gtest.h>

#include <set>

#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/linear/float_test_matrix.h"
#include "subbyte/ops/linear_grad_input/kernels.h"

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
  int64_t gy_pad = 0, gx_pad = 0;
};

std::set<std::string> kernels_hit;

// Operands of one problem in guarded memory.
struct Operands {
  Operands(const Problem& problem, uint32_t seed)
      : matrix(problem.matrix, seed),
        gy(strided_bytes(problem.dtype, problem.m, problem.matrix.n, problem.matrix.n + problem.gy_pad)),
        gx(strided_bytes(problem.dtype, problem.m, problem.matrix.k, problem.matrix.k + problem.gx_pad)) {
    p.gy = gy.data();
    p.dtype = problem.dtype;
    p.m = problem.m;
    p.gy_stride = problem.matrix.n + problem.gy_pad;
    p.w = matrix.w;
    p.gx = gx.data();
    p.gx_stride = problem.matrix.k + problem.gx_pad;
    for (int64_t m = 0; m < problem.m; ++m)
      for (int64_t n = 0; n < problem.matrix.n; ++n)
        store_float(gy.data(), problem.dtype, m * p.gy_stride + n, matrix.centred());
    workspace = std::make_unique<GuardedBytes>(linear_grad_input_workspace_bytes(p));
    p.workspace = workspace->data();
    p.workspace_bytes = workspace->size();
  }
  TestMatrix matrix;
  GuardedBytes gy, gx;
  std::unique_ptr<GuardedBytes> workspace;
  LinearGradInputParams p;
};

// Runs the op and holds every element to the bound of linear_grad_input.h; elements between rows must keep their NaN.
void check(const Problem& problem, uint32_t seed) {
  SCOPED_TRACE(detail::concat(problem.matrix.text(), " M=", problem.m, " gy ", dtype_name(problem.dtype), " isa ",
                              isa_name(active_isa()), " seed ", seed));
  Operands o(problem, seed);
  for (int s = 0; s < o.p.w.layout.segment_count; ++s) {
    const Segment& segment = o.p.w.layout.segments[s];
    kernels_hit.insert(select_linear_grad_input_kernel(problem.m, segment.format, problem.matrix.group_size, segment.k_count,
                                                       problem.dtype, active_isa())
                           .name);
  }
  linear_grad_input(o.p);
  ASSERT_TRUE(o.gy.intact() && o.gx.intact() && o.workspace->intact() && o.matrix.intact());
  const int64_t n_count = problem.matrix.n, k_count = problem.matrix.k;
  const double c = double(std::min<int64_t>(n_count, 512)) + double(n_count) / 8 + 16;
  const double eps = problem.dtype == DType::kF64 ? 0x1p-53 : 0x1p-24, eps_x = dtype_epsilon(problem.dtype);
  std::vector<double> sum(static_cast<size_t>(k_count)), magnitude(static_cast<size_t>(k_count));
  for (int64_t m = 0; m < problem.m; ++m) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(magnitude.begin(), magnitude.end(), 0.0);
    for (int64_t n = 0; n < n_count; ++n) {
      const double gy = load_double(o.p.gy, problem.dtype, m * o.p.gy_stride + n);
      const double* value = o.matrix.values.data() + n * k_count;
      const double* size = o.matrix.magnitudes.data() + n * k_count;
      for (int64_t k = 0; k < k_count; ++k) {
        sum[size_t(k)] += gy * value[k];
        magnitude[size_t(k)] += std::abs(gy) * size[k];
      }
    }
    for (int64_t k = 0; k < k_count; ++k) {
      const int64_t column = o.p.w.perm != nullptr ? o.p.w.perm[k] : k;
      const double got = load_double(o.p.gx, problem.dtype, m * o.p.gx_stride + column), want = sum[size_t(k)];
      const double bound =
          eps * c * magnitude[size_t(k)] + 1.01 * eps_x * std::abs(want) + (problem.dtype == DType::kF16 ? 0x1p-25 : 0);
      ASSERT_LE(std::abs(got - want), bound) << "m=" << m << " stored column " << k << " got " << got << " expected " << want;
    }
    for (int64_t k = k_count; k < o.p.gx_stride && m + 1 < problem.m; ++k)
      ASSERT_TRUE(std::isnan(load_double(o.p.gx, problem.dtype, m * o.p.gx_stride + k))) << "wrote between rows, m=" << m;
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
  problem.gy_pad = i % 2 * 3;
  problem.gx_pad = i / 2 % 2 * 5;
  return problem;
}

TEST(LinearGradInput, KeepsItsBoundForEveryFormatAtSmallSizes) {
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

TEST(LinearGradInput, KeepsItsBoundForEveryFormatGroupSizeAndZeroKind) {
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

TEST(LinearGradInput, KeepsItsBoundAtLargeSizes) {
  struct Size {
    int64_t m, n, k;
  };
  constexpr Size kSizes[] = {{1, 576, 4097}, {333, 300, 127}, {64, 1536, 33}, {17, 4097, 34}, {8, 4097, 5},
                             {3, 64, 1536},  {7, 1537, 127},  {1, 1536, 576}, {333, 5, 1536}, {2, 127, 4097},
                             {1, 4097, 64},  {64, 65, 576},   {4, 33, 9000},  {900, 300, 37}};
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

TEST(LinearGradInput, KeepsItsBoundForMixedWidthRowsWithPermutedColumns) {
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
TEST(LinearGradInput, SymmetricMatricesWithIntegerGradientsAreExact) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    for (const FormatInfo& format : kFormats)
      for (const int64_t m : {1, 3, 20}) {
        Operands o(Problem{{format.name, 300, 190, 64}, m}, 5);
        float* scales = const_cast<float*>(static_cast<const float*>(o.p.w.scales));
        for (int64_t i = 0; i < 300 * o.p.w.groups(); ++i) scales[i] = 0.25f;
        float* gy = reinterpret_cast<float*>(o.gy.data());
        for (int64_t i = 0; i < m * 300; ++i) gy[i] = float(int(i * 7 % 15) - 7);
        linear_grad_input(o.p);
        for (int64_t r = 0; r < m; ++r)
          for (int64_t k = 0; k < 190; ++k) {
            double sum = 0;
            for (int64_t n = 0; n < 300; ++n) sum += double(gy[r * 300 + n]) * double(packed_value(o.p.w, n, k));
            ASSERT_EQ(double(reinterpret_cast<const float*>(o.gx.data())[r * 190 + k]), sum)
                << format.name << " m=" << r << " k=" << k << " isa " << isa_name(isa);
          }
      }
  }
}

TEST(LinearGradInput, ResultDoesNotDependOnTheNumberOfThreads) {
  const int before = num_threads();
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    for (const char* layout : {"uint4", "sign", "uint5"})
      for (const int64_t m : {1, 4, 40, 150}) {
        if (isa == Isa::kScalar && (m > 1 || layout[0] == 's')) continue;
        const int64_t n = m == 150 ? 70 : 1031;  // few strips: rows are shared out as well
        Problem problem{{layout, n, 200, 32, ZeroKind::kZeros}, m, DType::kBF16};
        std::vector<std::vector<uint8_t>> results;
        for (const int threads : {1, 2, 3}) {
          set_num_threads(threads);
          Operands o(problem, 11);
          linear_grad_input(o.p);
          results.emplace_back(o.gx.data(), o.gx.data() + o.gx.size());
        }
        EXPECT_EQ(results[0], results[1]) << layout << " M=" << m << " isa " << isa_name(isa);
        EXPECT_EQ(results[0], results[2]) << layout << " M=" << m << " isa " << isa_name(isa);
      }
  }
  set_num_threads(before);
}

TEST(LinearGradInput, EmptySizesGiveZerosOrNothing) {
  for (const Isa isa : present_isas()) {
    ScopedIsa forced(isa);
    check(Problem{{"uint4", 7, 0, 32}, 3}, 1);
    check(Problem{{"uint4", 0, 70, 32}, 3, DType::kBF16, 0, 2}, 2);  // gx = 0
    check(Problem{{"uint3", 9, 40, 32}, 0}, 3);
  }
}

TEST(LinearGradInput, EveryKernelOfThisMachineWasHeldToItsBound) {
  if (kernels_hit.empty()) GTEST_SKIP() << "runs after the other tests of LinearGradInput";
  int skipped = 0;
  for (const GradInputKernel& kernel : linear_grad_input_kernels()) {
    if (kernel.isa > detected_isa()) {
      ++skipped;
      continue;
    }
    EXPECT_TRUE(kernels_hit.count(kernel.name)) << kernel.name;
  }
  RecordProperty("kernels_skipped_for_lack_of_isa", skipped);
  if (skipped > 0)
    std::cout << "[  NOTE    ] " << skipped << " kernels of linear_grad_input need an instruction set this machine lacks\n";
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

TEST(LinearGradInput, RefusesInconsistentArgumentsByName) {
  Operands o(Problem{{"uint4", 8, 64, 32, ZeroKind::kFixed, DType::kF32, DType::kF32, true}, 2}, 3);
  LinearGradInputParams p = o.p;
  p.gy_stride = 7;
  EXPECT_EQ(error_of([&] { linear_grad_input(p); }), "linear_grad_input: row stride of gy 7 is below N = 8");
  p = o.p;
  p.gx_stride = 63;
  EXPECT_EQ(error_of([&] { linear_grad_input(p); }), "linear_grad_input: row stride of gx 63 is below K = 64");
  p = o.p;
  p.gx = nullptr;
  EXPECT_EQ(error_of([&] { linear_grad_input(p); }), "linear_grad_input: gy or gx are missing");
  const_cast<int32_t*>(o.p.w.perm)[5] = -1;
  EXPECT_EQ(error_of([&] { linear_grad_input(o.p); }), "linear_grad_input: perm[5] is -1, expected 0 <= perm < K = 64");
  if (detected_isa() == Isa::kScalar) return;
  Operands q(Problem{{"uint4", 8, 64, 32}, 2}, 3);
  const std::string bytes = std::to_string(q.p.workspace_bytes);
  q.p.workspace_bytes -= 1;
  EXPECT_EQ(error_of([&] { linear_grad_input(q.p); }), "linear_grad_input: the workspace has " +
                                                           std::to_string(q.p.workspace_bytes) +
                                                           " bytes, expected linear_grad_input_workspace_bytes() = " + bytes);
}

TEST(LinearGradInputTable, EndsWithTheReferenceAndSelectsWithinTheInstructionSet) {
  const auto table = linear_grad_input_kernels();
  ASSERT_FALSE(table.empty());
  EXPECT_STREQ(table.back().name, "linear_grad_input_reference");
  EXPECT_EQ(table.back().isa, Isa::kScalar);
  std::set<std::string> names;
  for (const GradInputKernel& kernel : table) EXPECT_TRUE(names.insert(kernel.name).second) << kernel.name;
  for (int isa = 0; isa < kIsaCount; ++isa)
    for (int f = 0; f < kFormatCount; ++f)
      for (const int64_t m : {1, 2, 6, 7, 100})
        for (const int64_t group_size : {1, 8, 100, 128}) {
          const GradInputKernel& kernel =
              select_linear_grad_input_kernel(m, Format(f), group_size, 4096, DType::kF32, Isa(isa));
          EXPECT_LE(kernel.isa, Isa(isa));
          EXPECT_LE(m, kernel.max_m);
          EXPECT_TRUE(linear_grad_input_kernel_serves(kernel, Format(f), group_size, 4096, DType::kF32));
          EXPECT_EQ(kernel.form == GradInputForm::kReference, isa == 0) << kernel.name;
        }
}

#if defined(__x86_64__)
TEST(LinearGradInputTable, FewRowsStreamCodesManyRowsUseTilesAndFloat64TheReference) {
  const auto name = [](int64_t m, Format f, int64_t group_size, DType t, Isa isa) {
    return std::string(select_linear_grad_input_kernel(m, f, group_size, 4096, t, isa).name);
  };
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kAvx2), "linear_grad_input_f32_rows_avx2");
  EXPECT_EQ(name(1, Format::kUint4, 4, DType::kF32, Isa::kAvx2),
            "linear_grad_input_f32_tile6x16_avx2");                                                      // group ends in a lane
  EXPECT_EQ(name(1, Format::kUint4, 5000, DType::kF32, Isa::kAvx2), "linear_grad_input_f32_rows_avx2");  // one group
  EXPECT_EQ(name(512, Format::kUint4, 128, DType::kBF16, Isa::kAvx2), "linear_grad_input_f32_tile6x16_avx2");
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kAvx512), "linear_grad_input_f32_rows_avx512");
  EXPECT_EQ(name(512, Format::kUint4, 128, DType::kF16, Isa::kAvx512Vnni), "linear_grad_input_f32_tile14x32_avx512");
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF64, Isa::kAvx2), "linear_grad_input_reference");
  EXPECT_EQ(name(1, Format::kUint4, 128, DType::kF32, Isa::kScalar), "linear_grad_input_reference");
}
#endif

}  // namespace
}  // namespace subbyte
