#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/embedding_update/embedding_update_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

TEST(EmbeddingUpdateCuda, CodesAndAveragesAreTheReferencesBitsAndStrayRowsAreLeftOut) {
  testing::TestStream stream;
  Random r(12);
  int turn = 0;
  for (int64_t k : {1, 7, 8, 20, 64, 77, 1030})
    for (EmbeddingUpdateMode mode : {EmbeddingUpdateMode::kDescent, EmbeddingUpdateMode::kXor, EmbeddingUpdateMode::kMomentum})
      for (int flags = 0; flags < 4; ++flags) {
        ++turn;
        const int64_t bytes = ceil_div(k, 8);
        auto random_bytes = [&](int64_t count) {
          std::vector<uint8_t> v(static_cast<size_t>(count));
          for (uint8_t& b : v) b = uint8_t(r.bits());
          return v;
        };
        std::vector<uint8_t> codes = random_bytes(9 * bytes), signs = random_bytes(4 * bytes), mask = random_bytes(4 * bytes);
        std::vector<uint8_t> ints = random_bytes(6 * k), floats = testing::random_floats(r, 6 * k, DType::kF32, 0.1f);
        const std::vector<int64_t> rows = {1, 4, 5, 8}, slots = {3, 0, 5, 2};
        EmbeddingUpdateParams p;
        p.mode = mode;
        p.n = 9;
        p.k = k;
        p.count = 4;
        p.momentum_is_int8 = (flags & 2) != 0;
        p.momentum_rows = 6;
        p.lr = p.momentum_is_int8 ? 90.0f : 0.5f;
        p.one_minus_beta = 0.07f;
        p.seed = uint64_t(turn);
        p.offset = 3;
        std::vector<uint8_t>& momentum = p.momentum_is_int8 ? ints : floats;
        std::vector<int64_t> stray_rows = rows, stray_slots = slots;
        stray_rows.push_back(9);
        stray_rows.push_back(-1);
        stray_rows.push_back(0);
        stray_slots.insert(stray_slots.end(), {1, 1, 6});
        std::vector<uint8_t> more_signs = signs, more_mask = mask;
        more_signs.resize(size_t(7 * bytes), 0x5a);
        more_mask.resize(size_t(7 * bytes), 0xff);
        const int64_t count = mode == EmbeddingUpdateMode::kMomentum ? 7 : 6;
        DeviceBuffer d_codes(codes, turn % 3), d_signs(more_signs), d_mask(more_mask), d_momentum(momentum), d_rows(stray_rows),
            d_slots(stray_slots);
        EmbeddingUpdateParams d = p;
        d.count = count;
        p.codes = codes.data();
        p.rows = rows.data();
        p.slots = slots.data();
        p.sign_bits = signs.data();
        p.mask = flags & 1 ? mask.data() : nullptr;
        p.momentum = momentum.data();
        d.codes = d_codes.data();
        d.rows = reinterpret_cast<const int64_t*>(d_rows.data());
        d.slots = reinterpret_cast<const int64_t*>(d_slots.data());
        d.sign_bits = d_signs.data();
        d.mask = flags & 1 ? d_mask.data() : nullptr;
        d.momentum = d_momentum.data();
        embedding_update(p);
        cuda::embedding_update(d, stream.stream());
        stream.expect_report("embedding_update: row ");
        ASSERT_EQ(d_codes.host(), codes) << "K " << k << " mode " << int(mode) << " flags " << flags;
        ASSERT_EQ(d_momentum.host(), momentum) << "K " << k << " mode " << int(mode) << " flags " << flags;
      }
}

}  // namespace
}  // namespace subbyte
