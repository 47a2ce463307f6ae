#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/pack/pack_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

TEST(PackCuda, PacksAndUnpacksTheReferencesBitsAtEverySizeAndAlignment) {
  testing::TestStream stream;
  Random r(1);
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    const RowLayout layout = row_layout(c.format, c.k);
    const int64_t stride = c.k + (c.shift != 0 ? 3 : 0);
    std::vector<uint8_t> codes(size_t(c.n * stride)), packed(size_t(c.n * layout.row_bytes));
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t k = 0; k < c.k; ++k)
        codes[size_t(n * stride + k)] = uint8_t(r.below(format_levels(segment_of(layout, k).format)));
    PackParams p;
    p.layout = layout;
    p.n = c.n;
    p.k = c.k;
    p.unpacked = codes.data();
    p.unpacked_stride = stride;
    p.packed = packed.data();
    pack(p);
    DeviceBuffer device_codes(codes, c.shift), device_packed(int64_t(packed.size()), c.shift);
    PackParams d = p;
    d.unpacked = device_codes.data();
    d.packed = device_packed.data();
    cuda::pack(d, stream.stream());
    stream.wait();
    ASSERT_EQ(device_packed.host(), packed) << c.format << " [" << c.n << ", " << c.k << "]";
    DeviceBuffer back(int64_t(codes.size()), c.shift);
    UnpackParams u;
    u.layout = layout;
    u.n = c.n;
    u.k = c.k;
    u.packed = device_packed.data();
    u.unpacked = back.data();
    u.unpacked_stride = stride;
    cuda::unpack(u, stream.stream());
    stream.wait();
    std::vector<uint8_t> got = back.host();
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t k = c.k; k < stride; ++k) {
        ASSERT_EQ(got[size_t(n * stride + k)], 0xff) << "wrote between rows";
        got[size_t(n * stride + k)] = codes[size_t(n * stride + k)];
      }
    ASSERT_EQ(got, codes) << c.format << " [" << c.n << ", " << c.k << "]";
  }
}

TEST(PackCuda, ACodeOutsideItsFormatLeavesItsNeighboursAlone) {
  testing::TestStream stream;
  const std::vector<uint8_t> codes = {255, 0, 1, 255, 2, 3, 0, 0, 255, 1};
  const std::vector<uint8_t> kept = {7, 0, 1, 7, 2, 3, 0, 0, 7, 1};
  const RowLayout layout = row_layout(Format::kUint3, 10);
  DeviceBuffer from(codes), packed(layout.row_bytes), to(10);
  PackParams p;
  p.layout = layout;
  p.n = 1;
  p.k = p.unpacked_stride = 10;
  p.unpacked = from.data();
  p.packed = packed.data();
  cuda::pack(p, stream.stream());
  UnpackParams u;
  u.layout = layout;
  u.n = 1;
  u.k = u.unpacked_stride = 10;
  u.packed = packed.data();
  u.unpacked = to.data();
  cuda::unpack(u, stream.stream());
  stream.expect_report("pack: code 255 at [0, ");
  EXPECT_EQ(to.host(), kept);
}

TEST(PackCuda, RefusesWhatTheCpuEntryRefuses) {
  PackParams p;
  p.layout = row_layout(Format::kUint4, 8);
  p.n = 1;
  p.k = 9;
  EXPECT_THROW(cuda::pack(p, Stream{}), std::invalid_argument);
  p.k = 8;
  EXPECT_THROW(cuda::pack(p, Stream{}), std::invalid_argument);  // null pointers
  p.n = 0;
  EXPECT_NO_THROW(cuda::pack(p, Stream{}));
}

__global__ void empty_kernel() {}

TEST(CudaLaunch, ARefusedLaunchBecomesADeviceErrorWithTheRuntimesText) {
  empty_kernel<<<1, 4096>>>();
  try {
    cuda::check_launch("some_op");
    FAIL() << "no error";
  } catch (const DeviceError& e) {
    EXPECT_NE(std::string(e.what()).find("some_op: CUDA error"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("): invalid "), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(cuda::check_launch("some_op"));
}

}  // namespace
}  // namespace subbyte
