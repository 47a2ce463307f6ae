#include "subbyte_torch/nn/quantized.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::nn::QuantizedAttention;
using subbyte::nn::QuantizedAttentionOptions;
using subbyte::nn::QuantizedConv2d;
using subbyte::nn::QuantizedConv2dOptions;
using subbyte::nn::QuantizedLinear;
using subbyte::nn::QuantizedLinearOptions;
using subbyte::nn::QuantizedMatmul;
using subbyte::nn::StepOptions;
using torch::Tensor;

Tensor q(const Tensor& v, const Tensor& step, int bits = 4) {
  const double end = std::exp2(bits - 1);
  return (v.detach() / step.detach()).round().clamp(-end, end - 1);
}

QuantizedLinear small_linear(int64_t bits = 4) {
  QuantizedLinearOptions options(9, 5);
  options.bits = bits;
  options.bias = true;
  return QuantizedLinear(options);
}

TEST(Quantized, LinearIsTheFormulaAndEvaluationGivesItsBits) {
  torch::manual_seed(1);
  for (const int bits : {4, 8, 3}) {
    QuantizedLinear layer = small_linear(bits);
    const Tensor x = torch::randn({2, 3, 9}), y = layer->forward(x);
    const Tensor want = torch::matmul(q(x, layer->scale_a, bits), q(layer->weight, layer->scale_w, bits).t()) * layer->scale_a *
                            layer->scale_w +
                        layer->bias;
    EXPECT_TRUE(torch::equal(y, want));
    EXPECT_NEAR(layer->scale_a.item<float>(), 2 * x.abs().mean().item<float>() / std::sqrt(std::exp2(bits - 1) - 1), 1e-6);
    layer->eval();
    const torch::NoGradGuard no_grad;
    const Tensor weight = q(layer->weight, layer->scale_w, bits) * layer->scale_w;
    EXPECT_TRUE(torch::equal(layer->forward(x), y));
    EXPECT_TRUE(layer->packed());
    layer->generate_quantized_weight(/*qweight_only=*/true);
    EXPECT_FALSE(layer->weight.defined());
    EXPECT_TRUE(torch::equal(layer->forward(x), y));
    EXPECT_TRUE(torch::equal(layer->packed_weight().dequantize(), weight));
    layer->train();
    EXPECT_THROW(layer->forward(x), c10::Error);
  }
}

TEST(Quantized, X4_TheWeightThatTrainingLeftIsUsed) {
  torch::manual_seed(2);
  QuantizedLinear layer = small_linear();
  const Tensor x = torch::randn({6, 9});
  layer->forward(x);
  layer->eval();
  const torch::NoGradGuard no_grad;
  const Tensor before = layer->forward(x);
  layer->weight.neg_();
  const Tensor after = layer->forward(x);
  EXPECT_FALSE(torch::equal(after, before));
  layer->train();
  EXPECT_TRUE(torch::equal(layer->forward(x), after));
}

TEST(Quantized, X7_StepsComeFromTrainingAlone) {
  QuantizedLinear layer = small_linear();
  layer->eval();
  EXPECT_THROW(layer->forward(torch::randn({2, 9})), c10::Error);
  layer->train();
  layer->forward(torch::randn({0, 9}));
  EXPECT_FALSE(layer->activation_initialised());
  layer->forward(torch::ones({2, 9}));
  const float first = layer->scale_a.item<float>();
  layer->forward(torch::ones({2, 9}) * 10);
  EXPECT_EQ(layer->scale_a.item<float>(), first);
}

TEST(Quantized, SaveAndLoadKeepEveryForm) {
  torch::manual_seed(3);
  const Tensor x = torch::randn({4, 9});
  for (const bool deployed : {false, true}) {
    QuantizedLinear a = small_linear(), b = small_linear();
    a->forward(x);
    a->eval();
    if (deployed) a->generate_quantized_weight(true);
    const Tensor y = a->forward(x);
    std::stringstream file;
    torch::save(a, file);
    torch::load(b, file);
    b->eval();
    EXPECT_EQ(b->weight.defined(), !deployed);
    EXPECT_TRUE(b->activation_initialised());
    EXPECT_TRUE(torch::equal(b->forward(x), y));
    QuantizedLinear other = small_linear(3);
    if (deployed) {
      std::stringstream again(file.str());
      EXPECT_THROW(torch::load(other, again), c10::ValueError);
    }
  }
}

TEST(Quantized, CloneSharesNothing) {
  torch::manual_seed(4);
  const Tensor x = torch::randn({4, 9});
  for (const bool deployed : {false, true}) {
    QuantizedLinear a = small_linear();
    a->forward(x);
    a->eval();
    if (deployed) a->generate_quantized_weight(true);
    const Tensor y = a->forward(x);
    const auto b = std::dynamic_pointer_cast<subbyte::nn::QuantizedLinearImpl>(a->clone());
    EXPECT_TRUE(torch::equal(b->forward(x), y));
    const torch::NoGradGuard no_grad;
    b->scale_a.mul_(2);
    (deployed ? b->qweight : b->weight).zero_();
    EXPECT_FALSE(torch::equal(b->forward(x), y));
    EXPECT_TRUE(torch::equal(a->forward(x), y));
  }
}

TEST(Quantized, ConvertingTheTypeLeavesCodesBytes) {
  QuantizedLinear layer = small_linear();
  const Tensor x = torch::randn({4, 9});
  layer->forward(x);
  layer->eval();
  layer->generate_quantized_weight(true);
  torch::nn::Sequential model(layer);
  model->to(torch::kBFloat16);
  EXPECT_EQ(layer->qweight.scalar_type(), torch::kByte);
  EXPECT_EQ(layer->bias.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(layer->forward(x.to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
}

TEST(Quantized, ConvolutionIsAConvolutionAndGivesAllGradients) {
  torch::manual_seed(5);
  QuantizedConv2dOptions options(4, 6, {3, 2});
  options.groups = 2;
  options.stride = {2, 1};
  options.padding = {1, 0};
  options.bias = true;
  QuantizedConv2d layer(options);
  const Tensor x = torch::randn({2, 4, 7, 6}).requires_grad_();
  const Tensor y = layer->forward(x);
  const Tensor want = torch::conv2d(q(x, layer->scale_a), q(layer->weight, layer->scale_w), {}, {2, 1}, {1, 0}, 1, 2) *
                          layer->scale_a * layer->scale_w +
                      layer->bias.reshape({-1, 1, 1});
  EXPECT_TRUE(torch::equal(y, want));
  EXPECT_TRUE(torch::equal(layer->forward(x[0].detach()), y[0]));
  y.square().sum().backward();
  for (const auto& p : layer->named_parameters()) EXPECT_GT(p.value().grad().abs().max().item<float>(), 0) << p.key();
  EXPECT_TRUE(x.grad().defined());
  std::ostringstream text;
  text << *layer;
  EXPECT_EQ(text.str(),
            "subbyte::nn::QuantizedConv2d(4, 6, kernel_size=[3, 2], stride=[2, 1], padding=[1, 0], dilation=[1, 1], groups=2, "
            "bits=4, init=lsq, bias=true)");
}

TEST(Quantized, FromFloatCopiesTheLayer) {
  torch::manual_seed(6);
  StepOptions eight;
  eight.bits = 8;
  torch::nn::Linear linear(64, 16);
  const Tensor x = torch::randn({8, 64}), want = linear->forward(x);
  EXPECT_LT((QuantizedLinear::from_float(linear, eight)->forward(x) - want).norm().item<float>(),
            0.1 * want.norm().item<float>());
  torch::nn::Conv2d conv(torch::nn::Conv2dOptions(4, 6, 3).padding(1).groups(2).bias(false));
  const Tensor image = torch::randn({2, 4, 5, 5}), same = conv->forward(image);
  const Tensor got = QuantizedConv2d::from_float(conv, eight)->forward(image);
  EXPECT_LT((got - same).norm().item<float>(), 0.1 * same.norm().item<float>());
}

TEST(Quantized, AttentionTrainsAndSurvivesCloneAndSave) {
  torch::manual_seed(7);
  QuantizedAttention a(QuantizedAttentionOptions(16, 4));
  const Tensor x = torch::randn({2, 5, 16}), target = torch::randn({2, 5, 16}) * 0.1;
  torch::optim::Adam optimizer(a->parameters(), torch::optim::AdamOptions(1e-2));
  float first = 0, last = 0;
  for (int i = 0; i < 30; ++i) {
    const Tensor loss = (a->forward(x) - target).square().mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    (i == 0 ? first : last) = loss.item<float>();
  }
  EXPECT_LT(last, 0.5 * first);
  a->eval();
  const torch::NoGradGuard no_grad;
  const Tensor y = a->forward(x, {}, {}, {}, /*is_causal=*/true);
  const auto b = std::dynamic_pointer_cast<subbyte::nn::QuantizedAttentionImpl>(a->clone());
  EXPECT_TRUE(torch::equal(b->forward(x, {}, {}, torch::ones({5, 5}, torch::kBool).tril()), y));
  QuantizedAttention c(QuantizedAttentionOptions(16, 4));
  std::stringstream file;
  torch::save(a, file);
  torch::load(c, file);
  c->eval();
  EXPECT_TRUE(torch::equal(c->forward(x, {}, {}, {}, true), y));
}

TEST(Quantized, OptionsAreCheckedByName) {
  const auto message = [](auto make) -> std::string {
    try {
      make();
    } catch (const c10::ValueError& e) {
      return e.what_without_backtrace();
    }
    return "";
  };
  StepOptions bad;
  bad.bits = 9;
  EXPECT_NE(message([&] { QuantizedMatmul m(bad); }).find("QuantizedMatmul: bits is 9, expected 2 to 8"), std::string::npos);
  bad = StepOptions{};
  bad.init = "other";
  EXPECT_NE(message([&] { QuantizedMatmul m(bad); }).find("init is 'other'"), std::string::npos);
  EXPECT_NE(message([&] { QuantizedAttention a(QuantizedAttentionOptions(8, 3)); }).find("num_heads is 3"), std::string::npos);
  EXPECT_NE(message([&] { small_linear()->forward(torch::randn({2, 8})); }).find("in_features = 9"), std::string::npos);
}

}  // namespace
