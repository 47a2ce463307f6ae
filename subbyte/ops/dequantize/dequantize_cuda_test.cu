#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/dequantize/dequantize_cuda.h"
#include "subbyte/ops/embedding/embedding_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kF16, DType::kF64};

TEST(DequantizeCuda, GivesTheReferencesBitsForEveryFormatSizeAndType) {
  testing::TestStream stream;
  Random r(2);
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(false)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    for (int t = 0; t < (c.k > 1000 ? 1 : 4); ++t) {
      DequantizeParams p;
      p.w = w.host;
      p.out_dtype = kTypes[(i + t) % 4];
      p.out_stride = c.k + (i % 3 == 2 ? 5 : 0);
      const int64_t element = dtype_bytes(p.out_dtype);
      std::vector<uint8_t> want(size_t(c.n * p.out_stride * element), 0xff);
      p.out = want.data();
      reference::dequantize_rows(p, 0, c.n);
      DeviceBuffer out(int64_t(want.size()), i % 7 == 6 ? element : 0);
      p.w = w.device;
      p.out = out.data();
      cuda::dequantize(p, stream.stream());
      stream.wait();
      ASSERT_EQ(out.host(), want) << w.name() << " to " << dtype_name(p.out_dtype);
    }
    ++i;
  }
}

TEST(DequantizeCuda, APermEntryOutsideTheMatrixWritesNothing) {
  testing::TestStream stream;
  Random r(3);
  testing::TestMatrix w(r, "uint4", 3, 40, 16, DType::kF32, ZeroKind::kFixed, DType::kF32, true);
  std::vector<int32_t> perm = w.perm;
  perm[7] = 40;
  perm[8] = -1;
  DeviceBuffer bad(perm), out(3 * 40 * 4);
  DequantizeParams p;
  p.w = w.device;
  p.w.perm = reinterpret_cast<const int32_t*>(bad.data());
  p.out = out.data();
  p.out_stride = 40;
  cuda::dequantize(p, stream.stream());
  stream.wait();
  const std::vector<float> got = out.host<float>(), values = w.values();
  for (int n = 0; n < 3; ++n)
    for (int k = 0; k < 40; ++k) {
      const float at = got[size_t(n * 40 + w.perm[size_t(k)])];
      if (k == 7 || k == 8) EXPECT_TRUE(std::isnan(at));
      else EXPECT_EQ(at, values[size_t(n * 40 + k)]);
    }
}

TEST(EmbeddingCuda, LooksUpTheReferencesBitsAndMakesAStrayIndexANanRow) {
  testing::TestStream stream;
  Random r(4);
  int i = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(true)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    const int64_t count = 37;
    const bool wide = i % 2 == 0;
    std::vector<int64_t> picks(count);
    for (int64_t& p : picks) p = r.below(c.n);
    EmbeddingParams p;
    p.table = w.host;
    p.indices = picks.data();
    p.count = count;
    p.out_dtype = kTypes[i++ % 4];
    p.out_stride = c.k;
    std::vector<uint8_t> want(size_t(count * c.k * dtype_bytes(p.out_dtype)));
    p.out = want.data();
    embedding(p);
    std::vector<int32_t> narrow(picks.begin(), picks.end());
    std::vector<int64_t> stray = picks;
    stray[5] = narrow[5] = int32_t(c.n);
    stray[9] = narrow[9] = -1;
    DeviceBuffer indices64(stray), indices32(narrow), out(int64_t(want.size()));
    p.table = w.device;
    p.indices = wide ? indices64.data() : indices32.data();
    p.indices_are_int64 = wide;
    p.out = out.data();
    cuda::embedding(p, stream.stream());
    stream.expect_report("embedding: index ");
    std::vector<uint8_t> got = out.host();
    const int64_t row_bytes = c.k * dtype_bytes(p.out_dtype);
    for (int row : {5, 9})
      for (int64_t k = 0; k < c.k; ++k) {
        ASSERT_TRUE(std::isnan(load_double(got.data() + row * row_bytes, p.out_dtype, k))) << w.name();
        std::memcpy(got.data() + row * row_bytes, want.data() + row * row_bytes, size_t(row_bytes));
        break;
      }
    ASSERT_EQ(got, want) << w.name();
  }
}

TEST(EmbeddingCuda, CostGrowsWithTheIndicesSoAnEmptyLookUpTouchesNothing) {
  EmbeddingParams p;
  p.table.layout = row_layout(Format::kUint4, 8);
  p.table.n = 0;
  p.table.k = 8;
  p.table.group_size = 8;
  EXPECT_NO_THROW(cuda::embedding(p, Stream{}));
  p.count = -1;
  EXPECT_THROW(cuda::embedding(p, Stream{}), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
