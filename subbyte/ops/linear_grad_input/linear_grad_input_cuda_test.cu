#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/linear_grad_input/linear_grad_input_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kF16, DType::kF64};

void check_grad(Random& r, const testing::TestMatrix& w, int64_t m, DType dtype, int64_t pad, int64_t shift) {
  const int64_t n = w.host.n, k = w.host.k, element = dtype_bytes(dtype), gy_stride = n + pad, gx_stride = k + pad;
  const std::vector<uint8_t> gy = testing::random_floats(r, m * gy_stride, dtype);
  DeviceBuffer dgy(gy, shift * element), dgx(m * gx_stride * element, shift * element);
  LinearGradInputParams p;
  p.gy = dgy.data();
  p.dtype = dtype;
  p.m = m;
  p.gy_stride = gy_stride;
  p.w = w.device;
  p.gx = dgx.data();
  p.gx_stride = gx_stride;
  DeviceBuffer workspace(cuda::linear_grad_input_workspace_bytes(p));
  p.workspace = workspace.data();
  p.workspace_bytes = cuda::linear_grad_input_workspace_bytes(p);
  testing::TestStream stream;
  cuda::linear_grad_input(p, stream.stream());
  stream.wait();
  workspace.host();
  const std::vector<uint8_t> gx = dgx.host();
  const std::vector<float> values = w.values(), magnitudes = w.magnitudes();
  std::vector<double> sum(static_cast<size_t>(k)), weight(static_cast<size_t>(k));
  for (int64_t i = 0; i < m; ++i) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(weight.begin(), weight.end(), 0.0);
    for (int64_t row = 0; row < n; ++row) {
      const double g = load_double(gy.data(), dtype, i * gy_stride + row);
      for (int64_t j = 0; j < k; ++j) {
        sum[size_t(j)] += g * double(values[size_t(row * k + j)]);
        weight[size_t(j)] += std::fabs(g) * double(magnitudes[size_t(row * k + j)]);
      }
    }
    for (int64_t j = 0; j < k; ++j) {
      const double eps = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
      const double bound = eps * (double(min_i64(n, 512)) + double(n) / 8 + 16) * weight[size_t(j)] +
                           1.01 * dtype_epsilon(dtype) * std::fabs(sum[size_t(j)]) + (dtype == DType::kF16 ? 0x1p-25 : 0.0);
      const int64_t column = w.perm.empty() ? j : w.perm[size_t(j)];
      const double got = load_double(gx.data(), dtype, i * gx_stride + column);
      ASSERT_FALSE(std::isnan(got)) << w.name();
      ASSERT_LE(std::fabs(got - sum[size_t(j)]), bound)
          << w.name() << " M " << m << " " << dtype_name(dtype) << " at [" << i << ", " << j << "]";
    }
    for (int64_t j = k; j < gx_stride; ++j)
      ASSERT_TRUE(std::isnan(load_double(gx.data(), dtype, i * gx_stride + j))) << "wrote between rows";
  }
}

TEST(LinearGradInputCuda, KeepsTheBoundForEveryFormatSizeTypeAndNumberOfRows) {
  Random r(10);
  const int64_t ms[] = {1, 7, 2, 17, 3, 64, 8, 65};
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    check_grad(r, w, ms[i % 8], kTypes[(i / 2) % 4], i % 3 == 0 ? 3 : 0, i % 8 == 7 ? 1 : 0);
    if (HasFatalFailure()) return;
    ++i;
  }
}

TEST(LinearGradInputCuda, WithoutRowsOfTheWeightGivesZeros) {
  testing::TestStream stream;
  DeviceBuffer gx(2 * 5 * 4);
  LinearGradInputParams p;
  p.w.layout = row_layout(Format::kUint4, 5);
  p.w.k = 5;
  p.w.group_size = 32;
  p.m = 2;
  p.gx = gx.data();
  p.gx_stride = 5;
  cuda::linear_grad_input(p, stream.stream());
  stream.wait();
  EXPECT_EQ(gx.host<float>(), std::vector<float>(10, 0.0f));
  p.gx = nullptr;
  EXPECT_THROW(cuda::linear_grad_input(p, stream.stream()), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
