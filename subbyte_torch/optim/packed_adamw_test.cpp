#include "subbyte_torch/optim/packed_adamw.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using subbyte::optim::packed_weights;
using subbyte::optim::PackedAdamW;
using subbyte::optim::PackedAdamWOptions;
using torch::Tensor;

struct Net : torch::nn::Module {
  explicit Net(int bits, uint64_t seed = 1) {
    torch::manual_seed(seed);
    subbyte::nn::LinearOptions first(16, 300), second(300, 4);
    first.quantize.bits = second.quantize.bits = bits;
    first.quantize.group_size = second.quantize.group_size = 20;
    a = register_module("a", subbyte::nn::Linear(first));
    b = register_module("b", subbyte::nn::Linear(second));
  }
  Tensor forward(const Tensor& x) { return b->forward(torch::relu(a->forward(x))); }
  subbyte::nn::Linear a{nullptr}, b{nullptr};
};

std::pair<Tensor, Tensor> data() {
  torch::manual_seed(5);
  const Tensor x = torch::randn({128, 16});
  return {x, torch::tanh(x.matmul(torch::randn({16, 4})) / 2)};
}

double train(Net& net, torch::optim::Optimizer& optimizer, int steps) {
  const auto [x, y] = data();
  double last = 0;
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    const Tensor loss = torch::mse_loss(net.forward(x), y);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
  }
  return last;
}

bool same(Net& p, Net& q) {
  return torch::equal(p.a->weight().codes, q.a->weight().codes) && torch::equal(p.b->weight().codes, q.b->weight().codes) &&
         torch::equal(p.a->bias, q.a->bias) && torch::equal(p.b->bias, q.b->bias);
}

TEST(PackedAdamW, TheLossFallsWithEveryMomentType) {
  for (const char* moment : {"float32", "bfloat16", "8bit", "4bit"}) {
    Net net(4);
    const auto [x, y] = data();
    const double before = torch::mse_loss(net.forward(x), y).item<double>();
    PackedAdamW optimizer(packed_weights(net), net.parameters(),
                          PackedAdamWOptions(1e-2).first_moment(moment).second_moment(moment));
    EXPECT_EQ(optimizer.parameters().size(), 4u);
    EXPECT_LT(train(net, optimizer, 60), 0.5 * before) << moment;
  }
}

TEST(PackedAdamW, OrdinaryParametersFollowTorchsAdamW) {
  torch::manual_seed(2);
  const Tensor p = torch::randn({5, 3}).requires_grad_(), q = p.detach().clone().requires_grad_();
  PackedAdamW ours({}, {p}, PackedAdamWOptions(1e-2).weight_decay(0.1));
  torch::optim::AdamW theirs({q}, torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  for (int i = 0; i < 5; ++i) {
    const Tensor g = torch::randn({5, 3});
    p.mutable_grad() = g.clone();
    q.mutable_grad() = g.clone();
    ours.step();
    theirs.step();
  }
  EXPECT_TRUE(torch::allclose(p, q, 1e-6, 1e-7));
}

TEST(PackedAdamW, ASavedOptimizerGoesOnBitForBit) {
  Net net(4);
  PackedAdamW optimizer(packed_weights(net), net.parameters(), 1e-2);
  train(net, optimizer, 3);
  std::stringstream model_file, optimizer_file;
  torch::serialize::OutputArchive archive;
  net.save(archive);
  archive.save_to(model_file);
  torch::save(optimizer, optimizer_file);
  train(net, optimizer, 3);
  Net other(4, 9);
  torch::serialize::InputArchive input;
  input.load_from(model_file);
  other.load(input);
  PackedAdamW resumed(packed_weights(other), other.parameters(), 1.0);
  torch::load(resumed, optimizer_file);
  train(other, resumed, 3);
  EXPECT_TRUE(same(net, other));
}

TEST(PackedAdamW, UpdateInBackwardHasTheBitsOfTheOrdinaryModeAndFreesGradients) {
  Net ordinary(3), fused(3);
  PackedAdamW a(packed_weights(ordinary), ordinary.parameters(), 1e-2), b(packed_weights(fused), fused.parameters(), 1e-2);
  ASSERT_TRUE(same(ordinary, fused));
  train(ordinary, a, 4);
  b.update_in_backward();
  EXPECT_THROW(b.update_in_backward(), c10::Error);
  const auto [x, y] = data();
  for (int i = 0; i < 4; ++i) {
    torch::mse_loss(fused.forward(x), y).backward();
    EXPECT_FALSE(fused.a->grad().defined() || fused.b->grad().defined() || fused.a->bias.grad().defined());
    b.step();
  }
  EXPECT_TRUE(same(ordinary, fused));
  b.end_update_in_backward();
  torch::mse_loss(fused.forward(x), y).backward();
  EXPECT_TRUE(fused.a->grad().defined());
}

TEST(PackedAdamW, GroupsRatesClosuresAndFactorsWork) {
  Net net(4), plain(4);
  PackedAdamW optimizer({{{(net.a->handle(), net.a->weight())}, {}, PackedAdamWOptions(0.0)},
                         {{(net.b->handle(), net.b->weight())}, {net.b->bias}, std::nullopt}},
                        1e-2);
  const Tensor before_a = net.a->weight().codes.clone(), before_b = net.b->weight().codes.clone();
  const auto [x, y] = data();
  const Tensor loss = optimizer.step([&, x = x, y = y] {
    optimizer.zero_grad();
    Tensor l = torch::mse_loss(net.forward(x), y);
    l.backward();
    return l;
  });
  EXPECT_GT(loss.item<double>(), 0);
  EXPECT_TRUE(torch::equal(net.a->weight().codes, before_a));
  EXPECT_FALSE(torch::equal(net.b->weight().codes, before_b));
  optimizer.param_groups()[0].options().set_lr(1e-2);
  EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 1e-2);
  // A factor of 1/4 on four times the gradient.
  Net scaled(4);
  PackedAdamW first(packed_weights(plain), plain.parameters(), 1e-2), second(packed_weights(scaled), scaled.parameters(), 1e-2);
  train(plain, first, 1);
  (torch::mse_loss(scaled.forward(x), y) * 4).backward();
  second.step_with_factor(torch::tensor({0.25f}));
  EXPECT_TRUE(same(plain, scaled));
}

TEST(PackedAdamW, WrongOptionsAreRefused) {
  EXPECT_THROW(PackedAdamW({}, {torch::zeros({1})}, PackedAdamWOptions(-1.0)), c10::ValueError);
  EXPECT_THROW(PackedAdamW({}, {torch::zeros({1})}, PackedAdamWOptions().first_moment("7bit")), c10::ValueError);
  EXPECT_THROW(PackedAdamW({}, {torch::zeros({1})}, PackedAdamWOptions().betas({0.9, 1.0})), c10::ValueError);
}

}  // namespace
