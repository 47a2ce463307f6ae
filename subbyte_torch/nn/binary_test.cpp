#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::nn::BinaryAttention;
using subbyte::nn::BinaryAttentionOptions;
using subbyte::nn::BinaryConv2d;
using subbyte::nn::BinaryConv2dImpl;
using subbyte::nn::BinaryConv2dOptions;
using subbyte::nn::BinaryLinear;
using subbyte::nn::BinaryLinearImpl;
using subbyte::nn::BinaryLinearOptions;
using torch::Tensor;
using Sizes = std::vector<int64_t>;

Tensor signs(const Tensor& v) { return torch::where(v >= 0, 1.0, -1.0).to(v.scalar_type()); }

TEST(BinaryModules, LinearComputesTheFormulaInTrainingInEvalAndPacked) {
  torch::manual_seed(1);
  BinaryLinearOptions o(37, 5);
  o.bias = true;
  BinaryLinear layer(o);
  layer->prepare_params();
  layer->initialize_scale(torch::randn({4, 37}));
  {
    const torch::NoGradGuard no_grad;
    layer->bias_a.normal_();
    layer->bias.normal_();
  }
  const Tensor x = torch::randn({2, 3, 37});
  const Tensor wanted =
      torch::matmul(signs(x + layer->bias_a), signs(layer->weight).t()) * layer->scale_a * layer->scale_w + layer->bias;
  EXPECT_TRUE(torch::equal(layer->forward(x), wanted));
  layer->eval();
  EXPECT_TRUE(torch::equal(layer->forward(x), wanted));
  layer->generate_quantized_weight(/*qweight_only=*/true);
  EXPECT_EQ(layer->weight.numel(), 0);
  EXPECT_TRUE(torch::equal(layer->forward(x), wanted));
}

TEST(BinaryModules, EvalSeesWeightsThatChangedAfterPacking) {
  BinaryLinear layer(16, 3);
  const Tensor x = torch::randn({4, 16});
  layer->eval();
  const Tensor before = layer->forward(x);
  {
    const torch::NoGradGuard no_grad;
    layer->weight.neg_();
  }
  EXPECT_TRUE(torch::equal(layer->forward(x), -before));
}

TEST(BinaryModules, SaveAndLoadKeepFloatAndPackedModules) {
  for (const bool packed : {false, true}) {
    BinaryLinear a(20, 4), b(20, 4);
    a->forward(torch::randn({8, 20}));  // sets the scale
    if (packed) a->generate_quantized_weight(true);
    std::stringstream file;
    torch::save(a, file);
    torch::load(b, file);
    a->eval();
    b->eval();
    const Tensor x = torch::randn({3, 20});
    EXPECT_TRUE(torch::equal(b->forward(x), a->forward(x)));
    EXPECT_EQ(b->has_float_weight(), !packed);
    b->train();
    const Tensor scale = b->scale_a.detach().clone();
    b->forward(x * 100);
    EXPECT_TRUE(torch::equal(b->scale_a, scale)) << "a loaded scale was initialised again";
    BinaryLinear other(21, 4);
    file.clear();
    file.seekg(0);
    EXPECT_THROW(torch::load(other, file), c10::ValueError);
  }
}

TEST(BinaryModules, CloneSharesNothing) {
  BinaryLinear a(16, 3);
  const auto b = std::dynamic_pointer_cast<BinaryLinearImpl>(a->clone());
  const Tensor x = torch::randn({4, 16});
  a->eval();
  b->eval();
  const Tensor before = a->forward(x).detach();
  EXPECT_TRUE(torch::equal(b->forward(x), before));
  {
    const torch::NoGradGuard no_grad;
    b->weight.neg_();
  }
  EXPECT_TRUE(torch::equal(b->forward(x), -before));
  EXPECT_TRUE(torch::equal(a->forward(x), before));
}

TEST(BinaryModules, Conv2dIsTheConvolutionOfSigns) {
  torch::manual_seed(2);
  torch::nn::Conv2d dense(torch::nn::Conv2dOptions(6, 4, {3, 2}).stride({2, 1}).padding({1, 2}).dilation({1, 2}).groups(2));
  const Tensor x = torch::randn({2, 6, 9, 8});
  for (const int pad_value : {-1, 0, 1}) {
    BinaryConv2d layer = BinaryConv2d::from_float(dense, pad_value);
    layer->eval();
    const Tensor padded = torch::constant_pad_nd(signs(x), {2, 2, 1, 1}, pad_value);
    const Tensor sums = torch::conv2d(padded, signs(layer->weight), {}, Sizes{2, 1}, Sizes{0, 0}, Sizes{1, 2}, 2);
    const Tensor wanted = sums * layer->scale_a * layer->scale_w + layer->bias.view({1, 4, 1, 1});
    EXPECT_TRUE(torch::equal(layer->forward(x), wanted)) << pad_value;
    const auto copy = std::dynamic_pointer_cast<BinaryConv2dImpl>(layer->clone());
    copy->generate_quantized_weight(true);
    EXPECT_TRUE(torch::equal(copy->forward(x), wanted));
  }
}

TEST(BinaryModules, AttentionMasksAndReturnsProbabilities) {
  torch::manual_seed(3);
  for (const bool binary_scores : {false, true}) {
    BinaryAttentionOptions o(12, 8, 2);
    o.binary_scores = binary_scores;
    BinaryAttention layer(o);
    layer->prepare_params();
    const Tensor x = torch::randn({2, 5, 12});
    auto [y, p] = layer->forward(x);
    y.sum().backward();
    EXPECT_TRUE(layer->q_linear->weight.grad().defined());
    layer->eval();
    Tensor mask = torch::ones({2, 1, 1, 5});
    mask.index_put_({0, 0, 0, 4}, 0);
    auto [masked, q] = layer->forward(x, mask);
    EXPECT_EQ(q[0].select(-1, 4).abs().max().item<float>(), 0.0f);
    EXPECT_TRUE(torch::allclose(q.sum(-1), torch::ones({2, 2, 5})));
    EXPECT_THROW(layer->forward(x, torch::ones({2, 5})), c10::ValueError);
    const auto copy = std::dynamic_pointer_cast<subbyte::nn::BinaryAttentionImpl>(layer->clone());
    EXPECT_TRUE(torch::equal(std::get<0>(copy->forward(x, mask)), masked));
  }
  EXPECT_THROW(BinaryAttention(BinaryAttentionOptions(12, 9, 2)), c10::ValueError);
}

TEST(BinaryModules, PrintWhatTheyAre) {
  std::ostringstream text;
  text << *BinaryLinear(8, 2);
  EXPECT_EQ(text.str(), "subbyte::nn::BinaryLinear(in_features=8, out_features=2, bias=false)");
  text.str("");
  text << *BinaryConv2d(BinaryConv2dOptions(8, 2, {3, 3}));
  EXPECT_EQ(text.str(),
            "subbyte::nn::BinaryConv2d(8, 2, kernel_size=[3, 3], stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1, "
            "pad_value=0, bias=false)");
}

TEST(BinaryModules, StraightThroughTrainingBringsTheLossDown) {
  torch::manual_seed(4);
  const Tensor x = torch::randn({256, 64}), target = signs(torch::matmul(signs(x), signs(torch::randn({64, 8}))) + 0.5);
  BinaryLinearOptions o(64, 8);
  BinaryLinear layer(o);
  layer->prepare_params();
  torch::optim::Adam optimizer(layer->parameters(), torch::optim::AdamOptions(1e-2));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const Tensor loss = torch::soft_margin_loss(layer->forward(x), target);
    loss.backward();
    optimizer.step();
    if (step == 0) first = loss.item<double>();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.6 * first);
}

}  // namespace
