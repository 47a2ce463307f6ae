#include "subbyte/ops/embedding_bag/embedding_bag.h"

#include <gtest/gtest.h>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/random_matrix_test.h"

namespace subbyte {
namespace {

using testing::GuardedBuffer;
using testing::MatrixShape;
using testing::RandomMatrix;

// The formula on packed_value, written apart from the op: float32 sums in order.
float expected(const EmbeddingBagParams& p, int64_t b, int64_t stored_k) {
  float total = 0;
  int64_t counted = 0, votes = 0;
  for (int64_t j = p.begin(b); j < p.end(b); ++j) {
    const int64_t n = p.index(j);
    if (n == p.padding_idx) continue;
    ++counted;
    votes += packed_code(p.table, n, stored_k);
    const float value = packed_value(p.table, n, stored_k);
    total += p.weights ? p.weights[j] * value : value;
  }
  if (counted == 0) return 0;
  if (p.mode == BagMode::kMajority) return 2 * votes >= counted ? 1.0f : -1.0f;
  return p.mode == BagMode::kMean ? total / float(counted) : total;
}

void check(EmbeddingBagParams p, const std::string& what) {
  const int64_t bytes = dtype_bytes(p.out_dtype);
  p.out_stride = p.table.k + 2;
  GuardedBuffer<uint8_t> out(p.bags == 0 ? 0 : ((p.bags - 1) * p.out_stride + p.table.k) * bytes);
  p.out = out.data();
  embedding_bag(p);
  ASSERT_TRUE(out.intact());
  for (int64_t b = 0; b < p.bags; ++b)
    for (int64_t k = 0; k < p.table.k; ++k) {
      uint8_t want[8];
      store_float(want, p.out_dtype, 0, expected(p, b, k));
      const int64_t to = p.table.perm ? p.table.perm[k] : k;
      ASSERT_EQ(load_double(out.data(), p.out_dtype, b * p.out_stride + to), load_double(want, p.out_dtype, 0))
          << what << " bag " << b << " column " << k;
    }
}

TEST(EmbeddingBag, SumsAndMeansAreThoseOfTheDequantizedRowsForEveryFormatAndInstructionSet) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    uint32_t seed = 5;
    int turn = 0;
    for (MatrixShape shape : testing::codec_shapes()) {
      if (++turn % 3 != 0) continue;
      shape.n = 11;
      RandomMatrix m(shape, ++seed);
      const std::vector<int64_t> wide = {0, 10, 3, 3, 7, 3, 1, 0, 9, 3}, offsets = {0, 0, 4, 5, 10};
      const std::vector<int32_t> narrow(wide.begin(), wide.end());
      std::vector<float> weights;
      for (int i = 0; i < 10; ++i) weights.push_back(0.3f * float(i) - 1);
      EmbeddingBagParams p;
      p.table = m.w;
      p.count = 10;
      p.indices_are_int64 = turn % 2 == 0;
      p.indices = p.indices_are_int64 ? static_cast<const void*>(wide.data()) : narrow.data();
      p.bags = 5;
      p.offsets = offsets.data();
      p.out_dtype = turn % 4 == 0 ? DType::kBF16 : turn % 4 == 1 ? DType::kF16 : turn % 4 == 2 ? DType::kF64 : DType::kF32;
      check(p, shape.name() + " sum");
      p.mode = BagMode::kMean;
      p.padding_idx = 3;
      check(p, shape.name() + " mean");
      p.mode = BagMode::kSum;
      p.weights = weights.data();
      p.offsets = nullptr;
      p.bag_size = 2;
      check(p, shape.name() + " weighted");
    }
  }
}

TEST(EmbeddingBag, AMajorityCountsVotesAndTiesGoUp) {
  for (int64_t k : {1, 7, 8, 9, 63, 64, 65, 127, 129, 200})
    for (int64_t size : {0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 255, 256, 300}) {
      RandomMatrix m({"sign", 6, k, 5000, ZeroKind::kFixed, DType::kF32, DType::kF32, k % 2 == 1}, uint32_t(k));
      std::vector<int64_t> indices(size_t(3 * size));
      for (int64_t& i : indices) i = int64_t(m.rng() % 6);
      EmbeddingBagParams p;
      p.table = m.w;
      p.count = 3 * size;
      p.indices = indices.data();
      p.bags = 3;
      p.bag_size = size;
      p.mode = BagMode::kMajority;
      check(p, "majority of " + std::to_string(size));
      p.padding_idx = 2;
      check(p, "majority of " + std::to_string(size) + " with padding");
    }
}

TEST(EmbeddingBag, TheNumberOfThreadsDoesNotShow) {
  RandomMatrix m({"uint4", 100, 65, 32, ZeroKind::kOffsets, DType::kF16, DType::kF16}, 2);
  std::vector<int64_t> indices(700);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = int64_t(i * 7919 % 100);
  const int before = num_threads();
  std::vector<float> first;
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    std::vector<float> out(140 * 65, -3.0f);
    EmbeddingBagParams p;
    p.table = m.w;
    p.indices = indices.data();
    p.count = 700;
    p.bags = 140;
    p.bag_size = 5;
    p.out = out.data();
    p.out_stride = 65;
    embedding_bag(p);
    if (first.empty()) first = out;
    EXPECT_EQ(out, first);
  }
  set_num_threads(before);
}

TEST(EmbeddingBag, WhatIsOutsideIsRefusedAndNothingIsWritten) {
  RandomMatrix m({"uint8", 4, 6, 6}, 2);
  std::vector<float> out(12, 1.0f);
  const int64_t good[] = {0, 1, 2, 3}, stray[] = {0, 1, 4, 3}, negative[] = {-1, 0, 0, 0};
  const int64_t offsets[] = {0, 2}, late[] = {1, 2}, falling[] = {0, 5};
  EmbeddingBagParams p;
  p.table = m.w;
  p.indices = good;
  p.count = 4;
  p.bags = 2;
  p.offsets = offsets;
  p.out = out.data();
  p.out_stride = 6;
  auto with = [&](auto change) {
    EmbeddingBagParams q = p;
    change(q);
    return q;
  };
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.indices = stray; })), std::out_of_range);
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.indices = negative; })), std::out_of_range);
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.offsets = late; })), std::invalid_argument);
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.offsets = falling; })), std::invalid_argument);
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.mode = BagMode::kMajority; })), std::invalid_argument);
  EXPECT_THROW(embedding_bag(with([&](auto& q) { q.offsets = nullptr; })), std::invalid_argument);
  const float weights[4] = {};
  EXPECT_THROW(embedding_bag(with([&](auto& q) {
                 q.weights = weights;
                 q.mode = BagMode::kMean;
               })),
               std::invalid_argument);
  EXPECT_EQ(out, std::vector<float>(12, 1.0f));
  EXPECT_NO_THROW(embedding_bag(p));
  EXPECT_NE(out, std::vector<float>(12, 1.0f));
}

}  // namespace
}  // namespace subbyte
