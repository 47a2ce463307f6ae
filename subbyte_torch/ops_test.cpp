// The operations through the dispatcher, from C++: no Python in the process. The oracle is dense ATen in float64 on dequantized
// weights.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using torch::Tensor;

constexpr const char* kFormats[] = {"sign", "ternary", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"};

std::vector<torch::Device> devices() {
  std::vector<torch::Device> out{torch::kCPU};
  if (subbyte_torch_has_cuda() && torch::cuda::is_available()) out.emplace_back(torch::kCUDA, 0);
  return out;
}

Tensor randn(at::IntArrayRef sizes, int64_t seed, torch::Device device = torch::kCPU) {
  return torch::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(uint64_t(seed)), torch::kFloat).to(device);
}

PackedWeight packed(int64_t n, int64_t k, const std::string& format, int64_t group_size, const std::string& zero_kind,
                    bool perm, torch::Device device) {
  QuantizeOptions o;
  o.format = format;
  o.group_size = group_size;
  o.sym = zero_kind == "fixed";
  o.scheme = o.sym ? "absmax" : "";
  o.zero_kind = zero_kind;
  if (perm) o.perm = torch::arange(k - 1, -1, -1, torch::kInt).to(device);
  return PackedWeight::quantize(randn({n, k}, 7, device), o);
}

double eps_of(torch::ScalarType t) {
  return t == torch::kDouble ? 0x1p-53 : t == torch::kFloat ? 0x1p-24 : t == torch::kHalf ? 0x1p-11 : 0x1p-8;
}

// The bound of linear.h with |s (q - c)| + |o| taken as 4 max|w|, which it does not exceed on these weights. On CUDA, where a
// dense product may be the faster way, weights rounded to x's type come on top.
void expect_linear(const Tensor& y, const Tensor& x, const Tensor& w64, const std::string& what) {
  const double acc = x.scalar_type() == torch::kDouble ? 0x1p-53 : 0x1p-24;
  const Tensor y64 = torch::matmul(x.to(torch::kDouble), w64.t());
  const double largest = w64.numel() > 0 ? w64.abs().max().item<double>() : 0.0;
  const Tensor bound = acc * (double(x.size(-1)) / 8 + 16) * x.to(torch::kDouble).abs().sum(-1, true) * 4 * largest +
                       eps_of(x.scalar_type()) * y64.abs() + (x.scalar_type() == torch::kHalf ? 0x1p-24 : 0.0);
  const Tensor rounded =
      x.is_cuda() ? eps_of(x.scalar_type()) * torch::matmul(x.to(torch::kDouble).abs(), w64.abs().t()) : torch::zeros_like(y64);
  EXPECT_EQ(y.scalar_type(), x.scalar_type()) << what;
  EXPECT_TRUE(((y.to(torch::kDouble) - y64).abs() <= bound + rounded).all().item<bool>()) << what;
}

TEST(Ops, LinearKeepsItsBoundForEveryFormatShapeAndType) {
  for (const torch::Device device : devices())
    for (const char* format : kFormats)
      for (const std::string kind : {"fixed", "zeros", "offsets"})
        for (const auto& [n, k, group] :
             {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {5, 64, 16}, {17, 100, 32}, {64, 127, 128}}) {
          const PackedWeight w = packed(n, k, format, group, kind, k == 100, device);
          const Tensor w64 = w.dequantize(torch::kFloat).to(torch::kDouble);
          for (const torch::ScalarType type : {torch::kFloat, torch::kHalf, torch::kBFloat16, torch::kDouble})
            for (const int64_t m : {1, 2, 9}) {
              const Tensor x = randn({m, k}, m, device).to(type);
              const std::string what = std::string(format) + " " + kind + " M=" + std::to_string(m) + " K=" + std::to_string(k);
              expect_linear(subbyte::linear(x, w), x, w64, what);
              const Tensor gy = randn({m, n}, m + 1, device).to(type);
              expect_linear(
                  subbyte::ops::linear_grad_input(gy, w.codes, w.scales, w.zeros, w.offsets, w.perm, w.format, k, group), gy,
                  w64.t(), "gradient " + what);
            }
        }
}

TEST(Ops, LinearTakesLeadingDimensionsStridesAndNoRows) {
  for (const torch::Device device : devices()) {
    const PackedWeight w = packed(6, 20, "uint3", 8, "offsets", true, device);
    const Tensor x = randn({4, 3, 40}, 3, device);
    for (const Tensor& view :
         {x.slice(2, 0, 20), x.slice(2, 0, 40, 2), x.slice(2, 20).transpose(0, 1), x[0][0].slice(0, 5, 25)})
      EXPECT_TRUE(torch::equal(subbyte::linear(view, w), subbyte::linear(view.contiguous(), w)));
    EXPECT_EQ(subbyte::linear(torch::zeros({2, 0, 20}, device), w).sizes(), (std::vector<int64_t>{2, 0, 6}));
    const PackedWeight none = packed(6, 0, "uint4", 8, "offsets", false, device);
    const Tensor bias = randn({6}, 1, device);
    EXPECT_TRUE(torch::equal(subbyte::linear(torch::zeros({2, 0}, device), none, bias), bias.expand({2, 6})));
  }
}

// Central differences of f at `at`, in float64, against what autograd says of the sum of f times fixed numbers.
template <class F>
void expect_gradient(F f, const Tensor& start, const char* what) {
  const Tensor at = start.detach().clone().requires_grad_(true);
  const Tensor y = f(at);
  const Tensor direction = torch::linspace(-1, 1, y.numel(), y.options()).view_as(y);
  const Tensor gradient = torch::autograd::grad({(y * direction).sum()}, {at})[0];
  const double step = 1e-5;
  for (int64_t i = 0; i < at.numel(); ++i) {
    Tensor up = at.detach().clone(), down = up.clone();
    up.view(-1)[i] += step;
    down.view(-1)[i] -= step;
    const Tensor change = ((f(up) - f(down)) * direction).sum();
    const double slope = change.item<double>() / (2 * step);
    EXPECT_NEAR(gradient.view(-1)[i].item<double>(), slope, 1e-6 * (1 + std::fabs(slope))) << what << " element " << i;
  }
}

TEST(Ops, GradientsOfLinearMatchFiniteDifferences) {
  for (const torch::Device device : devices()) {
    const PackedWeight w = packed(4, 9, "uint4", 4, "zeros", true, device);
    const Tensor x = randn({2, 3, 9}, 1, device).to(torch::kDouble), bias = randn({4}, 2, device).to(torch::kDouble);
    expect_gradient([&](const Tensor& t) { return subbyte::linear(t, w, bias); }, x, "x");
    expect_gradient([&](const Tensor& t) { return subbyte::linear(x, w, t); }, bias, "bias");
    const Tensor gy = randn({2, 3, 4}, 5, device).to(torch::kDouble);
    expect_gradient([&](const Tensor& t) { return subbyte::ops::linear_grad_weight(t, x); }, gy, "gy of linear_grad_weight");
    expect_gradient([&](const Tensor& t) { return subbyte::ops::linear_grad_weight(gy, t); }, x, "x of linear_grad_weight");
  }
}

TEST(Ops, HandleReceivesTheDenseGradient) {
  for (const torch::Device device : devices()) {
    const PackedWeight w = packed(5, 30, "uint2", 16, "offsets", true, device);
    const Tensor dense = w.dequantize().detach().requires_grad_(true);
    const Tensor x = randn({7, 30}, 1, device), gy = randn({7, 5}, 2, device);
    subbyte::linear(x, w).backward(gy);
    torch::matmul(x, dense.t()).backward(gy);
    EXPECT_TRUE(torch::allclose(w.handle().grad(), dense.grad(), 1e-5, 1e-5));
    EXPECT_EQ(w.handle().storage().nbytes(), size_t(4));
    EXPECT_TRUE(w.handle().is_leaf());

    const Tensor indices = torch::tensor({1, 4, 1}, torch::TensorOptions(torch::kLong).device(device));
    PackedWeight table = w.clone();
    EXPECT_TRUE(torch::equal(subbyte::embedding(indices, table, 4), dense.detach().index_select(0, indices)));
    subbyte::embedding(indices, table, 4).sum().backward();
    const Tensor counts = torch::tensor({0.0f, 2.0f, 0.0f, 0.0f, 0.0f}).to(device);
    EXPECT_TRUE(torch::equal(table.handle().grad(), counts.unsqueeze(1).expand({5, 30})));
  }
}

TEST(Ops, LinearA8IsStraightThroughAndRoundsXToInt8) {
  for (const torch::Device device : devices()) {
    const PackedWeight w = packed(5, 40, "uint4", 16, "zeros", false, device), same = w.clone();
    const Tensor x = randn({3, 40}, 1, device).requires_grad_(true), x2 = x.detach().clone().requires_grad_(true);
    const Tensor a = x.detach().abs().amax(1, true);
    const Tensor xq = (x.detach() * (127.0 / a)).round() * (a / 127.0);
    const Tensor y = subbyte::linear_a8(x, w), wanted = torch::matmul(xq, w.dequantize().t());
    EXPECT_TRUE(torch::allclose(y, wanted, 1e-4, 1e-4));
    y.sum().backward();
    subbyte::linear(x2, same).sum().backward();
    EXPECT_TRUE(torch::equal(x.grad(), x2.grad()));
    EXPECT_TRUE(torch::equal(w.handle().grad(), same.handle().grad()));
  }
}

TEST(Ops, AutocastComputesInTheLowerPrecision) {
  for (const torch::Device device : devices()) {
    const PackedWeight w = packed(5, 40, "uint4", 16, "offsets", false, device);
    const Tensor x = randn({3, 40}, 1, device);
    at::autocast::set_autocast_enabled(device.type(), true);
    at::autocast::set_autocast_dtype(device.type(), torch::kBFloat16);
    const Tensor y = subbyte::linear(x, w, randn({5}, 2, device));
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device.type(), false);
    EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
    EXPECT_TRUE(torch::equal(y, subbyte::linear(x.to(torch::kBFloat16), w, randn({5}, 2, device).to(torch::kBFloat16))));
  }
}

TEST(Ops, MistakesOfTheCallerAreValueErrorsThatNameOpAndArgument) {
  const PackedWeight w = packed(4, 16, "uint4", 8, "offsets", false, torch::kCPU);
  auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const c10::ValueError& e) {
      return e.what_without_backtrace();
    }
    return "no ValueError";
  };
  EXPECT_NE(message([&] {
              subbyte::linear(torch::zeros({2, 15}), w);
            }).find("linear: x has 15 features, the weight expects 16"),
            std::string::npos);
  EXPECT_NE(message([&] {
              subbyte::linear(torch::zeros({2, 16}), w, torch::zeros({5}));
            }).find("linear: bias"),
            std::string::npos);
  PackedWeight bad = w;
  bad.perm = torch::full({16}, 16, torch::kInt);
  EXPECT_NE(message([&] { subbyte::linear(torch::zeros({2, 16}), bad); }).find("perm"), std::string::npos);
  bad = w;
  bad.format = "uint9";
  EXPECT_NE(message([&] { subbyte::linear(torch::zeros({2, 16}), bad); }).find("format 'uint9' is unknown"), std::string::npos);
  EXPECT_THROW(subbyte::embedding(torch::tensor({4}, torch::kLong), w), c10::IndexError);
  if (devices().size() > 1) {
    EXPECT_NE(message([&] {
                subbyte::linear(torch::zeros({2, 16}), w.to(torch::kCUDA));
              }).find("linear: codes is on cuda:0, x is on cpu"),
              std::string::npos);
  }
}

TEST(Ops, LibraryKnowsWhatItWasBuiltWith) {
  EXPECT_STREQ(subbyte_torch_built_with(), TORCH_VERSION);
  EXPECT_NE(std::string(subbyte_version()).find('.'), std::string::npos);
}

}  // namespace
