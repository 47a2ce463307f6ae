#include "subbyte_torch/optim/packed_optimizer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using subbyte::optim::packed_weights;
using subbyte::optim::PackedAdamW;
using subbyte::optim::PackedAdamWOptions;
using subbyte::optim::PackedLion;
using subbyte::optim::PackedLionOptions;
using subbyte::optim::PackedSGD;
using subbyte::optim::PackedSGDOptions;
using torch::Tensor;

struct Net : torch::nn::Module {
  explicit Net(uint64_t seed = 1) {
    torch::manual_seed(seed);
    subbyte::nn::LinearOptions first(16, 300);
    first.quantize.group_size = 8;
    subbyte::nn::MPQLinearOptions second(300, 4);
    second.group_size = 20;
    second.bias = true;
    a = register_module("a", subbyte::nn::Linear(first));
    b = register_module("b", subbyte::nn::MPQLinear(second));
  }
  Tensor forward(const Tensor& x) { return b->forward(torch::relu(a->forward(x))); }
  subbyte::nn::Linear a{nullptr};
  subbyte::nn::MPQLinear b{nullptr};
};

std::pair<Tensor, Tensor> data() {
  torch::manual_seed(5);
  const Tensor x = torch::randn({128, 16});
  return {x, torch::tanh(x.matmul(torch::randn({16, 4})) / 2)};
}

double loss_of(Net& net) {
  const auto [x, y] = data();
  const torch::NoGradGuard no_grad;
  return torch::mse_loss(net.forward(x), y).item<double>();
}

void train(Net& net, torch::optim::Optimizer& optimizer, int steps) {
  const auto [x, y] = data();
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    torch::mse_loss(net.forward(x), y).backward();
    optimizer.step();
  }
}

bool same(Net& p, Net& q) {
  return torch::equal(p.a->weight().codes, q.a->weight().codes) && torch::equal(p.b->weight().codes, q.b->weight().codes) &&
         torch::equal(p.a->bias, q.a->bias);
}

PackedSGDOptions sgd(double lr, const std::string& moment = "8bit") {
  PackedSGDOptions options(lr);
  return options.momentum(0.9).moment(moment);
}

template <class Optimizer, class Options>
void check_loss_falls(Options options, double share) {
  for (const char* moment : {"float32", "bfloat16", "8bit", "4bit"}) {
    Net net;
    const double before = loss_of(net);
    Optimizer optimizer(packed_weights(net), net.parameters(), Options(options).moment(moment));
    EXPECT_EQ(optimizer.parameters().size(), 2u + net.parameters().size());
    train(net, optimizer, 60);
    EXPECT_LT(loss_of(net), share * before) << moment;
  }
}

TEST(PackedSGD, TheLossFallsWithEveryMomentType) { check_loss_falls<PackedSGD>(sgd(0.1), 0.15); }
TEST(PackedLion, TheLossFallsWithEveryMomentType) { check_loss_falls<PackedLion>(PackedLionOptions(3e-3), 0.15); }

template <class Optimizer, class Options>
void check_saved_optimizer_goes_on(Options options) {
  Net net;
  Optimizer optimizer(packed_weights(net), net.parameters(), options);
  train(net, optimizer, 3);
  std::stringstream model_file, optimizer_file;
  torch::serialize::OutputArchive archive;
  net.save(archive);
  archive.save_to(model_file);
  torch::save(optimizer, optimizer_file);
  train(net, optimizer, 3);
  Net other(9);
  torch::serialize::InputArchive input;
  input.load_from(model_file);
  other.load(input);
  Optimizer resumed(packed_weights(other), other.parameters(), Options(1.0));
  torch::load(resumed, optimizer_file);
  EXPECT_EQ(resumed.defaults().get_lr(), 1.0);
  EXPECT_EQ(resumed.param_groups()[0].options().get_lr(), options.lr());
  train(other, resumed, 3);
  EXPECT_TRUE(same(net, other));
}

TEST(PackedSGD, ASavedOptimizerGoesOnBitForBit) { check_saved_optimizer_goes_on<PackedSGD>(sgd(0.1, "4bit").dampening(0.5)); }
TEST(PackedLion, ASavedOptimizerGoesOnBitForBit) {
  check_saved_optimizer_goes_on<PackedLion>(PackedLionOptions(1e-3).betas({0.8, 0.95}).weight_decay(0.1).threshold(1e-5));
}

template <class Optimizer, class Options>
void check_update_in_backward(Options options) {
  Net ordinary, fused;
  Optimizer a(packed_weights(ordinary), ordinary.parameters(), options), b(packed_weights(fused), fused.parameters(), options);
  ASSERT_TRUE(same(ordinary, fused));
  train(ordinary, a, 4);
  b.update_in_backward();
  const auto [x, y] = data();
  for (int i = 0; i < 4; ++i) {
    torch::mse_loss(fused.forward(x), y).backward();
    EXPECT_FALSE(fused.a->grad().defined() || fused.b->grad().defined() || fused.a->bias.grad().defined());
    b.step();
  }
  EXPECT_TRUE(same(ordinary, fused));
  EXPECT_EQ(a.state_bytes(), b.state_bytes());
}

TEST(PackedSGD, UpdateInBackwardHasTheBitsOfTheOrdinaryMode) { check_update_in_backward<PackedSGD>(sgd(0.1)); }
TEST(PackedLion, UpdateInBackwardHasTheBitsOfTheOrdinaryMode) { check_update_in_backward<PackedLion>(PackedLionOptions(1e-3)); }

// What the optimizer does to codes is its operation with seed and (position << 40 | step), which Python's optimizers pass too.
TEST(PackedSGD, CodesAreThoseOfTheOperation) {
  torch::manual_seed(3);
  const Tensor dense = torch::randn({6, 40}), g1 = torch::randn({6, 40}), g2 = torch::randn({6, 40});
  PackedWeight ours = PackedWeight::quantize(dense), theirs = ours.clone();
  ours.handle();  // the optimizer holds a copy, which shares the handle that exists
  const Tensor ordinary = torch::zeros({3}).requires_grad_();
  PackedSGD optimizer({{{}, {ordinary}, std::nullopt}, {{ours}, {}, std::nullopt}},
                      sgd(0.3, "float32").dampening(0.25).weight_decay(0.1).seed(7));
  const Tensor m = torch::zeros({6, 40});
  for (int64_t step : {1, 2}) {
    ours.handle().mutable_grad() = step == 1 ? g1 : g2;
    optimizer.step();
    subbyte::ops::packed_sgd_(theirs.codes, theirs.scales, std::nullopt, theirs.offsets, std::nullopt, theirs.format, 40,
                              theirs.group_size, step == 1 ? g1 : g2, m, std::nullopt, 0.3, 0.9, step == 1 ? 0.0 : 0.25, false,
                              0.1, 7, int64_t(1) << 40 | step, false, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                              0);
    EXPECT_TRUE(torch::equal(ours.codes, theirs.codes)) << step;
  }
  EXPECT_EQ(optimizer.state_bytes(), 6 * 40 * 4);
}

TEST(PackedLion, CodesAreThoseOfTheOperation) {
  torch::manual_seed(3);
  const Tensor dense = torch::randn({6, 40}), g = torch::randn({6, 40});
  PackedWeight ours = PackedWeight::quantize(dense), theirs = ours.clone();
  ours.handle();
  PackedLion optimizer({ours}, {}, PackedLionOptions(0.05).threshold(0.02).weight_decay(0.1).moment("float32").seed(2));
  const Tensor m = torch::zeros({6, 40});
  for (int64_t step : {1, 2}) {
    ours.handle().mutable_grad() = g;
    optimizer.step();
    subbyte::ops::packed_sign_(theirs.codes, theirs.scales, std::nullopt, theirs.offsets, std::nullopt, theirs.format, 40,
                               theirs.group_size, g, m, std::nullopt, 0.05, 0.9, 0.99, 0.02, 0.1, 2, step, false, std::nullopt,
                               std::nullopt, std::nullopt, std::nullopt, 0);
    EXPECT_TRUE(torch::equal(ours.codes, theirs.codes)) << step;
  }
}

TEST(PackedSGD, OrdinaryParametersFollowTorchsSGD) {
  for (const bool nesterov : {false, true})
    for (const double momentum : {0.0, 0.9}) {
      if (nesterov && momentum == 0) continue;
      torch::manual_seed(2);
      const double dampening = nesterov ? 0.0 : 0.3;
      const Tensor p = torch::randn({5, 3}).requires_grad_(), q = p.detach().clone().requires_grad_();
      PackedSGD ours({}, {p},
                     PackedSGDOptions(1e-2).momentum(momentum).dampening(dampening).nesterov(nesterov).weight_decay(0.1));
      torch::optim::SGD theirs(
          {q}, torch::optim::SGDOptions(1e-2).momentum(momentum).dampening(dampening).nesterov(nesterov).weight_decay(0.1));
      for (int i = 0; i < 5; ++i) {
        const Tensor g = torch::randn({5, 3});
        p.mutable_grad() = g.clone();
        q.mutable_grad() = g.clone();
        ours.step();
        theirs.step();
        EXPECT_TRUE(torch::equal(p.grad(), g));
      }
      EXPECT_TRUE(torch::allclose(p, q, 1e-6, 1e-7)) << nesterov << momentum;
    }
}

TEST(PackedLion, OrdinaryParametersFollowTheFormula) {
  torch::manual_seed(2);
  const Tensor p = torch::randn({7}, torch::kDouble).requires_grad_();
  PackedLion optimizer({}, {p}, PackedLionOptions(0.1).betas({0.5, 0.75}).weight_decay(0.2).threshold(0.3).maximize(true));
  std::vector<double> w(7), m(7, 0.0);
  for (int i = 0; i < 7; ++i) w[size_t(i)] = p[i].item<double>();
  for (int step = 0; step < 4; ++step) {
    const Tensor g = torch::randn({7}, torch::kDouble);
    p.mutable_grad() = g.clone();
    optimizer.step();
    for (size_t i = 0; i < 7; ++i) {
      const double gradient = -g[int64_t(i)].item<double>(), c = 0.5 * m[i] + 0.5 * gradient;
      m[i] = 0.75 * m[i] + 0.25 * gradient;
      w[i] *= 1 - 0.1 * 0.2;
      if (std::abs(c) > 0.3) w[i] -= c > 0 ? 0.1 : -0.1;
      EXPECT_NEAR(p[int64_t(i)].item<double>(), w[i], 1e-14);
    }
  }
}

TEST(PackedOptimizers, PackedWeightsFindsEveryLayerThatHoldsOne) {
  torch::nn::Sequential model(subbyte::nn::Embedding(5, 8), subbyte::nn::Linear(8, 8),
                              subbyte::nn::MPQLinear(subbyte::nn::MPQLinearOptions(8, 8)));
  subbyte::nn::TernaryLinearOptions ternary(8, 8);
  ternary.state = subbyte::nn::TernaryState::kPacked;
  model->push_back(subbyte::nn::BitLinear(ternary));
  EXPECT_EQ(packed_weights(*model).size(), 4u);
  const subbyte::nn::MPQLinear layer{subbyte::nn::MPQLinearOptions(8, 8)};
  ASSERT_EQ(packed_weights(*layer).size(), 1u);
  EXPECT_TRUE(packed_weights(*layer)[0].handle().is_same(layer->handle()));
}

TEST(PackedOptimizers, SparseGradientsOfTablesAreRefusedByName) {
  subbyte::nn::EmbeddingOptions options(5, 8);
  options.sparse = true;
  subbyte::nn::Embedding table(options);
  PackedAdamW optimizer(packed_weights(*table), {});
  table->forward(torch::tensor({1, 3})).sum().backward();
  EXPECT_THROW(optimizer.step(), c10::Error);
}

TEST(PackedOptimizers, WrongOptionsAreRefused) {
  const auto p = [] { return std::vector<Tensor>{torch::zeros({1})}; };
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions(-1.0)), c10::ValueError);
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions(std::nan(""))), c10::ValueError);
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions().momentum(-0.1)), c10::ValueError);
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions().nesterov(true)), c10::ValueError);
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions().nesterov(true).momentum(0.9).dampening(0.1)), c10::ValueError);
  EXPECT_THROW(PackedSGD({}, p(), PackedSGDOptions().moment("2bit")), c10::ValueError);
  EXPECT_THROW(PackedLion({}, p(), PackedLionOptions().betas({1.0, 0.9})), c10::ValueError);
  EXPECT_THROW(PackedLion({}, p(), PackedLionOptions().threshold(-1)), c10::ValueError);
  EXPECT_THROW(PackedLion({{{}, p(), PackedLionOptions().weight_decay(-1)}}, PackedLionOptions()), c10::ValueError);
}

}  // namespace
