#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/embedding_bag/embedding_bag_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kF16, DType::kF64};

// Both sides on the same arguments; the device's arrays are given.
void compare(EmbeddingBagParams p, EmbeddingBagParams d, const testing::TestStream& stream, const std::string& what) {
  std::vector<uint8_t> want(size_t(p.bags * p.out_stride * dtype_bytes(p.out_dtype)), 0xff);
  p.out = want.data();
  embedding_bag(p);
  DeviceBuffer out(int64_t(want.size()));
  d.out = out.data();
  cuda::embedding_bag(d, stream.stream());
  stream.wait();
  ASSERT_EQ(out.host(), want) << what;
}

TEST(EmbeddingBagCuda, EveryModeAndFormatGivesTheReferencesBits) {
  testing::TestStream stream;
  Random r(13);
  int turn = 0;
  for (const testing::MatrixCase& c : testing::matrix_cases(true)) {
    testing::TestMatrix w = testing::make_matrix(r, c);
    const int64_t bags = 9, size = 6, count = bags * size;
    std::vector<int64_t> picks(static_cast<size_t>(count));
    for (int64_t& p : picks) p = r.below(c.n);
    const std::vector<int32_t> narrow(picks.begin(), picks.end());
    std::vector<int64_t> offsets(static_cast<size_t>(bags));
    for (int64_t b = 1; b < bags; ++b) offsets[size_t(b)] = min_i64(count, offsets[size_t(b - 1)] + r.below(12));
    std::vector<float> weights(static_cast<size_t>(count));
    for (float& f : weights) f = r.centred();
    DeviceBuffer d_picks(picks), d_narrow(narrow), d_offsets(offsets), d_weights(weights);
    EmbeddingBagParams p;
    p.table = w.host;
    p.count = count;
    p.bags = bags;
    p.bag_size = size;
    p.indices_are_int64 = ++turn % 2 == 0;
    p.padding_idx = turn % 3 == 0 ? picks[3] : -1;
    p.out_dtype = kTypes[turn % 4];
    p.out_stride = c.k + turn % 2;
    EmbeddingBagParams d = p;
    p.indices = p.indices_are_int64 ? static_cast<const void*>(picks.data()) : narrow.data();
    d.indices = p.indices_are_int64 ? d_picks.data() : d_narrow.data();
    d.table = w.device;
    p.mode = d.mode = BagMode::kMean;
    compare(p, d, stream, w.name() + " mean");
    p.offsets = offsets.data();
    d.offsets = reinterpret_cast<const int64_t*>(d_offsets.data());
    compare(p, d, stream, w.name() + " mean by offsets");
    p.mode = d.mode = BagMode::kSum;
    p.weights = weights.data();
    d.weights = reinterpret_cast<const float*>(d_weights.data());
    compare(p, d, stream, w.name() + " weighted sum");
    if (c.format != "sign") continue;
    p.weights = d.weights = nullptr;
    p.mode = d.mode = BagMode::kMajority;
    compare(p, d, stream, w.name() + " majority");
  }
}

TEST(EmbeddingBagCuda, AStrayIndexMakesItsBagNanAndNoOther) {
  testing::TestStream stream;
  Random r(14);
  testing::TestMatrix w(r, "uint4", 5, 40, 16, DType::kF32, ZeroKind::kFixed, DType::kF32, false);
  const std::vector<int64_t> picks = {0, 1, 5, 2, 3, -7};
  DeviceBuffer d_picks(picks), out(3 * 40 * 4);
  EmbeddingBagParams p;
  p.table = w.device;
  p.indices = d_picks.data();
  p.count = 6;
  p.bags = 3;
  p.bag_size = 2;
  p.out = out.data();
  p.out_stride = 40;
  cuda::embedding_bag(p, stream.stream());
  stream.expect_report("embedding_bag: index ");
  const std::vector<float> got = out.host<float>();
  for (int64_t i = 0; i < 120; ++i) EXPECT_EQ(std::isnan(got[size_t(i)]), i >= 40) << i;
}

}  // namespace
}  // namespace subbyte
