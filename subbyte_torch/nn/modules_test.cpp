#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using torch::Tensor;

QuantizeOptions bits(int b, int64_t group_size = 16) {
  QuantizeOptions o;
  o.bits = b;
  o.group_size = group_size;
  return o;
}

TEST(Modules, LinearFromFloatComputesWithTheDequantizedWeight) {
  torch::manual_seed(1);
  torch::nn::Linear dense(40, 6);
  const Tensor x = torch::randn({3, 40});
  for (const int b : {1, 2, 3, 4, 8}) {
    subbyte::nn::Linear packed = subbyte::nn::Linear::from_float(dense, bits(b));
    const Tensor wanted = torch::nn::functional::linear(x, packed->weight().dequantize(), dense->bias);
    EXPECT_TRUE(torch::allclose(packed->forward(x), wanted, 1e-4, 1e-4)) << b;
  }
  EXPECT_TRUE(torch::allclose(subbyte::nn::Linear::from_float(dense, bits(8))->forward(x), dense->forward(x), 0.05, 0.05));
}

TEST(Modules, LinearPrintsWhatItIs) {
  subbyte::nn::LinearOptions o(40, 6);
  o.quantize.bits = 3;
  o.activation_bits = 8;
  std::ostringstream text;
  text << *subbyte::nn::Linear(o);
  EXPECT_EQ(text.str(),
            "subbyte::nn::Linear(in_features=40, out_features=6, bias=true, format=uint3, group_size=64, activation_bits=8)");
}

TEST(Modules, SaveAndLoadGiveTheSameOutputs) {
  torch::manual_seed(2);
  torch::nn::Sequential a(subbyte::nn::Embedding(subbyte::nn::EmbeddingOptions(10, 24)), subbyte::nn::Linear(24, 5));
  torch::nn::Sequential b(subbyte::nn::Embedding(subbyte::nn::EmbeddingOptions(10, 24)), subbyte::nn::Linear(24, 5));
  const Tensor indices = torch::arange(10);
  ASSERT_FALSE(torch::equal(a->forward(indices), b->forward(indices)));
  std::stringstream file;
  torch::save(a, file);
  torch::load(b, file);
  EXPECT_TRUE(torch::equal(a->forward(indices), b->forward(indices)));
}

TEST(Modules, LoadRefusesAnotherFormatAndLeavesTheModuleAlone) {
  subbyte::nn::LinearOptions four(32, 4), three(32, 4);
  three.quantize.bits = 3;
  subbyte::nn::Linear a(four), b(three);
  const Tensor before = b->weight().codes.clone();
  std::stringstream file;
  torch::save(a, file);
  EXPECT_THROW(torch::load(b, file), c10::ValueError);
  EXPECT_TRUE(torch::equal(b->weight().codes, before));
}

TEST(Modules, CloneSharesNothing) {
  subbyte::nn::Linear a(32, 4);
  const auto b = std::dynamic_pointer_cast<subbyte::nn::LinearImpl>(a->clone());
  const Tensor x = torch::randn({2, 32}), before = a->forward(x).detach();
  EXPECT_TRUE(torch::equal(b->forward(x), before));
  b->weight().encode_(torch::randn({4, 32}));
  EXPECT_FALSE(torch::equal(b->forward(x), before));
  EXPECT_TRUE(torch::equal(a->forward(x), before));
  b->forward(x).sum().backward();
  EXPECT_TRUE(b->grad().defined());
  EXPECT_FALSE(a->grad().defined());
}

TEST(Modules, ConvertingTheTypeLeavesCodesBytes) {
  subbyte::nn::Linear a(32, 4);
  const Tensor codes = a->weight().codes.clone();
  a->to(torch::kBFloat16);
  EXPECT_EQ(a->weight().scales.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(a->bias.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::equal(a->weight().codes, codes));
  EXPECT_EQ(a->forward(torch::randn({2, 32}).to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
  if (subbyte_torch_has_cuda() && torch::cuda::is_available()) {
    a->to(torch::kCUDA);
    EXPECT_TRUE(a->forward(torch::randn({2, 32}).to(torch::kCUDA, torch::kBFloat16)).is_cuda());
    EXPECT_TRUE(a->handle().is_cuda());
  }
}

TEST(Modules, StochasticUpdatesOfALowBitModelBringTheLossDown) {
  torch::manual_seed(3);
  const Tensor x = torch::randn({256, 32});
  const Tensor y = torch::matmul(x, torch::randn({32, 4}) / 6);
  subbyte::nn::LinearOptions o(32, 4);
  o.quantize.bits = 4;
  subbyte::nn::Linear model(o);
  // Scales wide enough for the target.
  model->weight().scales.fill_(0.1);
  model->weight().offsets.fill_(-0.75);
  model->weight().encode_(torch::zeros({4, 32}));
  double first = 0, last = 0;
  for (int step = 0; step < 150; ++step) {
    model->zero_grad();
    const Tensor loss = torch::mse_loss(model->forward(x), y);
    loss.backward();
    model->weight().apply_update_(model->grad() * -0.05, /*seed=*/1, /*offset=*/step);
    if (step == 0) first = loss.item<double>();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.3 * first);
}

TEST(Modules, QuantizeReplacesLayersOfSequentialsAndNamesTheOthers) {
  struct Net : torch::nn::Module {
    Net() {
      head = register_module("head", torch::nn::Linear(8, 2));
      body =
          register_module("body", torch::nn::Sequential(torch::nn::Linear(16, 8), torch::nn::ReLU(), torch::nn::Linear(8, 8)));
    }
    torch::nn::Linear head{nullptr};
    torch::nn::Sequential body{nullptr};
  } net;
  const Tensor x = torch::randn({3, 16}), before = net.body->forward(x);
  subbyte::nn::QuantizeModuleOptions o;
  o.quantize.bits = 8;
  const subbyte::nn::QuantizeReport report = subbyte::nn::quantize_(net, o);
  EXPECT_EQ(report.replaced, (std::vector<std::string>{"body.0", "body.2"}));
  EXPECT_EQ(report.out_of_reach, (std::vector<std::string>{"head"}));
  EXPECT_TRUE(torch::allclose(net.body->forward(x), before, 0.05, 0.05));
  EXPECT_TRUE(net.named_buffers().contains("body.0.codes"));
  EXPECT_FALSE(net.named_parameters().contains("body.0.weight"));
}

TEST(Modules, EmbeddingPaddingRowGetsNoGradient) {
  torch::nn::Embedding dense(torch::nn::EmbeddingOptions(6, 8).padding_idx(2));
  subbyte::nn::Embedding packed = subbyte::nn::Embedding::from_float(dense, bits(8));
  packed->forward(torch::tensor({1, 2, 2}, torch::kLong)).sum().backward();
  EXPECT_EQ(packed->grad()[2].abs().sum().item<float>(), 0.0f);
  EXPECT_EQ(packed->grad()[1].sum().item<float>(), 8.0f);
}

TEST(Modules, BagsOfAnyWidthEqualTorchsOnTheDequantizedTable) {
  torch::manual_seed(6);
  const Tensor indices = torch::tensor({3, 4, 29, 3, 0, 4, 4}), offsets = torch::tensor({0, 3, 3, 5});
  for (const int b : {1, 3, 8})
    for (const bool sparse : {false, true})
      for (const bool mean : {false, true}) {
        torch::nn::EmbeddingBagOptions o(30, 20);
        o.padding_idx(4).sparse(sparse);
        if (mean) o.mode(torch::kMean);
        else o.mode(torch::kSum);
        torch::nn::EmbeddingBag dense(o);
        subbyte::nn::EmbeddingBag bag = subbyte::nn::EmbeddingBag::from_float(dense, bits(b, 10));
        dense->weight.set_data(bag->weight().dequantize());
        const Tensor y = bag->forward(indices, offsets), wanted = dense->forward(indices, offsets), g = torch::randn({4, 20});
        EXPECT_TRUE(torch::allclose(y, wanted, 1e-5, 1e-6)) << b << sparse << mean;
        y.backward(g);
        wanted.backward(g);
        ASSERT_EQ(bag->grad().is_sparse(), sparse);
        const auto values = [&](const Tensor& t) { return sparse ? t.to_dense() : t; };
        EXPECT_TRUE(torch::allclose(values(bag->grad()), values(dense->weight.grad()), 1e-5, 1e-6)) << b << sparse << mean;
        if (!mean) {
          const Tensor rows = indices.slice(0, 0, 6).view({2, 3}), weights = torch::rand({2, 3});
          EXPECT_TRUE(torch::allclose(bag->forward(rows, {}, weights), dense->forward(rows, {}, weights), 1e-5, 1e-6));
        }
      }
  EXPECT_THROW(subbyte::nn::EmbeddingBag(30, 20)->forward(torch::tensor({{30}})), c10::IndexError);
  subbyte::nn::EmbeddingBagOptions wrong(3, 4);
  wrong.mode = "max";
  EXPECT_THROW(subbyte::nn::EmbeddingBag{wrong}, c10::ValueError);
  using torch::nn::EmbeddingBagOptions;
  for (const auto& o : {EmbeddingBagOptions(3, 4).mode(torch::kMax), EmbeddingBagOptions(3, 4).max_norm(1.0),
                        EmbeddingBagOptions(3, 4).include_last_offset(true).mode(torch::kSum),
                        EmbeddingBagOptions(3, 4).scale_grad_by_freq(true).mode(torch::kSum)})
    EXPECT_THROW(subbyte::nn::EmbeddingBag::from_float(torch::nn::EmbeddingBag(o)), c10::ValueError);
  EXPECT_THROW(
      subbyte::nn::Embedding::from_float(torch::nn::Embedding(torch::nn::EmbeddingOptions(3, 4).scale_grad_by_freq(true))),
      c10::ValueError);
}

TEST(Modules, SparseTablesHaveGradientsOfTheRowsThatWereLookedUp) {
  torch::nn::Sequential model(torch::nn::Embedding(torch::nn::EmbeddingOptions(40, 16).sparse(true)),
                              torch::nn::Embedding(torch::nn::EmbeddingOptions(40, 16)),
                              torch::nn::EmbeddingBag(torch::nn::EmbeddingBagOptions(40, 16).sparse(true).mode(torch::kSum)));
  subbyte::nn::QuantizeModuleOptions options;
  options.quantize = bits(4);
  options.embeddings = true;
  EXPECT_EQ(subbyte::nn::quantize_(*model, options).replaced, (std::vector<std::string>{"0", "1", "2"}));
  auto& table = model->at<subbyte::nn::EmbeddingImpl>(0);
  auto& bag = model->at<subbyte::nn::EmbeddingBagImpl>(2);
  EXPECT_FALSE(model->at<subbyte::nn::EmbeddingImpl>(1).options.sparse);
  for (const Tensor& y : {table.forward(torch::tensor({7, 3, 7})), bag.forward(torch::tensor({{7, 3, 7}}))}) y.sum().backward();
  for (const Tensor& g : {table.grad(), bag.grad()}) {
    ASSERT_TRUE(g.is_sparse());
    EXPECT_TRUE(torch::equal(g.coalesce().indices()[0], torch::tensor({3, 7})));
  }
}

}  // namespace
