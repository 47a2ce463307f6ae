// Weights with a residual plane, against the written grids in double: value = R (2 q + 1 - L) / L.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>
#include <utility>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using torch::Tensor;

struct Pair {
  const char* format;
  int residual_bits;
  double levels, c;
};
const Pair kPairs[] = {{"uint2", 6, 4, 2}, {"sign", 7, 2, 2}, {"ternary", 6, 3, 3},
                       {"uint2", 2, 4, 2}, {"sign", 3, 2, 2}, {"uint4", 4, 16, 3}};
constexpr int64_t kN = 9, kK = 70;

QuantizeOptions options(const Pair& pair, const char* scheme = "fan_in") {
  QuantizeOptions o;
  o.format = pair.format;
  o.group_size = 32;
  o.scheme = scheme;
  o.residual_bits = pair.residual_bits;
  return o;
}

Tensor values(uint64_t seed = 1) {
  torch::manual_seed(seed);
  return torch::randn({kN, kK}) / std::sqrt(double(kK));
}

Tensor fine_codes(const PackedWeight& w) {
  const std::string plane = w.residual_bits == 1 ? "sign" : "uint" + std::to_string(w.residual_bits);
  return subbyte::ops::unpack(w.codes, w.format, w.in_features).to(torch::kLong) * (1 << w.residual_bits) +
         subbyte::ops::unpack(w.residual, plane, w.in_features).to(torch::kLong);
}

TEST(Residual, CodesAndResidualLieOnNestedGridsAndRoundToTheNearestFineLevel) {
  const Tensor w = values();
  for (const Pair& pair : kPairs) {
    SCOPED_TRACE(std::string(pair.format) + " + " + std::to_string(pair.residual_bits));
    const PackedWeight packed = PackedWeight::quantize(w, options(pair));
    const double reach = pair.c / std::sqrt(double(kK)), fine_levels = pair.levels * (1 << pair.residual_bits);
    const Tensor q = fine_codes(packed), code = q.bitwise_right_shift(pair.residual_bits);
    EXPECT_LT(q.max().item<int64_t>(), int64_t(fine_levels));
    const Tensor coarse = (2 * code.to(torch::kDouble) + 1 - pair.levels) * (reach / pair.levels);
    const Tensor fine = (2 * q.to(torch::kDouble) + 1 - fine_levels) * (reach / fine_levels);
    EXPECT_TRUE(torch::allclose(packed.dequantize().to(torch::kDouble), coarse, 1e-6, 1e-7));
    EXPECT_TRUE(torch::allclose(packed.dequantize_fine().to(torch::kDouble), fine, 1e-6, 1e-7));
    const double step = 2 * reach / fine_levels, end = reach - step / 2;
    EXPECT_LE((w.to(torch::kDouble).clamp(-end, end) - fine).abs().max().item<double>(), step / 2 * (1 + 1e-3));
  }
}

TEST(Residual, TheDefaultSchemeIsMidRiseAndWrongNumbersAreRefused) {
  QuantizeOptions o;
  o.bits = 2;
  o.residual_bits = 6;
  const PackedWeight w = PackedWeight::quantize(values(), o);
  EXPECT_TRUE(torch::equal(w.zeros, torch::full_like(w.zeros, 1.5)));
  EXPECT_EQ(w.residual.size(1), 53);
  EXPECT_EQ(w.bytes(), w.codes.numel() + w.residual.numel() + 4 * (w.scales.numel() + w.zeros.numel()));
  for (const int bits : {7, -1, 9}) {
    o.residual_bits = bits;
    EXPECT_THROW(PackedWeight::quantize(values(), o), c10::ValueError) << bits;
  }
  o.residual_bits = 6;
  o.sym = true;
  EXPECT_FALSE(PackedWeight::quantize(values(), o).zeros.defined());
  o.scheme = "midrise";
  EXPECT_THROW(PackedWeight::quantize(values(), o), c10::ValueError);
}

TEST(Residual, ProductsReadTheCodesAloneAndDroppingChangesNoOutput) {
  const Tensor x = torch::randn({3, kK}), rows = torch::tensor({0, 5, 5});
  for (const Pair& pair : kPairs) {
    PackedWeight w = PackedWeight::quantize(values(), options(pair));
    const PackedWeight plain = w.drop_residual();
    EXPECT_FALSE(plain.residual.defined());
    EXPECT_TRUE(torch::equal(plain.dequantize_fine(), w.dequantize()));
    const Tensor y = subbyte::linear(x, w), e = subbyte::embedding(rows, w), y8 = subbyte::linear_a8(x, w);
    w.residual.random_(0, 256);
    for (const PackedWeight* other : {&std::as_const(w), &plain}) {
      EXPECT_TRUE(torch::equal(subbyte::linear(x, *other), y));
      EXPECT_TRUE(torch::equal(subbyte::linear_a8(x, *other), y8));
      EXPECT_TRUE(torch::equal(subbyte::embedding(rows, *other), e));
    }
  }
}

TEST(Residual, SmallUpdatesAccumulateAndCopiesAreWhole) {
  PackedWeight w = PackedWeight::quantize(torch::zeros({kN, kK}), options(kPairs[0]));
  const double level = w.scales[0][0].item<double>();
  const Tensor start = w.dequantize_fine(), codes = w.codes.clone();
  for (int i = 0; i < 50; ++i) w.apply_update_(torch::full({kN, kK}, level / 50), 3, i);
  const Tensor travelled = (w.dequantize_fine() - start) / level;
  // 50 roundings of at most half a fine level of deviation, 1 / 128 of a level.
  EXPECT_LT((travelled - 1).abs().max().item<double>(), 7 * std::sqrt(50.0) / 128);
  EXPECT_FALSE(torch::equal(w.codes, codes));
  const PackedWeight copy = w.clone();
  EXPECT_TRUE(torch::equal(copy.residual, w.residual));
  EXPECT_FALSE(copy.residual.is_alias_of(w.residual));
  EXPECT_TRUE(torch::equal(w.to(torch::kCPU).residual, w.residual));
}

subbyte::nn::Linear layer(const Pair& pair, int64_t in = kK, int64_t out = kN) {
  subbyte::nn::LinearOptions o(in, out);
  o.quantize = options(pair);
  return subbyte::nn::Linear(o);
}

TEST(Residual, ModulesSaveLoadAndCloneItAndRefuseAnother) {
  torch::manual_seed(4);
  subbyte::nn::Linear a = layer(kPairs[0]), b = layer(kPairs[0]);
  subbyte::nn::EmbeddingOptions table_options(kN, kK);
  table_options.quantize = options(kPairs[0], "midrise");
  subbyte::nn::Embedding table(table_options), other_table(table_options);
  std::stringstream file, table_file;
  torch::save(a, file);
  torch::load(b, file);
  EXPECT_TRUE(torch::equal(a->weight().residual, b->weight().residual));
  EXPECT_TRUE(torch::equal(a->weight().dequantize_fine(), b->weight().dequantize_fine()));
  torch::save(table, table_file);
  torch::load(other_table, table_file);
  EXPECT_TRUE(torch::equal(table->weight().residual, other_table->weight().residual));
  const auto cloned = std::dynamic_pointer_cast<subbyte::nn::LinearImpl>(a->clone());
  EXPECT_TRUE(torch::equal(cloned->weight().residual, a->weight().residual));
  EXPECT_FALSE(cloned->weight().residual.is_alias_of(a->weight().residual));
  for (const Pair& pair : {Pair{"uint2", 0, 4, 2}, Pair{"uint2", 5, 4, 2}}) {
    std::stringstream again(file.str());
    subbyte::nn::Linear other = layer(pair);
    const Tensor before = other->weight().codes.clone();
    EXPECT_THROW(torch::load(other, again), c10::ValueError) << pair.residual_bits;
    EXPECT_TRUE(torch::equal(other->weight().codes, before));
  }
  std::ostringstream text;
  text << *a;
  EXPECT_NE(text.str().find("residual_bits=6"), std::string::npos);
}

TEST(Residual, AModelIsPackedWithResidualsAndDeployedWithout) {
  torch::manual_seed(5);
  struct Tail : torch::nn::Module {
    Tail() {
      inner = register_module("inner", torch::nn::Sequential(torch::nn::ReLU(), torch::nn::Linear(24, 12)));
      fc = register_module("fc", layer(kPairs[0], 12, 4));
    }
    Tensor forward(const Tensor& x) { return fc->forward(inner->forward(x)); }
    torch::nn::Sequential inner{nullptr};
    subbyte::nn::Linear fc{nullptr};
  };
  torch::nn::Sequential net(torch::nn::Linear(20, 24), std::make_shared<Tail>());
  subbyte::nn::QuantizeModuleOptions o;
  o.quantize = options(kPairs[1]);
  ASSERT_EQ(subbyte::nn::quantize_(*net, o).replaced.size(), 2u);
  const Tensor x = torch::randn({3, 20}), before = net->forward(x);
  const subbyte::nn::QuantizeReport report = subbyte::nn::drop_residuals_(*net);
  EXPECT_EQ(report.replaced, (std::vector<std::string>{"0", "1.inner.1"}));
  EXPECT_EQ(report.out_of_reach, std::vector<std::string>{"1.fc"});
  EXPECT_TRUE(torch::equal(net->forward(x), before));
  int64_t with_residual = 0;
  for (const auto& buffer : net->named_buffers()) with_residual += buffer.key().find("residual") != std::string::npos;
  EXPECT_EQ(with_residual, 1);
  const auto first = std::dynamic_pointer_cast<subbyte::nn::LinearImpl>(net->children()[0]);
  ASSERT_NE(first, nullptr);
  EXPECT_TRUE(torch::equal(std::dynamic_pointer_cast<subbyte::nn::LinearImpl>(first->clone())->forward(x), first->forward(x)));
}

TEST(Residual, TheFirstStepOfEveryOptimizerIsTheOneOnTheFineValuesUpToOneFineLevel) {
  for (const Pair& pair : kPairs)
    for (const std::string name : {"PackedAdamW", "in backward", "DiodeMix"}) {
      SCOPED_TRACE(std::string(pair.format) + " + " + std::to_string(pair.residual_bits) + ", " + name);
      PackedWeight w = PackedWeight::quantize(values(), options(pair));
      w.handle();  // copies share it from now on
      const Tensor before = w.dequantize_fine(), x = values(3);
      const double lr = 0.003;
      auto loss = [&] { return (subbyte::linear(x, w) * torch::arange(kN * kN).view({kN, kN}).cos()).sum(); };
      Tensor gradient;
      if (name == "DiodeMix") {
        subbyte::optim::DiodeMix optimizer(std::vector<Tensor>{},
                                           subbyte::optim::DiodeMixOptions(lr).betas({0.9, 0.999}).eps(1e-8));
        optimizer.add_packed(w);
        loss().backward();
        gradient = w.handle().grad().clone();
        optimizer.step();
      } else {
        subbyte::optim::PackedAdamW optimizer({w}, {}, subbyte::optim::PackedAdamWOptions(lr).weight_decay(0).eps(1e-8));
        loss().backward();
        gradient = w.handle().grad().clone();
        if (name == "in backward") {
          w.handle().mutable_grad() = Tensor();
          optimizer.update_in_backward();
          loss().backward();
          EXPECT_FALSE(w.handle().grad().defined());
        }
        optimizer.step();
      }
      // The first step of Adam is lr g / (|g| + eps); that of DiodeMix adds eps to the uncorrected root, sqrt(1 - beta2) |g|.
      const double eps = name == "DiodeMix" ? 1e-8 / std::sqrt(0.001) : 1e-8;
      const double step = 2 * pair.c / std::sqrt(double(kK)) / (pair.levels * (1 << pair.residual_bits));
      const double end = step * (pair.levels * (1 << pair.residual_bits) - 1) / 2;
      const Tensor wanted = (before - lr * gradient / (gradient.abs() + eps)).clamp(-end, end);
      EXPECT_LE((w.dequantize_fine() - wanted).abs().max().item<double>(), step * 1.002);
      EXPECT_FALSE(torch::equal(w.dequantize_fine(), before));
    }
}

}  // namespace
