#include "subbyte/ops/binary_matmul/binary_matmul_cuda.h"

#include "subbyte/formats/bits.h"
#include "subbyte/formats/cuda_testing.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

TEST(BinaryMatmulCuda, GivesTheReferencesBits) {
  testing::TestStream stream;
  Random r(5);
  constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};
  const int64_t sizes[][3] = {{1, 1, 1}, {2, 4, 8}, {3, 5, 127}, {65, 64, 512}, {64, 129, 513}, {1, 300, 1000}, {5, 3, 0}};
  int i = 0;
  for (const auto& size : sizes)
    for (int bits = 0; bits < 2; ++bits)
      for (int repeat = 0; repeat < 2; ++repeat, ++i) {
        BinaryMatmulParams p;
        p.batch = 1 + i % 3;
        p.m = size[0];
        p.n = size[1];
        p.k = size[2];
        p.dtype = kTypes[i % 4];
        p.z_dtype = kTypes[i / 2 % 4];
        p.x_stride = p.k + i % 2;
        p.z_stride = p.k;
        p.y_stride = p.n + i % 2;
        p.x_batch_stride = repeat ? 0 : p.m * p.x_stride;
        p.z_batch_stride = p.n * p.z_stride;
        p.y_batch_stride = p.m * p.y_stride;
        std::vector<uint8_t> x = testing::random_floats(r, p.batch * p.m * p.x_stride, p.dtype);
        std::vector<uint8_t> z = testing::random_floats(r, p.batch * p.n * p.k, p.z_dtype);
        if (repeat && p.k > 0) store_float(x.data(), p.dtype, 0, NAN);
        std::vector<uint8_t> codes(size_t(p.n * stream_bytes(p.k, 1)));
        for (uint8_t& c : codes) c = uint8_t(r.bits());
        const std::vector<uint8_t> bias = testing::random_floats(r, p.n, p.dtype);
        const float scale = 0.3f;
        const double wide = 0.3;
        std::vector<uint8_t> scale_bytes(p.dtype == DType::kF64 ? 8 : 4);
        std::memcpy(scale_bytes.data(), p.dtype == DType::kF64 ? static_cast<const void*>(&wide) : &scale, scale_bytes.size());
        std::vector<uint8_t> want(size_t(p.batch * p.y_batch_stride * dtype_bytes(p.dtype)), 0xff);
        p.x = x.data();
        p.z = bits ? nullptr : z.data();
        p.z_bits = bits ? codes.data() : nullptr;
        p.scale = p.second_scale = scale_bytes.data();
        p.bias = bias.data();
        p.y = want.data();
        reference::binary_matmul(p);
        DeviceBuffer dx(x), dz(z), dcodes(codes), dscale(scale_bytes), dbias(bias), dy(int64_t(want.size()));
        p.x = dx.data();
        p.z = bits ? nullptr : dz.data();
        p.z_bits = bits ? dcodes.data() : nullptr;
        p.scale = p.second_scale = dscale.data();
        p.bias = dbias.data();
        p.y = dy.data();
        p.workspace_bytes = cuda::binary_matmul_workspace_bytes(p);
        DeviceBuffer workspace(p.workspace_bytes);
        p.workspace = workspace.data();
        cuda::binary_matmul(p, stream.stream());
        stream.wait();
        workspace.host();  // checks the guards
        // The bit pattern of a NaN is not promised; where the reference has one, the device has one.
        const std::vector<uint8_t> got = dy.host();
        for (int64_t e = 0; e < p.batch * p.y_batch_stride; ++e) {
          const double a = load_double(want.data(), p.dtype, e), b = load_double(got.data(), p.dtype, e);
          ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << p.m << "x" << p.n << "x" << p.k << " element " << e;
        }
      }
}

}  // namespace
}  // namespace subbyte
