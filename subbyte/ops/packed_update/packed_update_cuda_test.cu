#include "subbyte/formats/cuda_testing.h"
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

void compare(Random& r, const testing::MatrixCase& c, int i) {
  testing::TestMatrix matrix = testing::make_matrix(r, c);
  testing::TestStream stream;
  const auto rule = UpdateRule(i % 3);
  const bool adamw = rule == UpdateRule::kAdamW, stateless = !adamw && i % 5 == 0;
  const int residual_bits = i % 4 == 1 ? 1 + i / 4 % 8 : 0;
  BothMoments m(stateless ? MomentType::kNone : kTypes[i / 3 % 4], c.n, c.k, c.shift);
  BothMoments v(adamw ? kTypes[(i / 3 + i / 12) % 4] : MomentType::kNone, c.n, c.k, c.shift);
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
    p.grad_dtype = kGradTypes[i / 2 % 4];
    p.grad_stride = c.k + (i % 3 == 0 ? 2 : 0);
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
    compare(r, c, i++);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace subbyte
