#include "subbyte/ops/embedding_grad/embedding_grad.h"

#include <gtest/gtest.h>

#include <random>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/embedding_grad/kernels.h"

namespace subbyte {
namespace {

using testing::GuardedBuffer;

// Random look-ups: `rows` touched rows (the last one without look-ups), gy with gaps between its rows.
struct Case {
  Case(int64_t k, DType type, bool factored, bool scaled, uint32_t seed) : rng(seed) {
    p.k = k;
    p.gy_dtype = type;
    p.gy_rows = 9;
    p.gy_stride = k + 3;
    p.rows = 7;
    std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
    gy.resize(size_t(p.gy_rows * p.gy_stride * dtype_bytes(type)));
    for (int64_t i = 0; i < p.gy_rows * p.gy_stride; ++i) store_float(gy.data(), type, i, rng() % 9 == 0 ? 0.0f : unit(rng));
    for (int64_t t = 0; t < p.rows; ++t) {
      begins.push_back(int64_t(sources.size()));
      for (int64_t j = t + 1 == p.rows ? 0 : 1 + int64_t(rng() % 5); j > 0; --j) {
        sources.push_back(int64_t(rng() % 9));
        factors.push_back(unit(rng));
      }
      ends.push_back(int64_t(sources.size()));
      scales.push_back(t % 3 == 1 ? -0.5f : t % 3 == 2 ? 0.0f : 0.25f);
    }
    p.count = int64_t(sources.size());
    p.gy = gy.data();
    p.sources = sources.data();
    p.begins = begins.data();
    p.ends = ends.data();
    if (factored) p.factors = factors.data();
    if (scaled) p.scales = scales.data();
  }

  // The formula in double, apart from the op's own loops.
  double sum(int64_t t, int64_t k) const {
    double a = 0;
    for (int64_t j = begins[size_t(t)]; j < ends[size_t(t)]; ++j)
      a += (p.factors ? double(factors[size_t(j)]) : 1.0) *
           load_double(gy.data(), p.gy_dtype, sources[size_t(j)] * p.gy_stride + k);
    return a;
  }

  std::mt19937 rng;
  EmbeddingGradParams p;
  std::vector<uint8_t> gy;
  std::vector<int64_t> sources, begins, ends;
  std::vector<float> factors, scales;
};

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};

TEST(EmbeddingGrad, SumsAndSignsAreThoseOfTheFormulaAndTheSameBitsFromEveryKernel) {
  int skipped = 0;
  for (const EmbeddingGradKernel& kernel : embedding_grad_kernels()) {
    if (kernel.isa > detected_isa()) {
      ++skipped;
      continue;
    }
    uint32_t seed = 1;
    for (int64_t k : {1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 511, 512})
      for (DType type : kTypes) {
        if (type == DType::kF64 && !kernel.float64) continue;
        for (int flags = 0; flags < 4; ++flags) {
          Case c(k, type, flags & 1, flags & 2, ++seed);
          const int64_t stride = k + 2;
          std::vector<uint8_t> before = c.gy;
          GuardedBuffer<uint8_t> values(((c.p.rows - 1) * stride + k) * dtype_bytes(type)), signs(c.p.rows * ceil_div(k, 8));
          std::vector<uint8_t> want(size_t(values.size()), 0xff), want_signs(size_t(signs.size()), 0xff);
          c.p.values_stride = stride;
          c.p.values = want.data();
          c.p.sign_bits = want_signs.data();
          for (int64_t t = 0; t < c.p.rows; ++t) reference::embedding_grad_piece(c.p, t, 0, k);
          c.p.values = values.data();
          c.p.sign_bits = signs.data();
          for (int64_t t = 0; t < c.p.rows; ++t) kernel.piece(c.p, t, 0, k);
          ASSERT_EQ(values.copy(), want) << kernel.name << " K " << k << " " << dtype_name(type) << " flags " << flags;
          ASSERT_EQ(signs.copy(), want_signs) << kernel.name << " K " << k << " " << dtype_name(type) << " flags " << flags;
          ASSERT_TRUE(values.intact() && signs.intact());
          ASSERT_EQ(c.gy, before) << "gy was written";
          for (int64_t t = 0; t < c.p.rows; ++t)
            for (int64_t i = 0; i < ceil_div(k, 8) * 8; ++i) {
              const bool bit = signs[t * ceil_div(k, 8) + i / 8] >> (i % 8) & 1;
              if (i >= k) {
                ASSERT_FALSE(bit) << "spare bit";
                continue;
              }
              const double a = c.sum(t, i), scaled = (c.p.scales ? double(c.scales[size_t(t)]) : 1.0) * a;
              ASSERT_NEAR(load_double(values.data(), type, t * stride + i), a, 4 * dtype_epsilon(type) * 8 + 1e-6);
              if (scaled == 0 || std::abs(scaled) > 1e-5) ASSERT_EQ(bit, scaled >= 0) << k << " " << t << " " << i;
            }
        }
      }
  }
  if (skipped > 0) std::cout << skipped << " kernels skipped: this machine lacks their instructions\n";
}

TEST(EmbeddingGrad, TheEntryCutsColumnsIntoPiecesAndTheNumberOfThreadsDoesNotShow) {
  const int before = num_threads();
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    for (int64_t k : {513, 1030}) {
      Case c(k, DType::kBF16, true, true, 77);
      std::vector<uint8_t> want(size_t(c.p.rows * k * 2), 0xff), got = want, signs(size_t(c.p.rows * ceil_div(k, 8)), 0xff),
                                                                 got_signs = signs;
      c.p.values_stride = k;
      c.p.values = want.data();
      c.p.sign_bits = signs.data();
      for (int64_t t = 0; t < c.p.rows; ++t) reference::embedding_grad_piece(c.p, t, 0, k);
      c.p.values = got.data();
      c.p.sign_bits = got_signs.data();
      embedding_grad(c.p);
      EXPECT_EQ(got, want);
      EXPECT_EQ(got_signs, signs);
    }
  }
  set_num_threads(before);
}

TEST(EmbeddingGrad, ARowWithoutLookUpsIsZeroAndCountsAsPositive) {
  Case c(11, DType::kF32, false, false, 3);
  std::vector<uint8_t> signs(size_t(c.p.rows * 2), 0);
  std::vector<float> values(size_t(c.p.rows * 11), -1.0f);
  c.p.values_stride = 11;
  c.p.values = values.data();
  c.p.sign_bits = signs.data();
  embedding_grad(c.p);
  for (int64_t k = 0; k < 11; ++k) EXPECT_EQ(values[size_t((c.p.rows - 1) * 11 + k)], 0.0f);
  EXPECT_EQ(signs[size_t((c.p.rows - 1) * 2)], 0xff);
  EXPECT_EQ(signs[size_t((c.p.rows - 1) * 2 + 1)], 0x07);
}

TEST(EmbeddingGrad, WhatPointsOutsideIsRefusedBeforeAnythingIsWritten) {
  std::vector<float> values(7 * 8, 5.0f);
  auto broken = [&](auto change) {
    Case c(8, DType::kF32, false, false, 4);
    c.p.values = values.data();
    c.p.values_stride = 8;
    change(c);
    EXPECT_THROW(embedding_grad(c.p), std::invalid_argument);
  };
  broken([](Case& c) { c.sources[1] = 9; });
  broken([](Case& c) { c.sources[0] = -1; });
  broken([](Case& c) { c.ends[2] = c.p.count + 1; });
  broken([](Case& c) { c.begins[0] = -1; });
  broken([](Case& c) { c.p.gy_stride = 7; });
  broken([](Case& c) { c.p.begins = nullptr; });
  broken([](Case& c) { c.p.rows = -1; });
  EXPECT_EQ(values, std::vector<float>(7 * 8, 5.0f));
  EXPECT_NO_THROW(embedding_grad(EmbeddingGradParams{}));
}

TEST(EmbeddingGrad, SelectionGoesByTypeAndInstructionSet) {
  EXPECT_STREQ(select_embedding_grad_kernel(DType::kF32, Isa::kScalar).name, "embedding_grad_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_embedding_grad_kernel(DType::kF32, Isa::kAvx2).name, "embedding_grad_avx2");
  EXPECT_STREQ(select_embedding_grad_kernel(DType::kBF16, Isa::kAvx512).name, "embedding_grad_avx512");
#endif
  EXPECT_STREQ(select_embedding_grad_kernel(DType::kF64, Isa::kAvx512).name, "embedding_grad_reference");
}

}  // namespace
}  // namespace subbyte
