#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/embedding_grad/embedding_grad_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

TEST(EmbeddingGradCuda, SumsAndSignsAreTheReferencesBits) {
  testing::TestStream stream;
  Random r(11);
  int turn = 0;
  for (int64_t k : {1, 7, 8, 31, 32, 33, 63, 100, 257, 1030})
    for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
      ++turn;
      const int64_t gy_rows = 40, rows = 13, stride = k + turn % 3;
      const std::vector<uint8_t> gy = testing::random_floats(r, gy_rows * stride, type);
      std::vector<int64_t> sources, begins, ends;
      std::vector<float> factors, scales;
      for (int64_t t = 0; t < rows; ++t) {
        begins.push_back(int64_t(sources.size()));
        for (int64_t j = t == 4 ? 0 : 1 + r.below(t == 5 ? 90 : 6); j > 0; --j) {
          sources.push_back(r.below(gy_rows));
          factors.push_back(r.centred());
        }
        ends.push_back(int64_t(sources.size()));
        scales.push_back(r.centred());
      }
      EmbeddingGradParams p;
      p.gy = gy.data();
      p.gy_dtype = type;
      p.gy_rows = gy_rows;
      p.gy_stride = stride;
      p.k = k;
      p.sources = sources.data();
      p.factors = turn % 2 ? factors.data() : nullptr;
      p.count = int64_t(sources.size());
      p.begins = begins.data();
      p.ends = ends.data();
      p.scales = turn % 4 < 2 ? scales.data() : nullptr;
      p.rows = rows;
      p.values_stride = k;
      std::vector<uint8_t> values(size_t(rows * k * dtype_bytes(type)), 0xff), signs(size_t(rows * p.sign_bytes()), 0xff);
      p.values = values.data();
      p.sign_bits = signs.data();
      embedding_grad(p);
      DeviceBuffer d_gy(gy, turn % 5 == 4 ? dtype_bytes(type) : 0), d_sources(sources), d_factors(factors), d_begins(begins),
          d_ends(ends), d_scales(scales), d_values(int64_t(values.size())), d_signs(int64_t(signs.size()), turn % 3);
      EmbeddingGradParams d = p;
      d.gy = d_gy.data();
      d.sources = reinterpret_cast<const int64_t*>(d_sources.data());
      if (p.factors) d.factors = reinterpret_cast<const float*>(d_factors.data());
      d.begins = reinterpret_cast<const int64_t*>(d_begins.data());
      d.ends = reinterpret_cast<const int64_t*>(d_ends.data());
      if (p.scales) d.scales = reinterpret_cast<const float*>(d_scales.data());
      d.values = d_values.data();
      d.sign_bits = d_signs.data();
      cuda::embedding_grad(d, stream.stream());
      stream.wait();
      ASSERT_EQ(d_values.host(), values) << "K " << k << " " << dtype_name(type);
      ASSERT_EQ(d_signs.host(), signs) << "K " << k << " " << dtype_name(type);
      ASSERT_EQ(d_gy.host(), gy) << "gy was written";
    }
}

}  // namespace
}  // namespace subbyte
