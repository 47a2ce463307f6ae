#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/linear/linear_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kF16, DType::kF64};

// Runs the op on the device and holds every element to the bound of linear.h.
void check_linear(Random& r, const testing::TestMatrix& w, int64_t m, DType dtype, int64_t pad, int64_t shift, bool bias) {
  const int64_t n = w.host.n, k = w.host.k, element = dtype_bytes(dtype), x_stride = k + pad, y_stride = n + pad;
  const std::vector<uint8_t> x = testing::random_floats(r, m * x_stride, dtype), b = testing::random_floats(r, n, dtype);
  DeviceBuffer dx(x, shift * element), db(b), dy(m * y_stride * element, shift * element);
  LinearParams p;
  p.x = dx.data();
  p.dtype = dtype;
  p.m = m;
  p.x_stride = x_stride;
  p.w = w.device;
  p.bias = bias ? db.data() : nullptr;
  p.y = dy.data();
  p.y_stride = y_stride;
  DeviceBuffer workspace(cuda::linear_workspace_bytes(p));
  p.workspace = workspace.data();
  p.workspace_bytes = cuda::linear_workspace_bytes(p);
  testing::TestStream stream;
  cuda::linear(p, stream.stream());
  stream.wait();
  workspace.host();
  const std::vector<uint8_t> y = dy.host();
  const std::vector<float> values = w.values(), magnitudes = w.magnitudes();
  std::vector<double> xs(static_cast<size_t>(k));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j)
      xs[size_t(j)] = load_double(x.data(), dtype, i * x_stride + (w.perm.empty() ? j : w.perm[size_t(j)]));
    for (int64_t row = 0; row < n; ++row) {
      double sum = bias ? load_double(b.data(), dtype, row) : 0.0, weight = std::fabs(sum);
      const float *value = &values[size_t(row * k)], *magnitude = &magnitudes[size_t(row * k)];
      for (int64_t j = 0; j < k; ++j) {
        sum += xs[size_t(j)] * double(value[j]);
        weight += std::fabs(xs[size_t(j)]) * double(magnitude[j]);
      }
      const double eps = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
      const double bound = eps * (double(min_i64(k, 512)) + double(k) / 8 + 16) * weight +
                           1.01 * dtype_epsilon(dtype) * std::fabs(sum) +
                           (dtype == DType::kF16 ? 0x1p-25 : 0.0);  // half of float16's smallest step
      const double got = load_double(y.data(), dtype, i * y_stride + row);
      ASSERT_LE(std::fabs(got - sum), bound) << w.name() << " M " << m << " " << dtype_name(dtype) << " at [" << i << ", "
                                             << row << "]: " << got << " for " << sum;
      ASSERT_FALSE(std::isnan(got)) << w.name();
    }
    for (int64_t j = n; j < y_stride; ++j)
      ASSERT_TRUE(std::isnan(load_double(y.data(), dtype, i * y_stride + j))) << "wrote between rows";
  }
}

TEST(LinearCuda, KeepsTheBoundForEveryFormatSizeTypeAndNumberOfRows) {
  Random r(6);
  const int64_t ms[] = {1, 7, 2, 17, 3, 64, 8, 16, 5, 9};
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    check_linear(r, w, ms[i % 10], kTypes[(i / 2) % 4], i % 3 == 0 ? 3 : 0, i % 8 == 7 ? 1 : 0, i % 2 == 0);
    if (HasFatalFailure()) return;
    ++i;
  }
}

// Shapes that the matrix-unit kernels take: whole groups, aligned rows, 16-bit x.
TEST(LinearCuda, KeepsTheBoundOnTheShapesOfRealModels) {
  Random r(7);
  const int64_t ns[] = {576, 192, 1536, 40, 272}, ks[] = {576, 1536, 1024, 4096, 2048}, gs[] = {64, 32, 128, 256, 1 << 20};
  const int64_t ms[] = {1, 2, 4, 8, 16, 15, 3};
  int i = 0;
  for (int f = 0; f < kFormatCount; ++f)
    for (int repeat = 0; repeat < 5; ++repeat, ++i) {
      const int64_t m = ms[i % 7];
      testing::TestMatrix w(r, kFormats[f].name, ns[i % 5], ks[(i / 2) % 5], gs[(i + f) % 5],
                            i % 2 ? DType::kF16 : DType::kBF16, ZeroKind((i / 3) % 3), i % 2 ? DType::kF32 : DType::kBF16,
                            i % 6 == 5);
      check_linear(r, w, m, i % 3 == 0 ? DType::kF16 : DType::kBF16, 0, 0, i % 2 == 1);
      if (HasFatalFailure()) return;
    }
  for (int f = 0; f < kFormatCount; ++f) {
    testing::TestMatrix w(r, kFormats[f].name, 192, 512, 128, DType::kBF16, ZeroKind(f % 3), DType::kBF16, f == 4);
    check_linear(r, w, 333, f % 2 ? DType::kF16 : DType::kBF16, 0, 0, true);
    if (HasFatalFailure()) return;
  }
}

TEST(LinearCuda, WithoutColumnsGivesTheBiasAndWithoutRowsNothing) {
  testing::TestStream stream;
  const std::vector<float> bias = {1, 2, 3};
  DeviceBuffer db(bias), dy(2 * 3 * 4);
  LinearParams p;
  p.w.layout = row_layout(Format::kUint4, 0);
  p.w.n = 3;
  p.w.group_size = 32;
  p.m = 2;
  p.y = dy.data();
  p.y_stride = 3;
  p.bias = db.data();
  cuda::linear(p, stream.stream());
  stream.wait();
  EXPECT_EQ(dy.host<float>(), (std::vector<float>{1, 2, 3, 1, 2, 3}));
  p.m = 0;
  p.y = nullptr;
  EXPECT_NO_THROW(cuda::linear(p, stream.stream()));
  p.m = 2;
  EXPECT_THROW(cuda::linear(p, stream.stream()), std::invalid_argument);
}

TEST(LinearCuda, APermEntryOutsideTheMatrixMakesTheOutputNan) {
  Random r(8);
  testing::TestStream stream;
  for (int64_t m : {1, 20}) {
    testing::TestMatrix w(r, "uint4", 64, 256, 64, DType::kBF16, ZeroKind::kFixed, DType::kF32, true);
    std::vector<int32_t> perm = w.perm;
    perm[100] = 1 << 30;
    DeviceBuffer bad(perm), x(testing::random_floats(r, m * 256, DType::kBF16)), y(m * 64 * 2);
    LinearParams p;
    p.x = x.data();
    p.dtype = DType::kBF16;
    p.m = m;
    p.x_stride = 256;
    p.w = w.device;
    p.w.perm = reinterpret_cast<const int32_t*>(bad.data());
    p.y = y.data();
    p.y_stride = 64;
    DeviceBuffer workspace(cuda::linear_workspace_bytes(p));
    p.workspace = workspace.data();
    p.workspace_bytes = cuda::linear_workspace_bytes(p);
    cuda::linear(p, stream.stream());
    stream.wait();
    for (uint16_t v : y.host<uint16_t>()) ASSERT_TRUE(std::isnan(bf16_to_float(v)));
  }
}

TEST(LinearCuda, MayBeCapturedInAGraphAndReplayedToTheSameBits) {
  Random r(9);
  testing::TestStream stream;
  testing::TestMatrix w(r, "uint4", 192, 512, 128, DType::kBF16, ZeroKind::kZeros, DType::kBF16, true);
  DeviceBuffer x(testing::random_floats(r, 4 * 512, DType::kBF16)), y(4 * 192 * 2);
  LinearParams p;
  p.x = x.data();
  p.dtype = DType::kBF16;
  p.m = 4;
  p.x_stride = 512;
  p.w = w.device;
  p.y = y.data();
  p.y_stride = 192;
  DeviceBuffer workspace(cuda::linear_workspace_bytes(p));
  p.workspace = workspace.data();
  p.workspace_bytes = cuda::linear_workspace_bytes(p);
  cuda::linear(p, stream.stream());
  stream.wait();
  const std::vector<uint8_t> want = y.host();
  cudaGraph_t graph;
  cudaGraphExec_t run;
  testing::require(cudaStreamBeginCapture(stream.raw(), cudaStreamCaptureModeGlobal));
  cuda::linear(p, stream.stream());
  testing::require(cudaStreamEndCapture(stream.raw(), &graph));
  testing::require(cudaGraphInstantiate(&run, graph, 0));
  testing::require(cudaMemset(p.y, 0xff, 4 * 192 * 2));
  testing::require(cudaDeviceSynchronize());
  testing::require(cudaGraphLaunch(run, stream.raw()));
  stream.wait();
  EXPECT_EQ(y.host(), want);
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
}

}  // namespace
}  // namespace subbyte
