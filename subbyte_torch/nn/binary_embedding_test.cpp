#include "subbyte_torch/nn/binary_embedding.h"

#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <cmath>
#include <functional>
#include <limits>
#include <sstream>

namespace subbyte::nn {
namespace {

torch::Tensor values_of(const PackedWeight& w) { return w.dequantize(torch::kFloat); }

TEST(BinaryEmbedding, ValuesAreSignsTimesTheMeanMagnitudeAndThePaddingRowIsZero) {
  torch::manual_seed(1);
  torch::nn::Embedding dense(torch::nn::EmbeddingOptions(7, 13).padding_idx(2));
  BinaryEmbedding table = BinaryEmbedding::from_float(dense);
  const torch::Tensor w = dense->weight.detach() - dense->weight.detach().mean();
  torch::Tensor want = w.ge(0).to(torch::kFloat).mul(2).sub(1) * w.abs().mean(1, true);
  want[2].zero_();
  const torch::Tensor indices = torch::tensor({{3, 2, 0}, {6, 6, 1}});
  const torch::Tensor y = table->forward(indices);
  EXPECT_EQ(y.sizes(), (torch::IntArrayRef{2, 3, 13}));
  EXPECT_TRUE(torch::allclose(y.detach(), want.index_select(0, indices.flatten()).view({2, 3, 13})));
  y.sum().backward();
  EXPECT_EQ(table->grad().layout(), torch::kSparse);
  EXPECT_TRUE(torch::equal(table->grad().coalesce().indices()[0], torch::tensor({0, 1, 3, 6})));
}

TEST(BinaryEmbedding, DescentSetsEveryTouchedBitAgainstItsGradientAndNoOther) {
  BinaryEmbedding table(9, 20);
  const torch::Tensor before = values_of(table->weight());
  const torch::Tensor indices = torch::tensor({4, 1, 4}), g = torch::randn({3, 20});
  (table->forward(indices) * g).sum().backward();
  table->update_({"descent"});
  const torch::Tensor after = values_of(table->weight());
  torch::Tensor want = before.clone();
  want[1] = -g[1].sign() * before[1].abs();
  want[4] = -(g[0] + g[2]).sign() * before[4].abs();
  EXPECT_TRUE(torch::equal(after, want));
  EXPECT_FALSE(table->grad().defined());
  EXPECT_EQ(table->momentum.size(), 0);
}

TEST(BinaryEmbedding, MomentumKeepsStateForTouchedRowsAloneAndFlipsAfterSteadyGradients) {
  BinaryEmbedding table(1000, 16);
  const torch::Tensor before = values_of(table->weight());
  int steps = 0;
  for (; steps < 100 && torch::equal(values_of(table->weight()), before); ++steps) {
    (table->forward(torch::tensor({700, 3})) * before.index_select(0, torch::tensor({700, 3})).sign()).sum().backward();
    table->update_({"momentum", 1.0, 0.9, steps});
  }
  EXPECT_GT(steps, 2);  // ln(1.5) / 0.1 = 4 steps, blurred by the rounding
  EXPECT_LT(steps, 8);
  EXPECT_EQ(table->momentum.size(), 2);
  (table->forward(torch::tensor({5, 3, 900})).sum()).backward();
  table->update_();
  EXPECT_TRUE(torch::equal(table->momentum.rows, torch::tensor({3, 5, 700, 900})));
}

TEST(BinaryEmbedding, ArchivesAndClonesHoldTheTable) {
  BinaryEmbeddingOptions options(11, 9);
  options.padding_idx = 4;
  BinaryEmbedding table(options), other(options);
  std::stringstream stream;
  torch::save(table, stream);
  torch::load(other, stream);
  EXPECT_TRUE(torch::equal(values_of(table->weight()), values_of(other->weight())));
  const auto copy = std::dynamic_pointer_cast<BinaryEmbeddingImpl>(table->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_TRUE(torch::equal(values_of(copy->weight()), values_of(table->weight())));
  copy->forward(torch::tensor({1, 2})).sum().backward();
  copy->update_({"descent"});
  EXPECT_FALSE(torch::equal(values_of(copy->weight()), values_of(table->weight())));
  EXPECT_TRUE(torch::equal(values_of(other->weight()), values_of(table->weight())));
  std::ostringstream text;
  text << *table;
  EXPECT_EQ(text.str(), "subbyte::nn::BinaryEmbedding(num_embeddings=11, embedding_dim=9, padding_idx=4, gradient=sparse)");
}

TEST(BinaryEmbedding, TrainedScalesGetTheSumOfGradientsTimesSigns) {
  BinaryEmbeddingOptions options(11, 9);
  options.padding_idx = 4;
  options.train_scale = true;
  for (const bool sparse : {true, false}) {
    options.sparse = sparse;
    BinaryEmbedding table(options);
    const torch::Tensor scale = table->scale();
    ASSERT_EQ(table->parameters().size(), 1u);
    EXPECT_TRUE(table->parameters()[0].is_same(scale) && scale.requires_grad());
    EXPECT_EQ(scale[4].item<float>(), 0);
    const torch::Tensor signs = values_of(table->weight()), indices = torch::tensor({{3, 4}, {3, 0}}),
                        g = torch::randn({2, 2, 9});
    const torch::Tensor y = table->forward(indices);
    EXPECT_TRUE(torch::equal(signs.abs(), torch::ones({11, 9})));
    EXPECT_TRUE(torch::allclose(y[1][1], signs[0] * scale[0]));
    y.backward(g);
    const torch::Tensor dscale = scale.grad().is_sparse() ? scale.grad().to_dense() : scale.grad();
    const torch::Tensor dweight = sparse ? table->grad().to_dense() : table->grad();
    torch::Tensor want_scale = torch::zeros({11, 1}), want_weight = torch::zeros({11, 9});
    want_scale[3] = ((g[0][0] + g[1][0]) * signs[3]).sum();
    want_scale[0] = (g[1][1] * signs[0]).sum();
    want_weight[3] = (g[0][0] + g[1][0]) * scale[3].detach();
    want_weight[0] = g[1][1] * scale[0].detach();
    EXPECT_TRUE(torch::allclose(dscale, want_scale, 1e-5, 1e-5));
    EXPECT_TRUE(torch::allclose(dweight, want_weight, 1e-5, 1e-5));
    // Copies and archives hold both; a copy is its own.
    const auto copy = std::dynamic_pointer_cast<BinaryEmbeddingImpl>(table->clone());
    EXPECT_TRUE(torch::equal(copy->forward(indices), y) && !copy->scale().is_same(scale));
    BinaryEmbedding other(options);
    std::stringstream stream;
    torch::save(table, stream);
    torch::load(other, stream);
    EXPECT_TRUE(torch::equal(other->forward(indices), y));
    table->reset_parameters(torch::arange(99, torch::kFloat).view({11, 9}));
    EXPECT_TRUE(table->scale().is_same(scale));
    EXPECT_TRUE(torch::allclose(scale[0].detach(), torch::tensor({45.0f})));  // mean |w - 49| over 0 .. 8
    table->reset();
    EXPECT_TRUE(table->scale().is_same(scale) && torch::equal(values_of(table->weight()).abs(), torch::ones({11, 9})));
  }
}

TEST(BinaryEmbedding, EveryStepRoundsItsAveragesByOtherRandomBits) {
  // A step of 0.4 units of int8: the same random bits at every step would move some elements always and others never.
  torch::manual_seed(4);
  BinaryEmbedding table(1, 512);
  const torch::Tensor signs = values_of(table->weight()).sign(), first = torch::zeros({1}, torch::kLong);
  for (int step = 0; step < 40; ++step) {
    (table->forward(first) * signs).sum().backward();
    BinaryUpdate update;
    update.lr = 1;
    update.beta = 1 - 0.4 / 127;
    table->update_(update);
  }
  // 40 steps of 0.4 / 127 of the way from -64 to 127 are 22.6 +- sqrt(40 * 0.245) = 3.1 for every element.
  const torch::Tensor moved = (table->momentum.momentum[0].to(torch::kFloat) * signs[0] + 64);
  EXPECT_GT(moved.min().item<float>(), 22.6 - 6 * 3.1);
  EXPECT_LT(moved.max().item<float>(), 22.6 + 6 * 3.1);
  EXPECT_GT(moved.std().item<float>(), 1);
  // With a seed of its own a step can be repeated.
  BinaryEmbedding copy{std::dynamic_pointer_cast<BinaryEmbeddingImpl>(table->clone())};
  copy->momentum = table->momentum;
  copy->momentum.momentum = table->momentum.momentum.clone();
  for (BinaryEmbedding& t : {std::ref(table), std::ref(copy)}) {
    t->forward(first).sum().backward();
    BinaryUpdate update;
    update.beta = 0.9;
    update.seed = 5;
    t->update_(update);
  }
  EXPECT_TRUE(torch::equal(table->momentum.momentum, copy->momentum.momentum));
}

TEST(BinaryEmbedding, ElementsWithoutAFiniteGradientStay) {
  BinaryEmbedding table(3, 4);
  const torch::Tensor before = values_of(table->weight());
  torch::Tensor g = -before.sign()[1].view({1, 4});  // descent would keep every bit
  g.neg_();
  const float nan = std::nanf(""), infinite = std::numeric_limits<float>::infinity();
  g[0][0] = nan;
  g[0][1] = infinite;
  g[0][2] = 0;
  table->forward(torch::tensor({1})).backward(g);
  table->update_({"descent"});
  torch::Tensor want = before.clone();
  want[1][3] = -want[1][3];
  EXPECT_TRUE(torch::equal(values_of(table->weight()), want));
}

TEST(BinaryEmbedding, WrongArgumentsAreValueErrors) {
  BinaryEmbeddingOptions options(3, 4);
  options.padding_idx = 3;
  EXPECT_THROW(BinaryEmbedding{options}, c10::ValueError);
  options.padding_idx = -1;
  options.mode = "max";
  EXPECT_THROW(BinaryEmbeddingBag{options}, c10::ValueError);
  BinaryEmbedding table(3, 4);
  EXPECT_THROW(table->reset_parameters(torch::zeros({3, 5})), c10::ValueError);
  EXPECT_THROW(table->reset_parameters(torch::full({3, 4}, std::nan(""))), c10::ValueError);
  options.mode = "sum";
  options.train_scale = true;
  EXPECT_THROW(BinaryEmbeddingBag{options}, c10::ValueError);
  EXPECT_THROW(table->forward(torch::tensor({3})), c10::IndexError);
}

TEST(BinaryEmbeddingBag, MajoritiesTrainAClassifierOfBags) {
  // The class is the half of the vocabulary that most of a bag comes from.
  torch::manual_seed(3);
  BinaryEmbeddingBag bag(40, 32);
  torch::nn::Linear head(32, 2);
  torch::optim::Adam optimizer(head->parameters(), torch::optim::AdamOptions(0.01));
  auto batch = [&] {
    const torch::Tensor label = torch::randint(0, 2, {64});
    const torch::Tensor stray = torch::rand({64, 7}).lt(0.25).to(torch::kLong);
    return std::pair(label, torch::randint(0, 20, {64, 7}) + 20 * (label.unsqueeze(1) - stray).abs());
  };
  double first = 0, last = 0;
  for (int step = 0; step < 150; ++step) {
    const auto [label, indices] = batch();
    const torch::Tensor loss = torch::nn::functional::cross_entropy(head->forward(bag->forward(indices)), label);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    bag->update_({"momentum", 1.0, 0.9, step});
    (step < 10 ? first : last) += step < 10 || step >= 140 ? loss.item<double>() / 10 : 0;
  }
  EXPECT_LT(last, 0.6 * first) << first << " -> " << last;
  std::ostringstream text;
  text << *bag;
  EXPECT_EQ(text.str(), "subbyte::nn::BinaryEmbeddingBag(num_embeddings=40, embedding_dim=32, gradient=sparse, mode=majority)");
}

}  // namespace
}  // namespace subbyte::nn
