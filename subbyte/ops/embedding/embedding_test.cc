#include "subbyte/ops/embedding/embedding.h"

#include <gtest/gtest.h>

#include <cmath>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/dequantize/dequantize.h"

namespace subbyte {
namespace {

using testing::GuardedBuffer;
using testing::MatrixShape;
using testing::RandomMatrix;

TEST(Embedding, RowsAreThoseOfTheDequantizedTableOnEveryInstructionSet) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    uint32_t seed = 100;
    for (MatrixShape shape : testing::codec_shapes()) {
      shape.n = 11;
      RandomMatrix m(shape, ++seed);
      for (DType t : {DType::kF32, DType::kBF16}) {
        const int64_t row_bytes = shape.k * dtype_bytes(t);
        std::vector<uint8_t> table(size_t(11 * row_bytes));
        reference::dequantize_rows({m.w, table.data(), t, shape.k}, 0, 11);
        const std::vector<int32_t> narrow = {0, 10, 3, 3, 7};
        const std::vector<int64_t> wide(narrow.begin(), narrow.end());
        for (bool is_wide : {false, true}) {
          GuardedBuffer<uint8_t> out(5 * row_bytes);
          embedding({m.w, is_wide ? static_cast<const void*>(wide.data()) : narrow.data(), is_wide, 5, out.data(), t, shape.k});
          for (int64_t i = 0; i < 5; ++i)
            ASSERT_TRUE(std::equal(out.data() + i * row_bytes, out.data() + (i + 1) * row_bytes,
                                   table.data() + narrow[size_t(i)] * row_bytes))
                << shape.name() << ", look-up " << i << " on " << isa_name(Isa(isa));
          ASSERT_TRUE(out.intact());
        }
      }
    }
  }
}

TEST(Embedding, GapsBetweenRowsStayAndTheNumberOfThreadsDoesNotShow) {
  RandomMatrix m({"uint4", 1000, 65, 32, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 2);
  std::vector<int64_t> indices(700);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = int64_t(i * 7919 % 1000);
  const int before = num_threads();
  std::vector<float> first;
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    std::vector<float> out(700 * 70, -3.0f);
    embedding({m.w, indices.data(), true, 700, out.data(), DType::kF32, 70});
    for (int64_t i = 0; i < 700; ++i)
      for (int64_t k = 65; k < 70; ++k) ASSERT_EQ(out[size_t(i * 70 + k)], -3.0f);
    if (first.empty()) first = out;
    EXPECT_EQ(out, first);
  }
  set_num_threads(before);
}

TEST(Embedding, AnIndexOutsideTheTableIsRefusedWithItsPlaceAndNothingIsWritten) {
  RandomMatrix m({"uint8", 4, 6, 6}, 2);
  std::vector<float> out(12, 1.0f);
  for (int64_t bad : {int64_t(-1), int64_t(4), int64_t(1) << 40}) {
    const int64_t indices[] = {0, bad};
    try {
      embedding({m.w, indices, true, 2, out.data(), DType::kF32, 6});
      FAIL() << "taken";
    } catch (const std::out_of_range& e) {
      EXPECT_NE(std::string(e.what()).find("index " + std::to_string(bad) + " at position 1"), std::string::npos) << e.what();
    }
  }
  EXPECT_EQ(out, std::vector<float>(12, 1.0f));
}

TEST(Embedding, APermutationOutOfRangeIsRefused) {
  RandomMatrix m({"uint8", 4, 6, 6, ZeroKind::kFixed, DType::kF32, DType::kF32, true}, 2);
  m.perm[5] = 6;
  const int64_t index = 0;
  std::vector<float> out(6, 1.0f);
  EXPECT_THROW(embedding({m.w, &index, true, 1, out.data(), DType::kF32, 6}), std::invalid_argument);
  EXPECT_EQ(out, std::vector<float>(6, 1.0f));
}

TEST(Embedding, NothingToLookUpIsNoError) {
  RandomMatrix m({"uint8", 4, 6, 6}, 2), narrow({"uint8", 4, 0, 6}, 2), empty({"uint8", 0, 6, 6}, 2);
  const int64_t index = 3;
  EXPECT_NO_THROW(embedding({m.w, nullptr, true, 0, nullptr, DType::kF32, 6}));
  EXPECT_NO_THROW(embedding({narrow.w, &index, true, 1, nullptr, DType::kF32, 0}));
  EXPECT_THROW(embedding({empty.w, &index, true, 1, nullptr, DType::kF32, 6}), std::exception);
}

}  // namespace
}  // namespace subbyte
