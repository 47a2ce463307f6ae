#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/linear_a8/linear_a8_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kF16};

// The formula of linear_a8.h in double over exact integers, and its error bound.
void check_a8(Random& r, const testing::TestMatrix& w, int64_t m, DType dtype, ActivationScale x_scale, int64_t pad, bool bias,
              int64_t nan_row) {
  const int64_t n = w.host.n, k = w.host.k, element = dtype_bytes(dtype), x_stride = k + pad, y_stride = n + pad,
                groups = w.host.groups();
  std::vector<uint8_t> x = testing::random_floats(r, m * x_stride, dtype);
  if (nan_row >= 0) store_float(x.data(), dtype, nan_row * x_stride + r.below(k), nan_row % 2 ? NAN : INFINITY);
  if (m > 2)
    for (int64_t j = 0; j < k; ++j) store_float(x.data(), dtype, 2 * x_stride + j, 0.0f);
  const std::vector<uint8_t> b = testing::random_floats(r, n, dtype);
  DeviceBuffer dx(x), db(b), dy(m * y_stride * element);
  LinearA8Params p;
  p.x = dx.data();
  p.dtype = dtype;
  p.m = m;
  p.x_stride = x_stride;
  p.x_scale = x_scale;
  p.w = w.device;
  p.bias = bias ? db.data() : nullptr;
  p.y = dy.data();
  p.y_stride = y_stride;
  p.workspace_bytes = cuda::linear_a8_workspace_bytes(p);
  DeviceBuffer workspace(p.workspace_bytes);
  p.workspace = workspace.data();
  testing::TestStream stream;
  cuda::linear_a8(p, stream.stream());
  stream.wait();
  workspace.host();
  const std::vector<uint8_t> y = dy.host();
  std::vector<int> xq(static_cast<size_t>(k)), codes(size_t(n * k));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t j = 0; j < k; ++j) codes[size_t(row * k + j)] = int(packed_code(w.host, row, j));
  std::vector<float> xs(static_cast<size_t>(groups));
  for (int64_t i = 0; i < m; ++i) {
    const auto x_at = [&](int64_t j) {
      return load_float(x.data(), dtype, i * x_stride + (w.perm.empty() ? j : w.perm[size_t(j)]));
    };
    for (int64_t g = 0; g < groups && i != nan_row; ++g) {
      const int64_t begin = g * w.host.group_size, end = min_i64(begin + w.host.group_size, k);
      const bool by_row = x_scale == ActivationScale::kRow;
      float a = 0;
      for (int64_t j = by_row ? 0 : begin; j < (by_row ? k : end); ++j) a = std::fmax(a, std::fabs(x_at(j)));
      if (a < kLinearA8SmallestX) a = 0;
      xs[size_t(g)] = a / 127.0f;
      const float inverse = a > 0 ? 127.0f / a : 0.0f;
      for (int64_t j = begin; j < end; ++j) {
        const float scaled = x_at(j) * inverse;
        xq[size_t(j)] = int(std::fmin(std::fmax(std::rint(scaled), -127.0f), 127.0f));
      }
    }
    for (int64_t row = 0; row < n; ++row) {
      const double got = load_double(y.data(), dtype, i * y_stride + row);
      if (i == nan_row) {
        ASSERT_TRUE(std::isnan(got)) << w.name();
        continue;
      }
      double sum = bias ? load_double(b.data(), dtype, row) : 0.0, weight = std::fabs(sum);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * w.host.group_size, end = min_i64(begin + w.host.group_size, k), at = row * groups + g;
        const Format f = segment_of(w.host.layout, begin).format;
        const int middle = format_levels(f) / 2;
        int64_t d = 0, e = 0;
        for (int64_t j = begin; j < end; ++j) {
          d += int64_t(xq[size_t(j)]) * (codes[size_t(row * k + j)] - middle);
          e += xq[size_t(j)];
        }
        const double s = load_float(w.host.scales, w.host.scale_dtype, at);
        const double o = affine_value(float(middle), float(s), group_zero(w.host, f, at), w.host.zero_kind);
        sum += double(xs[size_t(g)]) * (s * double(d) + o * double(e));
        weight += double(xs[size_t(g)]) * (std::fabs(s * double(d)) + std::fabs(o * double(e)));
      }
      const double bound = 0x1p-24 * (2 * double(groups) + 8) * weight + dtype_epsilon(dtype) * std::fabs(sum) +
                           (dtype == DType::kF16 ? 0x1p-25 : 0.0);
      ASSERT_FALSE(std::isnan(got)) << w.name();
      ASSERT_LE(std::fabs(got - sum), bound) << w.name() << " M " << m << " " << dtype_name(dtype) << " at [" << i << ", "
                                             << row << "]: " << got << " for " << sum;
    }
  }
}

TEST(LinearA8Cuda, KeepsTheBoundOnExactIntegersForEveryFormatSizeAndType) {
  Random r(11);
  const int64_t ms[] = {1, 7, 2, 17, 3, 64, 8, 33};
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    const int64_t m = ms[i % 8];
    check_a8(r, w, m, kTypes[(i / 2) % 3], ActivationScale(i % 2), i % 3 == 0 ? 3 : 0, i % 2 == 0,
             i % 5 == 0 && m != 3 ? m - 1 : -1);
    if (HasFatalFailure()) return;
    ++i;
  }
}

// Shapes that the matrix-unit kernel takes: whole groups in a chunk, or a scale a row.
TEST(LinearA8Cuda, KeepsTheBoundOnTheShapesOfRealModels) {
  Random r(14);
  const int64_t ns[] = {576, 192, 40, 272}, ks[] = {576, 1536, 1024, 2048}, gs[] = {64, 32, 128, 256, 1 << 20};
  const int64_t ms[] = {1, 2, 4, 8, 16, 15, 40};
  int i = 0;
  for (int f = 0; f < kFormatCount; ++f)
    for (int repeat = 0; repeat < 5; ++repeat, ++i) {
      testing::TestMatrix w(r, kFormats[f].name, ns[i % 4], ks[(i / 2) % 4], gs[(i + f) % 5],
                            i % 2 ? DType::kF16 : DType::kBF16, ZeroKind((i / 3) % 3), i % 2 ? DType::kF32 : DType::kBF16,
                            i % 6 == 5);
      const int64_t m = ms[i % 7];
      check_a8(r, w, m, kTypes[i % 3], ActivationScale(i / 2 % 2), 0, i % 2 == 1, i % 4 == 0 && m > 3 ? 3 : -1);
      if (HasFatalFailure()) return;
    }
}

TEST(LinearA8Cuda, SumsAGroupOfSeventyThousandColumnsWithoutOverflow) {
  Random r(12);
  testing::TestMatrix w(r, "uint8", 2, 140000, 140000, DType::kF32, ZeroKind::kFixed, DType::kF32, false);
  std::fill(w.codes.begin(), w.codes.end(), uint8_t(255));
  DeviceBuffer codes(w.codes);
  w.device.codes = codes.data();
  std::vector<float> ones(140000, 1.0f);
  DeviceBuffer x(ones), y(2 * 4);
  LinearA8Params p;
  p.x = x.data();
  p.m = 1;
  p.x_stride = 140000;
  p.w = w.device;
  p.y = y.data();
  p.y_stride = 2;
  p.workspace_bytes = cuda::linear_a8_workspace_bytes(p);
  DeviceBuffer workspace(p.workspace_bytes);
  p.workspace = workspace.data();
  testing::TestStream stream;
  cuda::linear_a8(p, stream.stream());
  stream.wait();
  const std::vector<float> got = y.host<float>();
  for (int n = 0; n < 2; ++n) {
    const double want = 140000.0 * 127 * double(load_float(w.scales.data(), DType::kF32, n));
    EXPECT_NEAR(got[size_t(n)], want, 1e-5 * want);
  }
}

TEST(LinearA8Cuda, RowsOfTinyValuesCountAsZero) {  // 127 / 2^-130 would be infinite, and infinity * 0 no number
  Random r(14);
  testing::TestMatrix w(r, "uint4", 8, 64, 32, DType::kF32, ZeroKind::kFixed, DType::kF32, false);
  std::vector<float> values(64, 0.0f);
  values[5] = 0x1p-130f;
  DeviceBuffer x(values), y(8 * 4);
  LinearA8Params p;
  p.x = x.data();
  p.m = 1;
  p.x_stride = 64;
  p.w = w.device;
  p.y = y.data();
  p.y_stride = 8;
  p.workspace_bytes = cuda::linear_a8_workspace_bytes(p);
  DeviceBuffer workspace(p.workspace_bytes);
  p.workspace = workspace.data();
  testing::TestStream stream;
  cuda::linear_a8(p, stream.stream());
  stream.wait();
  for (float v : y.host<float>()) EXPECT_EQ(v, 0.0f);
}

TEST(LinearA8Cuda, RefusesFloat64AndASmallWorkspace) {
  Random r(13);
  testing::TestMatrix w(r, "uint4", 8, 64, 32, DType::kF32, ZeroKind::kFixed, DType::kF32, false);
  DeviceBuffer x(64 * 8), y(8 * 8);
  LinearA8Params p;
  p.x = x.data();
  p.m = 1;
  p.x_stride = 64;
  p.w = w.device;
  p.y = y.data();
  p.y_stride = 8;
  EXPECT_THROW(cuda::linear_a8(p, Stream{}), std::invalid_argument);
  p.dtype = DType::kF64;
  EXPECT_THROW(cuda::linear_a8(p, Stream{}), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
