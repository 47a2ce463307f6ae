#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/quantized_matmul/kernels.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte {
namespace {

struct Case {
  int64_t batch, m, n, k;
  int bits;
  DType dtype = DType::kF32;
  bool shared_z = false;
  bool packed_z = false;  // z as codes; batch-shared
  bool bias = false;
  DType z_dtype = dtype;
};

struct Operands {
  std::vector<double> x, z;  // converted to the case's dtype on use
};

std::vector<uint8_t> as_dtype(const std::vector<double>& v, DType t) {
  std::vector<uint8_t> out(v.size() * size_t(dtype_bytes(t)) + 8);
  for (size_t i = 0; i < v.size(); ++i) store_double(out.data(), t, int64_t(i), v[i]);
  return out;
}

Operands operands(const Case& c, unsigned seed) {
  std::mt19937 r(seed);
  std::normal_distribution<double> d(0, 2);  // steps below are 0.5 and 0.3: some values saturate
  Operands o;
  o.x.resize(size_t(c.batch * c.m * c.k));
  o.z.resize(size_t((c.shared_z || c.packed_z ? 1 : c.batch) * c.n * c.k));
  for (double& v : o.x) v = d(r);
  for (double& v : o.z) v = d(r);
  return o;
}

// The stream that a layer would keep of z.
std::vector<uint8_t> packed(const Case& c, const std::vector<uint8_t>& z, float step) {
  const int64_t row_bytes = stream_bytes(c.k, c.bits);
  std::vector<uint8_t> codes(size_t(c.n * row_bytes));
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t k = 0; k < c.k; ++k)
      set_code(codes.data() + n * row_bytes, k, c.bits,
               uint32_t(step_code(load_float(z.data(), c.z_dtype, n * c.k + k), step, c.bits) + (1 << (c.bits - 1))));
  return codes;
}

// y as raw bytes, with a guard row behind it.
std::vector<uint8_t> run(const Case& c, const Operands& o, bool reference, float x_step = 0.5f, float z_step = 0.3f) {
  const std::vector<uint8_t> x = as_dtype(o.x, c.dtype), z = as_dtype(o.z, c.z_dtype);
  const std::vector<uint8_t> codes = c.packed_z ? packed(c, z, z_step) : std::vector<uint8_t>();
  const std::vector<uint8_t> bias = as_dtype(std::vector<double>(o.x.begin(), o.x.begin() + c.n * int64_t(c.bias)), c.dtype);
  const size_t count = size_t(c.batch * c.m * c.n);
  std::vector<uint8_t> y = as_dtype(std::vector<double>(count + 16, std::numeric_limits<double>::quiet_NaN()), c.dtype);
  QuantizedMatmulParams p;
  p.x = x.data();
  if (c.packed_z) p.z_codes = codes.data();
  else p.z = z.data();
  if (c.bias) p.bias = bias.data();
  p.y = y.data();
  p.dtype = c.dtype;
  p.z_dtype = c.z_dtype;
  p.batch = c.batch;
  p.m = c.m;
  p.n = c.n;
  p.k = c.k;
  p.x_stride = p.z_stride = c.k;
  p.x_batch_stride = c.m * c.k;
  p.z_batch_stride = c.shared_z ? 0 : c.n * c.k;
  p.y_stride = c.n;
  p.y_batch_stride = c.m * c.n;
  p.bits = c.bits;
  p.x_step = &x_step;
  p.z_step = &z_step;
  if (reference) {
    reference::quantized_matmul(p);
  } else {
    std::vector<uint8_t> memory(size_t(quantized_matmul_workspace_bytes(p)) + 64, 0xa5);
    p.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    p.workspace_bytes = quantized_matmul_workspace_bytes(p);
    quantized_matmul(p);
  }
  for (size_t i = count; i < count + 16; ++i)
    EXPECT_TRUE(std::isnan(load_double(y.data(), c.dtype, int64_t(i)))) << "wrote past y";
  return y;
}

TEST(QuantizedMatmul, EveryPathGivesTheReferencesBits) {
  int tried = 0;
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (int bits : {2, 3, 4, 5, 6, 7, 8})
      for (const auto& [m, n, k] : {std::tuple<int, int, int>{1, 1, 1},
                                    {1, 5, 63},
                                    {2, 4, 64},
                                    {3, 7, 65},
                                    {17, 33, 100},
                                    {5, 64, 127},
                                    {64, 9, 576},
                                    {33, 31, 1500},
                                    {4, 4, 0},
                                    {0, 3, 5},
                                    {3, 0, 5}}) {
        const Case c{2, m, n, k, bits};
        const Operands o = operands(c, unsigned(m * 100 + n));
        ASSERT_EQ(run(c, o, false), run(c, o, true))
            << "isa " << isa_name(Isa(isa)) << " bits " << bits << " " << m << "x" << n << "x" << k;
        ++tried;
      }
  }
  EXPECT_GE(tried, 77);
}

TEST(QuantizedMatmul, SumsAreExactAtTheEndsOfTheRange) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (int bits : {4, 8})
      for (double sign : {1.0, -1.0}) {
        const Case c{1, 3, 5, 40000, bits};
        Operands o;
        o.x.assign(size_t(c.m * c.k), -1e9);  // saturates at lo
        o.z.assign(size_t(c.n * c.k), sign * 1e9);
        const double lo = -std::exp2(bits - 1), other = sign < 0 ? lo : -lo - 1;
        const std::vector<uint8_t> y = run(c, o, false, 1.0f, 1.0f);
        for (int64_t i = 0; i < c.m * c.n; ++i) EXPECT_EQ(load_float(y.data(), c.dtype, i), float(lo * other * double(c.k)));
      }
  }
}

TEST(QuantizedMatmul, TakesEveryDtypeAndASharedOperand) {
  for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    const Case c{3, 6, 11, 130, 4, t, true};
    const Operands o = operands(c, 7);
    EXPECT_EQ(run(c, o, false), run(c, o, true)) << dtype_name(t);
  }
}

TEST(QuantizedMatmul, PackedRowsGiveTheBitsOfTheFloatsTheyWerePackedFrom) {
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (int bits = 2; bits <= 8; ++bits)
      for (const auto& [m, n, k] :
           {std::tuple<int, int, int>{1, 3, 1}, {2, 33, 7}, {3, 5, 65}, {4, 70, 127}, {2, 4, 1000}, {3, 4, 0}}) {
        Case c{2, m, n, k, bits, DType::kF32, true, false, k > 33};
        const Operands o = operands(c, unsigned(k));
        const auto from_floats = run(c, o, false);
        c.packed_z = true;
        ASSERT_EQ(run(c, o, false), from_floats) << isa_name(Isa(isa)) << " bits " << bits << " K " << k;
        ASSERT_EQ(run(c, o, true), from_floats) << "reference, bits " << bits << " K " << k;
      }
  }
}

TEST(QuantizedMatmul, OperandsMayDifferInTypeAndTheBiasIsAddedBeforeTheOneRounding) {
  for (DType t : {DType::kF16, DType::kBF16, DType::kF64}) {
    const Case c{2, 5, 9, 40, 4, t, true, false, true, DType::kF32};
    const Operands o = operands(c, 3);
    const std::vector<uint8_t> y = run(c, o, false);
    EXPECT_EQ(y, run(c, o, true)) << dtype_name(t);
    const std::vector<uint8_t> x = as_dtype(o.x, t);
    double sum = 0;
    for (int64_t k = 0; k < c.k; ++k)
      sum += step_code(load_float(x.data(), t, k), 0.5f, 4) * step_code(float(o.z[size_t(k)]), 0.3f, 4);
    const double want = sum * 0.5 * double(0.3f) + load_double(x.data(), t, 0);
    EXPECT_NEAR(load_double(y.data(), t, 0), want, 1.01 * dtype_epsilon(t) * std::fabs(want) + 1e-6);
  }
}

TEST(Int8Rows, EveryKernelMakesTheReferencesRows) {
  int tried = 0;
  const Int8RowKernel& reference = int8_row_kernels().back();
  for (const Int8RowKernel& kernel : int8_row_kernels()) {
    if (kernel.isa > detected_isa()) continue;
    for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64})
      for (int bits = 2; bits <= 8; ++bits)
        for (int64_t k : {0, 1, 7, 8, 9, 31, 33, 64, 71}) {
          std::vector<double> v(size_t(k + 1));
          for (int64_t i = 0; i <= k; ++i) v[size_t(i)] = double(i % 41 - 20) * 0.125;  // step 0.25: ties, both ends
          if (k > 8) v[3] = INFINITY, v[4] = -INFINITY, v[size_t(k)] = NAN;
          const std::vector<uint8_t> raw = as_dtype(v, t);
          alignas(64) int8_t got[128], want[128];
          EXPECT_EQ(kernel.quantize(raw.data(), t, 1, k, 0.25f, bits, got), k > 8);
          reference.quantize(raw.data(), t, 1, k, 0.25f, bits, want);
          ASSERT_EQ(std::memcmp(got, want, size_t(k)), 0)
              << kernel.name << " " << dtype_name(t) << " bits " << bits << " k " << k;
          std::vector<uint8_t> codes(size_t(stream_bytes(k, bits)));
          for (int64_t i = 0; i < k; ++i) set_code(codes.data(), i, bits, uint32_t(int(want[i]) + (1 << (bits - 1))));
          kernel.unpack(codes.data(), k, bits, got);
          ASSERT_EQ(std::memcmp(got, want, size_t(k)), 0) << kernel.name << " unpack bits " << bits << " k " << k;
          ++tried;
        }
  }
  EXPECT_GE(tried, 4 * 7 * 9);
}

TEST(QuantizedMatmul, Float16DoesNotOverflowBeforeTheScale) {  // 4096 * 49 = 200704 > 65504 as an integer
  Case c{1, 1, 1, 4096, 4, DType::kF16};
  Operands o;
  o.x.assign(4096, 0.07);
  o.z.assign(4096, 0.07);
  const std::vector<uint8_t> y = run(c, o, false, 0.01f, 0.01f);
  EXPECT_NEAR(load_float(y.data(), c.dtype, 0), 20.07, 0.02);
}

TEST(QuantizedMatmul, NanMarksItsRowAndItsColumnOnly) {
  const Case c{1, 3, 4, 70, 4};
  Operands o = operands(c, 9);
  o.x[size_t(1 * c.k + 69)] = std::numeric_limits<double>::quiet_NaN();
  o.z[size_t(2 * c.k)] = std::numeric_limits<double>::quiet_NaN();
  const std::vector<uint8_t> y = run(c, o, false);
  for (int64_t m = 0; m < 3; ++m)
    for (int64_t n = 0; n < 4; ++n)
      EXPECT_EQ(std::isnan(load_float(y.data(), c.dtype, m * 4 + n)), m == 1 || n == 2) << m << " " << n;
}

TEST(QuantizedMatmul, StepsBelowEpsCountAsEps) {
  const Case c{1, 2, 2, 8, 4};
  const Operands o = operands(c, 11);
  EXPECT_EQ(run(c, o, false, 0.0f, -3.0f), run(c, o, false, 1e-5f, 1e-5f));
}

TEST(QuantizedMatmul, DoesNotDependOnTheNumberOfThreads) {
  const Case c{2, 70, 200, 300, 8};
  const Operands o = operands(c, 13);
  set_num_threads(1);
  const auto one = run(c, o, false);
  set_num_threads(3);
  EXPECT_EQ(run(c, o, false), one);
}

TEST(QuantizedMatmul, RefusesWhatItCannotMean) {
  QuantizedMatmulParams p;
  p.m = p.n = p.k = 1;
  p.bits = 1;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);
  p.bits = 4;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);  // no steps
  float x_step = std::numeric_limits<float>::quiet_NaN(), z_step = 1;
  p.x_step = &x_step;
  p.z_step = &z_step;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);
  x_step = 1;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);  // no arrays
  float v = 1;
  const uint8_t code = 0;
  p.x = p.z = p.y = &v;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);  // no workspace
  alignas(64) uint8_t memory[512];
  p.workspace = memory;
  p.workspace_bytes = sizeof(memory);
  EXPECT_NO_THROW(quantized_matmul(p));
  p.z_codes = &code;
  EXPECT_THROW(quantized_matmul(p), std::invalid_argument);  // z twice
}

TEST(QuantizedMatmulSelection, IsAPureFunctionOfBitsAndInstructionSet) {
  EXPECT_STREQ(select_quantized_matmul_kernel(4, Isa::kScalar).name, "quantized_matmul_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_quantized_matmul_kernel(4, Isa::kAvx2).name, "quantized_matmul_dot_narrow_avx2");
  EXPECT_STREQ(select_quantized_matmul_kernel(6, Isa::kAvx512).name, "quantized_matmul_dot_narrow_avx2");
  EXPECT_STREQ(select_quantized_matmul_kernel(8, Isa::kAvx2).name, "quantized_matmul_dot_int8_avx2");
  EXPECT_STREQ(select_quantized_matmul_kernel(8, Isa::kAvx512Vnni).name, "quantized_matmul_dot_int8_avx512_vnni");
#endif
}

}  // namespace
}  // namespace subbyte
