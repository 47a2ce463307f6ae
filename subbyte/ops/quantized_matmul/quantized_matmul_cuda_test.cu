// The device gives the bits of the CPU reference.
#include <cstring>

#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/quantized_matmul/quantized_matmul_cuda.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

struct Case {
  int64_t batch, m, n, k;
  int bits = 4;
  DType dtype = DType::kF32, z_dtype = DType::kF32;
  bool shared_x = false, shared_z = false, packed_z = false, bias = false;
  int64_t pad = 0;
  float x_step = 0.11f, z_step = 0.07f;
};

void check(Random& r, const Case& c, bool nan = false) {
  SCOPED_TRACE(::testing::Message() << c.batch << " x " << c.m << " x " << c.n << " x " << c.k << " bits " << c.bits << " "
                                    << dtype_name(c.dtype) << (c.packed_z ? " packed" : ""));
  const int64_t stride = c.k + c.pad, y_stride = c.n + c.pad, code_bytes = stream_bytes(c.k, c.bits);
  std::vector<uint8_t> x = testing::random_floats(r, (c.shared_x ? 1 : c.batch) * c.m * stride, c.dtype);
  std::vector<uint8_t> z = testing::random_floats(r, (c.shared_z ? 1 : c.batch) * c.n * stride, c.z_dtype);
  if (nan) store_float(x.data(), c.dtype, 0, NAN);
  std::vector<uint8_t> codes(size_t(c.n * code_bytes));
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t k = 0; k < c.k; ++k) set_code(codes.data() + n * code_bytes, k, c.bits, uint32_t(r.below(1 << c.bits)));
  const std::vector<uint8_t> bias = testing::random_floats(r, c.n, c.dtype);
  const std::vector<float> steps{c.x_step, c.z_step};
  const int64_t count = c.batch * c.m * y_stride;
  DeviceBuffer dx(x), dz(z), dc(codes, 1), db(bias), ds(steps), dy(count * dtype_bytes(c.dtype));
  QuantizedMatmulParams p;
  p.dtype = c.dtype;
  p.z_dtype = c.z_dtype;
  p.batch = c.batch;
  p.m = c.m;
  p.n = c.n;
  p.k = c.k;
  p.x_stride = p.z_stride = stride;
  p.x_batch_stride = c.shared_x ? 0 : c.m * stride;
  p.z_batch_stride = c.shared_z ? 0 : c.n * stride;
  p.y_stride = y_stride;
  p.y_batch_stride = c.m * y_stride;
  p.bits = c.bits;
  QuantizedMatmulParams d = p;
  p.x = x.data();
  d.x = dx.data();
  if (c.packed_z) p.z_codes = codes.data(), d.z_codes = dc.data();
  else p.z = z.data(), d.z = dz.data();
  if (c.bias) p.bias = bias.data(), d.bias = db.data();
  p.x_step = steps.data();
  p.z_step = steps.data() + 1;
  d.x_step = reinterpret_cast<const float*>(ds.data());
  d.z_step = d.x_step + 1;
  d.y = dy.data();
  d.workspace_bytes = cuda::quantized_matmul_workspace_bytes(d);
  DeviceBuffer workspace(d.workspace_bytes);
  d.workspace = workspace.data();
  testing::TestStream stream;
  cuda::quantized_matmul(d, stream.stream());
  stream.wait();
  workspace.host();
  const std::vector<uint8_t> got = dy.host();
  std::vector<uint8_t> want(size_t(count * dtype_bytes(c.dtype)), 0xff);
  p.y = want.data();
  reference::quantized_matmul(p);
  for (int64_t i = 0; i < count; ++i) {
    const double a = load_double(got.data(), c.dtype, i), b = load_double(want.data(), c.dtype, i);
    ASSERT_TRUE((std::isnan(a) && std::isnan(b)) || a == b) << "element " << i << ": " << a << ", expected " << b;
  }
}

TEST(QuantizedMatmulCuda, GivesTheReferencesBits) {
  Random r(1);
  for (int bits = 2; bits <= 8; ++bits)
    for (const auto& [m, n, k] : {std::tuple<int, int, int>{1, 1, 1},
                                  {3, 65, 63},
                                  {64, 64, 64},
                                  {65, 7, 65},
                                  {130, 70, 200},
                                  {2, 5, 0},
                                  {0, 3, 4},
                                  {17, 33, 1000}})
      for (const bool packed : {false, true}) {
        Case c{2, m, n, k, bits};
        c.packed_z = c.shared_z = packed;
        c.bias = k > 64;
        c.pad = k % 2 * 3;
        check(r, c);
      }
}

TEST(QuantizedMatmulCuda, TakesEveryTypeSharedOperandsAndManyBatches) {
  Random r(2);
  for (const DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    check(r, {3, 20, 30, 100, 4, t, t, true});
    check(r, {3, 20, 30, 100, 4, t, t, false, true});
    check(r, {2, 20, 30, 100, 8, t, DType::kF32, false, true, false, true});
  }
  check(r, {70000, 1, 2, 3});
}

TEST(QuantizedMatmulCuda, NanMarksItsRowAndAStepThatIsNoNumberMarksAll) {
  Random r(3);
  check(r, {1, 5, 9, 33}, true);
  const std::vector<float> values(64, 1.0f), steps{NAN, 1.0f};
  DeviceBuffer dx(values), ds(steps), dy(64 * 4);
  QuantizedMatmulParams d;
  d.x = d.z = dx.data();
  d.y = dy.data();
  d.m = d.n = d.k = d.x_stride = d.z_stride = d.y_stride = 8;
  d.x_step = reinterpret_cast<const float*>(ds.data());
  d.z_step = d.x_step + 1;
  d.workspace_bytes = cuda::quantized_matmul_workspace_bytes(d);
  DeviceBuffer workspace(d.workspace_bytes);
  d.workspace = workspace.data();
  testing::TestStream stream;
  cuda::quantized_matmul(d, stream.stream());
  stream.expect_report("quantized_matmul: x_step is nan, expected a finite number");
  for (const float v : dy.host<float>()) EXPECT_TRUE(std::isnan(v));
}

}  // namespace
}  // namespace subbyte
