#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/quantize/quantize_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

struct Outputs {
  std::vector<uint8_t> codes, scales, zeros;
};

// Runs quantize, then encode with stochastic rounding on the chosen grid, on both sides.
void compare(Random& r, const testing::MatrixCase& c, Scheme scheme, ZeroKind kind, int i) {
  QuantizeParams p;
  p.out.layout = row_layout(c.format, c.k);
  p.out.n = c.n;
  p.out.k = c.k;
  p.out.group_size = c.group_size;
  p.out.scale_dtype = c.scale_dtype;
  p.out.zero_dtype = c.zero_dtype;
  p.out.zero_kind = kind;
  p.scheme = scheme;
  p.w_dtype = kTypes[i % 4];
  p.w_stride = c.k + (i % 3 == 0 ? 2 : 0);
  p.seed = 77 + uint64_t(i);
  p.offset = 5;
  p.first_row = uint64_t(i % 3) * 1000003;
  std::vector<uint8_t> w = testing::random_floats(r, c.n * p.w_stride, p.w_dtype);
  for (int64_t k = 0; k < min_i64(c.k, c.group_size); ++k) store_float(w.data(), p.w_dtype, k, k % 2 ? 0.0f : -0.0f);
  std::vector<int32_t> perm(size_t(c.k));
  for (int64_t k = 0; k < c.k; ++k) perm[size_t(k)] = int32_t(c.k - 1 - k);
  const int64_t groups = p.out.groups();
  Outputs want;
  want.codes.assign(size_t(c.n * p.out.layout.row_bytes), 0);
  want.scales.assign(size_t(c.n * groups * dtype_bytes(c.scale_dtype)), 0);
  want.zeros.assign(kind == ZeroKind::kFixed ? 0 : size_t(c.n * groups * dtype_bytes(c.zero_dtype)), 0);
  DeviceBuffer dw(w, c.shift * dtype_bytes(p.w_dtype)), dcodes(int64_t(want.codes.size()), c.shift),
      dscales(int64_t(want.scales.size())), dzeros(int64_t(want.zeros.size())), dperm(perm);
  QuantizeParams d = p;
  p.w = w.data();
  p.codes = want.codes.data();
  p.scales = want.scales.data();
  p.zeros = kind == ZeroKind::kFixed ? nullptr : want.zeros.data();
  d.w = dw.data();
  d.codes = dcodes.data();
  d.scales = dscales.data();
  d.zeros = kind == ZeroKind::kFixed ? nullptr : dzeros.data();
  if (c.permuted) {
    p.out.perm = perm.data();
    d.out.perm = reinterpret_cast<const int32_t*>(dperm.data());
  }
  // encode reads through out; quantize through codes, scales, zeros
  for (QuantizeParams* q : {&p, &d}) {
    q->out.codes = q->codes;
    q->out.scales = q->scales;
    q->out.zeros = q->zeros;
  }
  testing::TestStream stream;
  const std::string what = c.format + " [" + std::to_string(c.n) + ", " + std::to_string(c.k) + "] group_size " +
                           std::to_string(c.group_size) + " from " + dtype_name(p.w_dtype) + " scheme " +
                           std::to_string(int(scheme)) + " kind " + std::to_string(int(kind));
  quantize(p);
  cuda::quantize(d, stream.stream());
  stream.wait();
  ASSERT_EQ(dscales.host(), want.scales) << what;
  ASSERT_EQ(dzeros.host(), want.zeros) << what;
  ASSERT_EQ(dcodes.host(), want.codes) << what;
  p.rounding = d.rounding = Rounding::kStochastic;
  encode(p);
  cuda::encode(d, stream.stream());
  stream.wait();
  ASSERT_EQ(dcodes.host(), want.codes) << what << " stochastic";
}

TEST(QuantizeCuda, ChoosesAndEncodesTheReferencesBitsUnderEverySchemeAndKind) {
  Random r(5);
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    switch (i % 6) {
      case 0: compare(r, c, Scheme::kMinMax, ZeroKind::kZeros, i); break;
      case 1: compare(r, c, Scheme::kMinMax, ZeroKind::kOffsets, i); break;
      case 2: compare(r, c, Scheme::kAbsMax, ZeroKind::kFixed, i); break;
      case 3: compare(r, c, Scheme::kMidRise, ZeroKind::kZeros, i); break;
      case 4: compare(r, c, Scheme::kFanIn, ZeroKind::kZeros, i); break;
      default: compare(r, c, Scheme::kAbsMean, ZeroKind::kFixed, i); break;
    }
    if (HasFatalFailure()) return;
    ++i;
  }
}

TEST(QuantizeCuda, AGroupWithAnInfinityGetsScaleNanAndCodesInsideTheFormat) {
  testing::TestStream stream;
  std::vector<float> w(40, 0.5f);
  w[20] = INFINITY;
  DeviceBuffer dw(w), codes(20), scales(3 * 4);
  QuantizeParams p;
  p.out.layout = row_layout(Format::kUint4, 40);
  p.out.n = 1;
  p.out.k = 40;
  p.out.group_size = 16;
  p.scheme = Scheme::kAbsMax;
  p.w = dw.data();
  p.w_stride = 40;
  p.codes = codes.data();
  p.scales = scales.data();
  cuda::quantize(p, stream.stream());
  stream.expect_report("quantize: w[0, 20] is inf, expected finite values");
  const std::vector<float> got = scales.host<float>();
  EXPECT_TRUE(std::isfinite(got[0]) && std::isnan(got[1]) && std::isfinite(got[2]));
  codes.host();
}

}  // namespace
}  // namespace subbyte
