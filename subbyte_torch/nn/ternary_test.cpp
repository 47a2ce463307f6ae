#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "subbyte_torch/nn/ternary.h"

namespace {

using subbyte::nn::BitLinear;
using subbyte::nn::MultiTernaryLinear;
using subbyte::nn::TernaryLinearOptions;
using subbyte::nn::TernaryState;
using torch::Tensor;
namespace ops = subbyte::ops;

constexpr TernaryState kStates[] = {TernaryState::kLatent, TernaryState::kPacked, TernaryState::kFrozen};

TernaryLinearOptions in_state(TernaryState state, int64_t activation_bits = 8) {
  TernaryLinearOptions o(40, 6);
  o.state = state;
  o.activation_bits = activation_bits;
  return o;
}

TEST(Ternary, BitLinearIsItsFormulaInEveryState) {
  torch::manual_seed(1);
  torch::nn::Linear source(40, 6);
  const Tensor x = torch::randn({3, 40});
  for (const TernaryState state : kStates) {
    BitLinear layer = BitLinear::from_linear(source, in_state(state, 0));
    const Tensor t = layer->W_ternary(), gamma = layer->gamma();
    EXPECT_TRUE(torch::allclose(gamma, source->weight.abs().mean().expand({6}), 1e-6, 0));
    const Tensor wanted = torch::matmul(x, t.t().to(torch::kFloat)) * gamma + source->bias;
    EXPECT_TRUE(torch::allclose(layer->forward(x), wanted, 1e-5, 1e-5)) << int(state);
    EXPECT_EQ(layer->forward(x[0]).sizes(), torch::IntArrayRef({6}));
  }
}

TEST(Ternary, TermsBringTheLayerCloserToItsSource) {
  torch::manual_seed(2);
  torch::nn::Linear source(64, 8);
  const Tensor x = torch::randn({9, 64}), wanted = source->forward(x);
  double last = 1e30;
  for (int64_t terms = 1; terms <= 4; ++terms) {
    MultiTernaryLinear layer = MultiTernaryLinear::from_linear(source, terms, TernaryState::kFrozen, 0);
    EXPECT_EQ(layer->W_ternary().sizes(), torch::IntArrayRef({terms, 8, 64}));
    const double error = (layer->forward(x) - wanted).square().mean().item<double>();
    EXPECT_LT(error, last);
    last = error;
  }
  EXPECT_LT(last, 0.01);
}

TEST(Ternary, StatesChangeWithoutChangingTheOutputs) {
  torch::manual_seed(3);
  BitLinear layer(in_state(TernaryState::kLatent, 0));
  const Tensor x = torch::randn({3, 40}), before = layer->forward(x).detach();
  EXPECT_TRUE(layer->named_parameters().contains("weight"));
  EXPECT_THROW(layer->packed_weight(), c10::ValueError);
  layer->enter(TernaryState::kPacked);
  EXPECT_TRUE(torch::allclose(layer->forward(x), before, 1e-5, 1e-5));
  EXPECT_FALSE(layer->named_parameters().contains("weight"));
  EXPECT_TRUE(layer->named_buffers().contains("packed.codes"));
  layer->forward(x).sum().backward();
  EXPECT_TRUE(torch::allclose(layer->packed_weight().handle().grad(), x.sum(0).expand({6, 40}), 1e-5, 1e-5));
  layer->enter(TernaryState::kFrozen);
  EXPECT_TRUE(torch::allclose(layer->forward(x), before, 1e-5, 1e-5));
  layer->enter(TernaryState::kLatent);
  EXPECT_EQ(layer->weight.sizes(), torch::IntArrayRef({6, 40}));
  EXPECT_TRUE(layer->named_parameters().contains("weight"));
  EXPECT_FALSE(layer->named_buffers().contains("packed.codes"));
  EXPECT_TRUE(torch::equal(layer->weight.sign().to(torch::kChar), layer->W_ternary()));
}

TEST(Ternary, AFailedChangeOfStateLeavesTheModuleAsItWas) {
  BitLinear layer(in_state(TernaryState::kLatent, 4));
  EXPECT_THROW(layer->enter(TernaryState::kFrozen), c10::ValueError);
  EXPECT_TRUE(layer->options.state == TernaryState::kLatent);
  EXPECT_EQ(layer->forward(torch::randn({2, 40})).size(1), 6);
}

TEST(Ternary, SaveAndLoadGiveTheSameOutputsInEveryState) {
  torch::manual_seed(4);
  const Tensor x = torch::randn({3, 40});
  for (const TernaryState state : kStates) {
    BitLinear a(in_state(state)), b(in_state(state));
    ASSERT_FALSE(torch::equal(a->forward(x), b->forward(x)));
    std::stringstream file;
    torch::save(a, file);
    torch::load(b, file);
    EXPECT_TRUE(torch::equal(a->forward(x), b->forward(x))) << int(state);
    BitLinear other(in_state(state == TernaryState::kLatent ? TernaryState::kPacked : TernaryState::kLatent));
    std::stringstream again(file.str());
    EXPECT_THROW(torch::load(other, again), c10::Error);
  }
}

TEST(Ternary, CloneSharesNothing) {
  torch::manual_seed(5);
  const Tensor x = torch::randn({3, 40});
  for (const TernaryState state : kStates) {
    TernaryLinearOptions options = subbyte::nn::MultiTernaryLinearImpl::default_options(40, 6, 2);
    options.state = state;
    MultiTernaryLinear a(options);
    const Tensor before = a->forward(x).detach();
    const auto b = std::dynamic_pointer_cast<subbyte::nn::MultiTernaryLinearImpl>(a->clone());
    EXPECT_TRUE(torch::equal(b->forward(x), before)) << int(state);
    const torch::NoGradGuard no_grad;
    b->bias.add_(1);
    if (state == TernaryState::kLatent) b->weight.neg_();
    else b->packed_weight().encode_(torch::zeros({12, 40}));
    EXPECT_FALSE(torch::allclose(b->forward(x), before + 1, 1e-3, 1e-3)) << int(state);
    EXPECT_TRUE(torch::equal(a->forward(x), before)) << int(state);
  }
}

TEST(Ternary, PrintsWhatItIs) {
  std::ostringstream text;
  text << *BitLinear(in_state(TernaryState::kFrozen)) << "\n" << *MultiTernaryLinear(4, 3, 2);
  EXPECT_EQ(
      text.str(),
      "subbyte::nn::BitLinear(in_features=40, out_features=6, bias=true, state=frozen, method=absmean, per_channel=false, "
      "activation_bits=8)(\n  (packed): subbyte::nn::Linear(in_features=40, out_features=6, bias=false, format=ternary, "
      "group_size=40)\n)\n"
      "subbyte::nn::MultiTernaryLinear(in_features=4, out_features=3, terms=2, bias=true, state=latent, method=threshold, "
      "per_channel=true, activation_bits=8)");
}

TEST(Ternary, QuantizationAwareTrainingBringsTheLossDown) {
  torch::manual_seed(6);
  const Tensor x = torch::randn({128, 16}), y = torch::matmul(x, torch::randn({16, 4}));
  TernaryLinearOptions o(16, 64);
  torch::nn::Sequential model(BitLinear(o), torch::nn::ReLU(), torch::nn::Linear(64, 4));
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const Tensor loss = torch::mse_loss(model->forward(x), y);
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.1 * first);
}

TEST(Ternary, ConvertReplacesLayersOfSequentialsAndNamesTheOthers) {
  struct Net : torch::nn::Module {
    Net() {
      head = register_module("head", torch::nn::Linear(8, 2));
      body =
          register_module("body", torch::nn::Sequential(torch::nn::Linear(16, 8), torch::nn::ReLU(), torch::nn::Linear(8, 8)));
    }
    torch::nn::Linear head{nullptr};
    torch::nn::Sequential body{nullptr};
  } net;
  const subbyte::nn::QuantizeReport report =
      subbyte::nn::convert_linear_to_bitlinear(net, in_state(TernaryState::kFrozen), {"body.2"});
  EXPECT_EQ(report.replaced, (std::vector<std::string>{"body.0"}));
  EXPECT_EQ(report.out_of_reach, (std::vector<std::string>{"head"}));
  EXPECT_EQ(net.body->forward(torch::randn({3, 16})).size(1), 8);
  EXPECT_TRUE(net.named_buffers().contains("body.0.packed.codes"));
}

TEST(Ternary, OpsRefuseWhatDoesNotFit) {
  const Tensor x = torch::randn({2, 6}), t = torch::ones({4, 6}), gamma = torch::ones({4});
  EXPECT_THROW(ops::activation_quant(x, 1), c10::ValueError);
  EXPECT_THROW(ops::bitlinear(x, t, gamma.slice(0, 0, 3)), c10::ValueError);
  EXPECT_THROW(ops::ternary_decompose(t, 0), c10::ValueError);
  EXPECT_THROW(subbyte::pack_ternary(t * 2, gamma), c10::ValueError);
  EXPECT_THROW(ops::unpack_base3(torch::zeros({2}, torch::kByte), {5}), c10::ValueError);
  TernaryLinearOptions two(4, 4);
  two.terms = 2;
  EXPECT_THROW(BitLinear{two}, c10::ValueError);
  EXPECT_TRUE(torch::equal(ops::unpack_base3(ops::pack_base3(t), {4, 6}).to(torch::kFloat), t));
}

}  // namespace
