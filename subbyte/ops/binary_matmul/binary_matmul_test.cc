#include "subbyte/ops/binary_matmul/binary_matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/kernels.h"

namespace subbyte {
namespace {

struct Case {
  int64_t batch, m, n, k;
  DType dtype = DType::kF32;
  bool bits = false;
  bool bias = false;
  DType z_dtype = DType::kF32;
};

std::vector<uint8_t> values(int64_t count, DType t, unsigned seed) {
  std::mt19937 r(seed);
  std::vector<uint8_t> out(size_t(count * dtype_bytes(t)) + 8);
  for (int64_t i = 0; i < count; ++i) {
    const int v = int(r() % 9) - 4;  // zeros of both signs among them
    store_double(out.data(), t, i, v == 0 ? (r() % 2 != 0 ? 0.0 : -0.0) : double(v));
  }
  return out;
}

std::vector<uint8_t> run(const Case& c, bool reference, unsigned seed = 1) {
  const std::vector<uint8_t> x = values(c.batch * c.m * c.k, c.dtype, seed),
                             z = values(c.batch * c.n * c.k, c.z_dtype, seed + 1), bias = values(c.n, c.dtype, seed + 3);
  std::mt19937 r(seed + 2);
  std::vector<uint8_t> bits(size_t(c.n * stream_bytes(c.k, 1)) + 1);
  for (uint8_t& b : bits) b = uint8_t(r());  // the spare bits are garbage on purpose
  const int64_t count = c.batch * c.m * c.n;
  std::vector<uint8_t> y(size_t((count + 16) * dtype_bytes(c.dtype)));
  for (int64_t i = 0; i < count + 16; ++i) store_double(y.data(), c.dtype, i, std::numeric_limits<double>::quiet_NaN());
  BinaryMatmulParams p;
  p.x = x.data();
  if (c.bits) p.z_bits = bits.data();
  else p.z = z.data();
  p.y = y.data();
  p.dtype = c.dtype;
  p.batch = c.batch;
  p.m = c.m;
  p.n = c.n;
  p.k = c.k;
  p.x_stride = p.z_stride = c.k;
  p.x_batch_stride = c.m * c.k;
  p.z_batch_stride = c.n * c.k;
  p.y_stride = c.n;
  p.y_batch_stride = c.m * c.n;
  const float scale = 0.37f;
  const double wide_scale = 0.37;
  p.scale = p.second_scale = c.dtype == DType::kF64 ? static_cast<const void*>(&wide_scale) : &scale;
  p.bias = c.bias ? bias.data() : nullptr;
  p.z_dtype = c.z_dtype;
  if (reference) {
    reference::binary_matmul(p);
  } else {
    std::vector<uint8_t> memory(size_t(binary_matmul_workspace_bytes(p)) + 64, 0xff);
    p.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    p.workspace_bytes = binary_matmul_workspace_bytes(p);
    binary_matmul(p);
  }
  for (int64_t i = count; i < count + 16; ++i) EXPECT_TRUE(std::isnan(load_double(y.data(), c.dtype, i))) << "wrote past y";
  return y;
}

TEST(BinaryMatmul, EveryPathGivesTheReferencesBits) {
  int tried = 0;
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (bool bits : {false, true})
      for (const auto& [m, n, k] : {std::tuple<int, int, int>{1, 1, 1},
                                    {2, 4, 8},
                                    {3, 5, 127},
                                    {33, 35, 512},
                                    {1, 64, 513},
                                    {4, 4, 4099},
                                    {2, 3, 9000},
                                    {3, 2, 0},
                                    {0, 2, 4},
                                    {2, 0, 4}}) {
        const Case c{2, m, n, k, DType::kF32, bits};
        ASSERT_EQ(run(c, false), run(c, true)) << isa_name(Isa(isa)) << " " << m << "x" << n << "x" << k << " bits " << bits;
        ++tried;
      }
  }
  EXPECT_GE(tried, 20);
}

TEST(BinaryMatmul, TakesEveryDtype) {
  for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    for (DType z : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
      const Case c{2, 5, 9, 300, t, false, z == t, z};
      EXPECT_EQ(run(c, false), run(c, true)) << dtype_name(t) << " by " << dtype_name(z);
    }
  }
}

TEST(BinaryMatmul, SignOfBothZerosIsPlusOne) {
  const float x[2] = {0.0f, -0.0f}, z[2] = {1.0f, 1.0f};
  float y = 0;
  alignas(64) uint8_t memory[512];
  BinaryMatmulParams p;
  p.x = x;
  p.z = z;
  p.y = &y;
  p.m = p.n = 1;
  p.k = p.x_stride = p.z_stride = 2;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  EXPECT_EQ(y, 2.0f);
}

TEST(BinaryMatmul, NanMarksItsRowAndItsColumnOnly) {
  float x[6] = {1, 2, 3, 4, NAN, 6}, z[4] = {NAN, 1, 1, 1}, y[6];
  alignas(64) uint8_t memory[1024];
  BinaryMatmulParams p;
  p.x = x;
  p.z = z;
  p.y = y;
  p.m = 3;
  p.n = p.k = p.x_stride = p.z_stride = p.y_stride = 2;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  for (int m = 0; m < 3; ++m)
    for (int n = 0; n < 2; ++n) EXPECT_EQ(std::isnan(y[m * 2 + n]), m == 2 || n == 0);
}

TEST(BinaryMatmul, ATinyNegativeDoubleIsNegative) {
  const double x = -1e-300, z = 1;
  double y = 0;
  alignas(64) uint8_t memory[512];
  BinaryMatmulParams p;
  p.x = &x;
  p.z = &z;
  p.y = &y;
  p.dtype = p.z_dtype = DType::kF64;
  p.m = p.n = p.k = p.x_stride = p.z_stride = 1;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  EXPECT_EQ(y, -1.0);
}

TEST(BinaryMatmul, SumsStayIntegersUntilTheScale) {
  // 300 products of +1 less one of -1: 298 is no bfloat16 number, and is rounded once, to 298 +- 2.
  std::vector<uint16_t> x(300, float_to_bf16(1.0f)), z(300, float_to_bf16(1.0f));
  z[0] = float_to_bf16(-1.0f);
  uint16_t y = 0;
  const float scale = 0.5f;
  alignas(64) uint8_t memory[512];
  BinaryMatmulParams p;
  p.x = x.data();
  p.z = z.data();
  p.y = &y;
  p.dtype = p.z_dtype = DType::kBF16;
  p.m = p.n = 1;
  p.k = p.x_stride = p.z_stride = 300;
  p.scale = &scale;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  EXPECT_EQ(bf16_to_float(y), 149.0f);
}

TEST(BinaryMatmul, MultipliesByOneScaleAfterTheOther) {
  // (3 * scale) * second_scale differs from 3 * (scale * second_scale) in the last bit, in float32 and in float64.
  constexpr int64_t kK = 3;
  const std::vector<float> x(kK, 1.0f), z(2 * kK, -1.0f);
  const float scale = 0.1f, second = 0.9f, bias[2] = {1.0f, 2.0f};
  ASSERT_NE(-3.0f * scale * second, -3.0f * (scale * second));
  float y[2] = {};
  alignas(64) uint8_t memory[1024];
  BinaryMatmulParams p;
  p.x = x.data();
  p.z = z.data();
  p.y = y;
  p.m = 1;
  p.n = 2;
  p.k = p.x_stride = p.z_stride = kK;
  p.scale = &scale;
  p.second_scale = &second;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  EXPECT_EQ(y[0], -3.0f * scale * second);
  EXPECT_EQ(y[1], y[0]);
  p.bias = bias;
  p.scale = nullptr;
  binary_matmul(p);
  EXPECT_EQ(y[1], -3.0f * second + 2.0f);

  const std::vector<double> wide_x(kK, 1.0), wide_z(kK, -1.0);
  const double wide_scale = 0.1, wide_second = 0.9;
  ASSERT_NE(-3.0 * wide_scale * wide_second, -3.0 * (wide_scale * wide_second));
  double wide_y = 0;
  p = {};
  p.x = wide_x.data();
  p.z = wide_z.data();
  p.y = &wide_y;
  p.dtype = p.z_dtype = DType::kF64;
  p.m = p.n = 1;
  p.k = p.x_stride = p.z_stride = kK;
  p.scale = &wide_scale;
  p.second_scale = &wide_second;
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  binary_matmul(p);
  EXPECT_EQ(wide_y, -3.0 * wide_scale * wide_second);
}

TEST(BinaryMatmul, FindsANanAtEveryPlaceOfALongRowInEveryType) {
  constexpr int64_t kK = 77;
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64})
      for (int64_t at = 0; at < kK; ++at) {
        std::vector<uint8_t> x(size_t(2 * kK * dtype_bytes(t))), z(x.size() / 2), y(size_t(2 * dtype_bytes(t)));
        for (int64_t i = 0; i < 2 * kK; ++i) store_double(x.data(), t, i, i % 3 == 0 ? -1e30 : i % 3 == 1 ? HUGE_VAL : -0.0);
        for (int64_t i = 0; i < kK; ++i) store_double(z.data(), t, i, 1);
        store_double(x.data(), t, at, at % 2 == 0 ? std::nan("") : -std::nan(""));
        alignas(64) uint8_t memory[1024];
        BinaryMatmulParams p;
        p.x = x.data();
        p.z = z.data();
        p.y = y.data();
        p.dtype = p.z_dtype = t;
        p.m = 2;
        p.n = p.y_stride = 1;
        p.k = p.x_stride = p.z_stride = kK;
        p.workspace = memory;
        p.workspace_bytes = sizeof(memory);
        binary_matmul(p);
        EXPECT_TRUE(std::isnan(load_double(y.data(), t, 0))) << isa_name(Isa(isa)) << " " << dtype_name(t) << " at " << at;
        // Row 1: elements 77 .. 153, every third of them, from 78 on, negative.
        EXPECT_EQ(load_double(y.data(), t, 1), double(kK - 2 * 26));
      }
  }
}

TEST(BinaryMatmul, DoesNotDependOnTheNumberOfThreads) {
  const Case c{3, 40, 100, 700};
  set_num_threads(1);
  const auto one = run(c, false);
  set_num_threads(3);
  EXPECT_EQ(run(c, false), one);
}

TEST(BinaryMatmul, RefusesWhatItCannotMean) {
  float v = 1;
  uint8_t b = 1;
  BinaryMatmulParams p;
  p.m = p.n = p.k = 1;
  p.x = p.y = &v;
  EXPECT_THROW(binary_matmul(p), std::invalid_argument);  // neither z nor z_bits
  p.z = &v;
  p.z_bits = &b;
  EXPECT_THROW(binary_matmul(p), std::invalid_argument);  // both
  p.z_bits = nullptr;
  EXPECT_THROW(binary_matmul(p), std::invalid_argument);  // no workspace
  p.n = -1;
  EXPECT_THROW(binary_matmul(p), std::invalid_argument);
}

TEST(BinaryMatmulSelection, IsAPureFunctionOfTheInstructionSet) {
  EXPECT_STREQ(select_binary_matmul_kernel(Isa::kScalar).name, "binary_matmul_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_binary_matmul_kernel(Isa::kAvx512).name, "binary_matmul_avx2");
  EXPECT_STREQ(select_binary_matmul_kernel(Isa::kAvx512Vnni).name, "binary_matmul_avx512_vnni");
#endif
}

}  // namespace
}  // namespace subbyte
