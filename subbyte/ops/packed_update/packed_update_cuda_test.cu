#include "subbyte/base/philox.h"
#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/packed_update/cuda_exact.h"
#include "subbyte/ops/packed_update/packed_update_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

constexpr MomentType kTypes[] = {MomentType::kF32, MomentType::kBF16, MomentType::kQ8, MomentType::kQ4};
constexpr DType kGradTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

// A zeroed moment on both sides.
struct BothMoments {
  BothMoments(MomentType t, int64_t n, int64_t k, int64_t shift)
      : type(t),
        host(size_t(n * moment_row_bytes(t, k))),
        absmax(is_blockwise(t) ? size_t(n * ceil_div(k, kMomentBlock)) : 0),
        device(host, shift * (t == MomentType::kF32    ? 4
                              : t == MomentType::kBF16 ? 2
                                                       : 1)),
        device_absmax(absmax) {}
  MomentView on_host() { return {type, host.empty() ? nullptr : host.data(), absmax.empty() ? nullptr : absmax.data()}; }
  MomentView on_device() {
    return {type, host.empty() ? nullptr : device.data(),
            absmax.empty() ? nullptr : reinterpret_cast<float*>(device_absmax.data())};
  }

  MomentType type;
  std::vector<uint8_t> host;
  std::vector<float> absmax;
  DeviceBuffer device, device_absmax;
};

struct Kind {
  UpdateRule rule;
  MomentType m, v;
  DType grad;
  int residual_bits;
  int64_t padding;  // of a gradient's row, in elements
};

void compare(Random& r, const testing::MatrixCase& c, const Kind& kind, int i) {
  testing::TestMatrix matrix = testing::make_matrix(r, c);
  testing::TestStream stream;
  const UpdateRule rule = kind.rule;
  const bool stateless = kind.m == MomentType::kNone;
  const int residual_bits = kind.residual_bits;
  BothMoments m(kind.m, c.n, c.k, c.shift);
  BothMoments v(kind.v, c.n, c.k, c.shift);
  std::vector<uint8_t> residual(size_t(c.n * stream_bytes(c.k, residual_bits)), 0x5a);
  if (residual_bits > 0)
    for (int64_t n = 0; n < c.n; ++n) {  // spare bits are zero, as a stream's are
      const int used = int(c.k % 8) * residual_bits % 8;
      if (used != 0) residual[size_t((n + 1) * stream_bytes(c.k, residual_bits) - 1)] &= uint8_t((1 << used) - 1);
    }
  DeviceBuffer device_residual(residual, c.shift);
  for (int step = 0; step < 3; ++step) {
    PackedUpdateParams p;
    p.rule = rule;
    p.w = matrix.host;
    p.grad_dtype = kind.grad;
    p.grad_stride = c.k + kind.padding;
    p.lr = 0.003;
    p.weight_decay = i % 2 ? 0.1 : 0;
    p.seed = 77 + uint64_t(i);
    p.offset = uint64_t(step);
    p.first_row = uint64_t(i % 3) * 1000003;
    p.maximize = i % 4 == 3;
    if (rule == UpdateRule::kSgd) {
      p.momentum = stateless ? 0 : 0.9;
      p.dampening = i % 2 ? 0.1 : 0;
      p.nesterov = i % 4 == 2;
    } else {
      p.beta1 = 0.9;
      p.beta2 = 0.99;
      p.eps = 1e-8;
      p.threshold = rule == UpdateRule::kSign ? 1e-3 : 0;
      p.bias_correction1 = 0.19;
      p.bias_correction2 = 0.003;
    }
    std::vector<uint8_t> grad = testing::random_floats(r, c.n * p.grad_stride, p.grad_dtype, 0.1f);
    const float special[] = {NAN, INFINITY, -INFINITY, 1e30f, 0.0f, -0.0f, 1e-42f};
    for (int64_t j = 0; j < c.n * p.grad_stride; j += 1 + r.below(40))
      store_float(grad.data(), p.grad_dtype, j, special[r.below(7)]);
    const std::vector<float> factor = {0.37f}, numbers = {0.004f, 0.2f, 0.004f};
    const std::vector<int64_t> counter = {5};
    DeviceBuffer device_grad(grad, c.shift * dtype_bytes(p.grad_dtype)), device_factor(factor), device_numbers(numbers),
        device_counter(counter);
    PackedUpdateParams d = p;
    d.w = matrix.device;
    p.codes = matrix.codes.data();
    d.codes = const_cast<uint8_t*>(matrix.device.codes);
    p.residual_bits = d.residual_bits = residual_bits;
    p.residual = residual_bits > 0 ? residual.data() : nullptr;
    d.residual = residual_bits > 0 ? device_residual.data() : nullptr;
    p.grad = grad.data();
    d.grad = device_grad.data();
    p.m = m.on_host();
    d.m = m.on_device();
    p.v = v.on_host();
    d.v = v.on_device();
    if (i % 2 == 0) {
      p.grad_factor = factor.data();
      d.grad_factor = reinterpret_cast<const float*>(device_factor.data());
      p.numbers = numbers.data();
      d.numbers = reinterpret_cast<const float*>(device_numbers.data());
      p.counter = counter.data();
      d.counter = reinterpret_cast<const int64_t*>(device_counter.data());
    }
    packed_update(p);
    cuda::packed_update(d, stream.stream());
    stream.wait();
    const std::string what = matrix.name() + " rule " + std::to_string(int(rule)) + " grad " + dtype_name(p.grad_dtype) +
                             " m " + std::to_string(int(m.type)) + " v " + std::to_string(int(v.type)) + " residual " +
                             std::to_string(residual_bits) + " step " + std::to_string(step);
    ASSERT_EQ(matrix.buffers[0]->host(), matrix.codes) << what;
    ASSERT_EQ(device_residual.host(), residual) << what;
    ASSERT_EQ(m.device.host(), m.host) << what;
    ASSERT_EQ(m.device_absmax.host<float>(), m.absmax) << what;
    ASSERT_EQ(v.device.host(), v.host) << what;
    ASSERT_EQ(v.device_absmax.host<float>(), v.absmax) << what;
  }
}

TEST(PackedUpdateCuda, ThreeStepsOfEveryRuleAndStateHaveTheBitsOfTheCpu) {
  Random r(11);
  int i = 0;
  std::vector<testing::MatrixCase> cases = testing::matrix_cases(false);
  // Segments that do not start on multiples of eight columns.
  cases.push_back({"uint7*5+uint3*15+ternary*10+uint5*3", 70, 33, 5, DType::kF32, DType::kF32, ZeroKind::kZeros, true, 0});
  cases.push_back({"uint2*300+sign*300", 9, 600, 20, DType::kBF16, DType::kF32, ZeroKind::kOffsets, false, 1});
  for (const testing::MatrixCase& c : cases) {
    const auto rule = UpdateRule(i % 3);
    const bool adamw = rule == UpdateRule::kAdamW, stateless = !adamw && i % 5 == 0;
    compare(r, c,
            {rule, stateless ? MomentType::kNone : kTypes[i / 3 % 4], adamw ? kTypes[(i / 3 + i / 12) % 4] : MomentType::kNone,
             kGradTypes[i / 2 % 4], i % 4 == 1 ? 1 + i / 4 % 8 : 0, i % 3 == 0 ? 2 : 0},
            i);
    ++i;
    if (HasFatalFailure()) return;
  }
}

// What step_runs_kernel serves: aligned rows of whole runs of 16 columns, gradients of 32 or 16 bits.
TEST(PackedUpdateCuda, WholeRunsOfEveryRuleMomentsWidthAndResidualHaveTheBitsOfTheCpu) {
  Random r(12);
  int i = 0;
  const int64_t ks[] = {16, 256, 528, 4096, 1552}, groups[] = {16, 64, 32, 256, 1 << 20}, ns[] = {5, 33, 64, 3, 17};
  const ZeroKind zeros[] = {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets};
  const DType types[] = {DType::kBF16, DType::kF16, DType::kF32};
  const auto next = [&](const char* format, const Kind& kind) {
    testing::MatrixCase c;
    c.format = format;
    c.n = ns[i / 2 % 5];
    c.k = ks[i % 5];
    c.group_size = groups[i / 3 % 5];
    c.scale_dtype = types[i % 3];
    c.zero_dtype = types[i / 3 % 3];
    c.kind = zeros[i / 5 % 3];
    c.permuted = false;
    c.shift = 0;
    compare(r, c, kind, i++);
  };
  using enum MomentType;
  for (const FormatInfo& info : kFormats)
    for (const DType grad : {DType::kBF16, DType::kF32})
      for (const int residual_bits : {0, 1 + i % 8}) {
        for (const auto& [m, v] : {std::pair{kF32, kF32}, {kBF16, kBF16}, {kQ8, kQ8}, {kQ4, kQ4}, {kQ8, kQ4}}) {
          next(info.name, {UpdateRule::kAdamW, m, v, grad, residual_bits, i % 2 * 8});
          if (HasFatalFailure()) return;
        }
        for (const UpdateRule rule : {UpdateRule::kSign, UpdateRule::kSgd})
          for (const MomentType m : {kNone, kF32, kBF16, kQ8, kQ4}) {
            next(info.name, {rule, m, kNone, grad, residual_bits, i % 2 * 8});
            if (HasFatalFailure()) return;
          }
      }
}

__global__ void count_wrong_roots(unsigned long long* wrong) {
  const uint32_t first = __float_as_uint(0x1p-100f), last = __float_as_uint(0x1p127f);
  for (uint64_t bits = first + blockIdx.x * blockDim.x + threadIdx.x; bits < last; bits += uint64_t(gridDim.x) * blockDim.x) {
    const float a = __uint_as_float(uint32_t(bits));
    if (cuda::exact_sqrt(a) != __fsqrt_rn(a)) atomicAdd(wrong, 1ull);
  }
}

// Dividends and divisors over the whole range that exact_quotient serves, mantissas random or near a power of two.
__global__ void count_wrong_quotients(unsigned long long* wrong, uint64_t count) {
  for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x) {
    const Philox4 w = philox4x32(3, 4, i);
    const auto number = [](uint32_t mantissa, uint32_t kind, int exponent) {
      mantissa &= 0x7fffffu;
      if (kind % 4 == 1) mantissa &= 15u;
      if (kind % 4 == 2) mantissa |= 0x7ffff0u;
      return __uint_as_float(uint32_t(exponent + 127) << 23 | mantissa);
    };
    const float a = number(w.v[0], w.v[2], int(w.v[3] % 124u) - 60),
                b = number(w.v[1], w.v[2] >> 2, int((w.v[3] >> 8) % 120u) - 60);
    if (cuda::exact_quotient(a, b) != __fdiv_rn(a, b)) atomicAdd(wrong, 1ull);
  }
}

TEST(PackedUpdateCuda, RootsAndQuotientsWithoutBranchesAreCorrectlyRounded) {
  DeviceBuffer wrong(std::vector<unsigned long long>(2, 0));
  auto* const counts = reinterpret_cast<unsigned long long*>(wrong.data());
  count_wrong_roots<<<1024, 256>>>(counts);
  count_wrong_quotients<<<1024, 256>>>(counts + 1, uint64_t(1) << 31);
  testing::require(cudaDeviceSynchronize());
  EXPECT_EQ(wrong.host<unsigned long long>()[0], 0u) << "of all roots";
  EXPECT_EQ(wrong.host<unsigned long long>()[1], 0u) << "of 2^31 quotients";
}

}  // namespace
}  // namespace subbyte
