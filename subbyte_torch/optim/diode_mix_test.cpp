#include "subbyte_torch/optim/diode_mix.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

#include "subbyte_torch/nn/linear.h"
#include "subbyte_torch/optim/moments.h"

namespace {

using subbyte::PackedWeight;
using subbyte::QuantizeOptions;
using subbyte::optim::DiodeMix;
using subbyte::optim::DiodeMixOptions;
using subbyte::optim::GaLoreProjector;
using subbyte::optim::loaded_moment;
using subbyte::optim::stored_moment;
using torch::Tensor;

PackedWeight packed(const Tensor& w, const std::string& format) {
  QuantizeOptions o;
  o.format = format;
  o.group_size = 16;
  return PackedWeight::quantize(w, o);
}

void set_grad(const Tensor& parameter, const Tensor& gradient) { parameter.mutable_grad() = gradient.clone(); }

TEST(DiodeMix, OrdinaryRuleIsItsFormulaOverSeveralSteps) {
  torch::manual_seed(1);
  for (const bool correct_bias : {true, false}) {
    const Tensor start = torch::randn({3, 5}, torch::kDouble);
    Tensor p = start.clone().requires_grad_();
    DiodeMix optimizer({p}, DiodeMixOptions(0.01).betas({0.9, 0.99}).eps(1e-3).weight_decay(0.3).correct_bias(correct_bias));
    Tensor w = start.clone(), m = torch::zeros_like(w), v = torch::zeros_like(w);
    for (int t = 1; t <= 5; ++t) {
      const Tensor g = torch::randn({3, 5}, torch::kDouble);
      set_grad(p, g);
      optimizer.step();
      m = 0.9 * m + 0.1 * g;
      v = 0.99 * v + 0.01 * g * g;
      const double eta = correct_bias ? 0.01 * std::sqrt(1 - std::pow(0.99, t)) / (1 - std::pow(0.9, t)) : 0.01;
      w = w - eta * m / (v.sqrt() + 1e-3);
      w = w - 0.01 * 0.3 * w;
    }
    EXPECT_TRUE(torch::allclose(p, w, 1e-12, 1e-14)) << correct_bias;
  }
}

TEST(DiodeMix, BinaryWeightsFlipAgainstTheirGradientAndKeepTheirMagnitude) {
  torch::manual_seed(2);
  const Tensor source = torch::randn({4, 21});
  PackedWeight weight = packed(source, "sign");
  Tensor plain = source.clone();
  plain[0][0] = 0;
  plain.requires_grad_();
  DiodeMix optimizer({plain}, DiodeMixOptions(0.5).betas({0.0, 0.5}).binary(true));
  optimizer.add_packed(weight);
  const Tensor g = torch::randn({4, 21}), magnitude = weight.dequantize().abs();
  set_grad(plain, g);
  set_grad(weight.handle(), g);
  optimizer.step();  // half of lr outweighs the start of s, so every weight goes against its gradient
  EXPECT_TRUE(torch::equal(weight.dequantize().sign(), -g.sign()));
  EXPECT_TRUE(torch::equal(weight.dequantize().abs(), magnitude));
  const Tensor moved = plain.detach();
  EXPECT_TRUE(torch::equal(torch::where(moved.ge(0), 1.0, -1.0), torch::where(g.lt(0), 1.0, -1.0)));
  EXPECT_TRUE(torch::allclose(moved.abs(), source.abs().masked_fill(torch::arange(84).view({4, 21}).eq(0), 0), 0, 1e-29));
}

TEST(DiodeMix, O1BinaryTablesMoveTheRowsOfASparseGradientAlone) {
  torch::manual_seed(3);
  PackedWeight table = packed(torch::randn({6, 10}), "sign");
  DiodeMix optimizer(std::vector<Tensor>{}, DiodeMixOptions(0.5).betas({0.9, 0.2}));
  optimizer.add_packed(table);
  const Tensor before = table.dequantize(), values = torch::randn({2, 10});
  table.handle().mutable_grad() = torch::sparse_coo_tensor(torch::tensor({{4, 1}}), values, {6, 10});
  optimizer.step();
  const Tensor after = table.dequantize();
  EXPECT_TRUE(torch::equal(after[4].sign(), -values[0].sign()));
  EXPECT_TRUE(torch::equal(after[1].sign(), -values[1].sign()));
  for (const int64_t row : {0, 2, 3, 5}) EXPECT_TRUE(torch::equal(after[row], before[row])) << row;
  Tensor plain = torch::ones({6, 10}).requires_grad_();
  plain.mutable_grad() = table.handle().grad();
  EXPECT_THROW(DiodeMix({plain}).step(), c10::Error);
}

TEST(DiodeMix, BrokenGradientElementsChangeNeitherWeightNorState) {
  torch::manual_seed(9);
  for (const float value : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    for (const char* format : {"sign", "ternary", "uint4", "uint8"}) {
      PackedWeight weight = packed(torch::randn({4, 30}), format);
      DiodeMix optimizer(std::vector<Tensor>{}, DiodeMixOptions(0.5).betas({0.5, 0.5}).weight_decay(0.1));
      optimizer.add_packed(weight);
      const Tensor before = weight.dequantize();
      Tensor g = torch::randn({4, 30});
      g[1].fill_(value);
      set_grad(weight.handle(), g);
      optimizer.step();
      optimizer.step();
      const Tensor after = weight.dequantize();
      EXPECT_TRUE(torch::equal(after[1], before[1])) << format << value;
      EXPECT_FALSE(torch::equal(after[0], before[0])) << format << value;
      EXPECT_TRUE(after.isfinite().all().item<bool>()) << format << value;
    }
    PackedWeight table = packed(torch::randn({6, 10}), "sign");
    DiodeMix optimizer(std::vector<Tensor>{}, DiodeMixOptions(1e3).betas({0.5, 0.5}));
    optimizer.add_packed(table);
    const Tensor before = table.codes.clone();
    table.handle().mutable_grad() = torch::sparse_coo_tensor(torch::tensor({{4, 1}}), torch::full({2, 10}, value), {6, 10});
    optimizer.step();
    EXPECT_TRUE(torch::equal(table.codes, before)) << value;
  }
}

TEST(DiodeMix, TrainsAModelOfPackedAndOrdinaryWeights) {
  torch::manual_seed(4);
  const Tensor x = torch::randn({128, 32}), y = torch::matmul(x, torch::randn({32, 4})) / 6;
  subbyte::nn::LinearOptions o(32, 4);
  o.quantize.bits = 8;
  subbyte::nn::Linear layer(o);
  layer->weight().scales.fill_(0.01);
  layer->weight().offsets.fill_(-1.28);
  layer->weight().encode_(torch::zeros({4, 32}));
  DiodeMix optimizer(layer->parameters(), DiodeMixOptions(0.01).betas({0.9, 0.99}));
  optimizer.add_packed(layer->weight());
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    const Tensor loss = optimizer.step([&] {
      layer->zero_grad();
      const Tensor l = torch::mse_loss(layer->forward(x), y);
      l.backward();
      return l;
    });
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.1 * first);
}

TEST(DiodeMix, O4StateAndOptionsSerialiseAndTrainingGoesOnAsBefore) {
  torch::manual_seed(5);
  const Tensor start = torch::randn({8, 4});
  std::vector<Tensor> grads;
  for (int i = 0; i < 6; ++i) grads.push_back(torch::randn({8, 4}));
  auto run = [&](DiodeMix& optimizer, const Tensor& p, PackedWeight& w, int from, int to) {
    for (int i = from; i < to; ++i) {
      set_grad(p, grads[size_t(i)]);
      set_grad(w.handle(), grads[size_t(i)]);
      optimizer.step();
    }
  };
  auto options = [] {
    return DiodeMixOptions(0.05).betas({0.8, 0.9}).stochastic(false).rank(2).update_proj_gap(4).scale(0.5).proj_type("full");
  };
  Tensor a = start.clone().requires_grad_();
  PackedWeight wa = packed(start, "uint8");
  DiodeMix first({a}, options());
  first.add_packed(wa);
  run(first, a, wa, 0, 3);
  std::stringstream file;
  torch::save(first, file);

  Tensor b = a.detach().clone().requires_grad_();
  PackedWeight wb = wa.clone();
  DiodeMix second({b}, DiodeMixOptions(9.0));
  second.add_packed(wb);
  torch::load(second, file);
  run(first, a, wa, 3, 6);
  run(second, b, wb, 3, 6);
  EXPECT_TRUE(torch::equal(a, b));
  EXPECT_TRUE(torch::equal(wa.codes, wb.codes));
  EXPECT_FALSE(torch::allclose(a, start));
}

TEST(DiodeMix, O5StateOfFewBitsTrainsAndIsSmall) {
  for (const int64_t bits : {32, 16, 8}) {
    torch::manual_seed(8);
    const Tensor x = torch::randn({256, 64}), target = torch::randn({4, 64}).sign();
    const Tensor y = x.matmul(target.t()) / 8;
    PackedWeight weight = packed(torch::randn({4, 64}), "sign");
    weight.scales.fill_(0.25);  // values -1/8 and 1/8
    PackedWeight table = packed(torch::randn({1000, 64}), "sign");
    const Tensor dense = torch::randn({4, 64}).mul_(0.2).requires_grad_();
    DiodeMix optimizer({dense}, DiodeMixOptions(1e-2).betas({0.9, 0.95}).state_bits(bits));
    optimizer.add_packed(weight);
    optimizer.add_packed(table);
    double first = 0, last = 0;
    for (int step = 0; step < 150; ++step) {
      const Tensor loss = optimizer.step([&] {
        optimizer.zero_grad();
        const Tensor l = torch::mse_loss(subbyte::linear(x, weight), y) + torch::mse_loss(x.matmul(dense.t()), y);
        l.backward();
        table.handle().mutable_grad() = torch::sparse_coo_tensor(torch::tensor({{7}}), torch::ones({1, 64}), {1000, 64});
        return l;
      });
      (step == 0 ? first : last) = loss.item<double>();
    }
    EXPECT_LT(last, 0.05 * first) << bits;
    EXPECT_TRUE(table.dequantize()[7].lt(0).all().item<bool>()) << bits;
    int64_t bytes = 0, elements = 0;
    for (const auto& [key, slot] : optimizer.state()) {
      const auto& state = static_cast<const subbyte::optim::DiodeMixParamState&>(*slot);
      for (const Tensor& t : {state.exp_avg_l(), state.exp_avg_s(), state.exp_avg_l_absmax(), state.exp_avg_s_absmax()})
        if (t.defined()) bytes += int64_t(t.nbytes());
      elements += (state.exp_avg_l().defined() ? state.exp_avg_l().numel() : 0) + state.exp_avg_s().numel();
    }
    EXPECT_GE(bytes, elements * bits / 8);
    EXPECT_LT(double(bytes), 1.03 * double(elements * bits) / 8) << bits;
    std::stringstream file;
    torch::save(optimizer, file);
    DiodeMix other({dense}, DiodeMixOptions(9.0));
    other.add_packed(weight);
    other.add_packed(table);
    torch::load(other, file);
    EXPECT_EQ(static_cast<DiodeMixOptions&>(other.param_groups()[0].options()).state_bits(), bits);
    other.step();
  }
}

TEST(Moments, FewBitsKeepTheMeanOfManyRoundings) {
  torch::manual_seed(9);
  const Tensor value = torch::randn({3, 100}, torch::kDouble), square = value.square();
  for (const int64_t bits : {8, 16}) {
    Tensor sum = torch::zeros_like(value), sum_of_squares = torch::zeros_like(value);
    constexpr int kRounds = 2000;
    for (int i = 0; i < kRounds; ++i) {
      sum += loaded_moment(stored_moment(value, bits), bits, torch::kDouble);
      sum_of_squares += loaded_moment(stored_moment(square, bits, false), bits, torch::kDouble, false);
    }
    // The widest step of the grids: 1/127 of a block's largest, 4/255 of it near 1 for fourth powers, 2^-7 relative for 16
    // bits.
    const double top = value.abs().max().item<double>(), top_square = square.max().item<double>();
    const double sigmas = 6 / (2 * std::sqrt(kRounds));
    const double step = bits == 8 ? top / 127 : top / 128, step_square = bits == 8 ? 4.0 / 255 * top_square : top_square / 128;
    EXPECT_LT((sum / kRounds - value).abs().max().item<double>(), sigmas * step) << bits;
    EXPECT_LT((sum_of_squares / kRounds - square).abs().max().item<double>(), sigmas * step_square) << bits;
  }
  const Tensor small = torch::tensor({1.0f, 1e-8f, 0.0f});
  const Tensor kept = loaded_moment(stored_moment(small, 8, false), 8, torch::kFloat, false);
  EXPECT_GT(kept[1].item<float>(), 0);  // a second moment of 0 would make a step infinite
  EXPECT_EQ(kept[2].item<float>(), 0);
}

TEST(DiodeMix, O3ProjectsMatricesOfEveryShapeAndNothingElse) {
  torch::manual_seed(6);
  for (const char* type : {"std", "reverse_std", "right", "left", "full"}) {
    std::vector<Tensor> parameters;
    for (const auto& shape : std::vector<std::vector<int64_t>>{{7}, {4, 9}, {9, 4}, {2, 3, 4}})
      parameters.push_back(torch::randn(shape).requires_grad_());
    PackedWeight binary = packed(torch::randn({12, 8}), "sign");
    DiodeMix optimizer(parameters, DiodeMixOptions(0.1).betas({0.5, 0.5}).rank(5).update_proj_gap(2).proj_type(type));
    optimizer.add_packed(binary);
    const Tensor before = binary.codes.clone();
    for (int step = 0; step < 4; ++step) {
      for (const Tensor& p : parameters) set_grad(p, torch::randn(p.sizes()));
      set_grad(binary.handle(), torch::randn({12, 8}));
      optimizer.step();
    }
    for (const Tensor& p : parameters) EXPECT_TRUE(p.isfinite().all().item<bool>()) << type;
    EXPECT_FALSE(torch::equal(binary.codes, before)) << type;
  }
}

TEST(DiodeMix, RefusesOptionsOutOfRange) {
  const Tensor p = torch::zeros({2}).requires_grad_();
  EXPECT_THROW(DiodeMix({p}, DiodeMixOptions(-1.0)), c10::ValueError);
  EXPECT_THROW(DiodeMix({p}, DiodeMixOptions().betas({1.0, 0.5})), c10::ValueError);
  EXPECT_THROW(DiodeMix({p}, DiodeMixOptions().eps(-1.0)), c10::ValueError);
  EXPECT_THROW(DiodeMix({p}, DiodeMixOptions().rank(1).proj_type("up")), c10::ValueError);
  EXPECT_THROW(DiodeMix({p}, DiodeMixOptions().state_bits(4)), c10::ValueError);
}

TEST(GaLoreProjector, ProjectsOnSingularVectorsOfTheSideOfItsType) {
  torch::manual_seed(7);
  const struct {
    const char* type;
    bool left[2], right[2];  // tall, wide
  } kCases[] = {{"std", {false, true}, {true, false}},
                {"reverse_std", {true, false}, {false, true}},
                {"right", {false, false}, {true, true}},
                {"left", {true, true}, {false, false}},
                {"full", {true, true}, {true, true}}};
  for (const auto& c : kCases)
    for (const int wide : {0, 1}) {
      const Tensor g = wide ? torch::randn({4, 7}) : torch::randn({9, 5});
      const auto [u, s, vh] = at::linalg_svd(g, false);
      GaLoreProjector projector({3, 10, 0.5, c.type});
      const Tensor r = projector.project(g, 0);
      Tensor wanted = g;
      if (c.left[wide]) wanted = u.slice(1, 0, 3).mm(u.slice(1, 0, 3).t()).mm(wanted);
      if (c.right[wide]) wanted = wanted.mm(vh.slice(0, 0, 3).t()).mm(vh.slice(0, 0, 3));
      EXPECT_TRUE(torch::allclose(projector.project_back(r), 0.5 * wanted, 1e-4, 1e-5)) << c.type << wide;
      EXPECT_EQ(projector.left().defined(), c.left[wide]) << c.type << wide;
      EXPECT_EQ(projector.right().defined(), c.right[wide]) << c.type << wide;
      EXPECT_LT(r.numel(), g.numel());
    }
  EXPECT_THROW(GaLoreProjector({0}), c10::ValueError);
  EXPECT_THROW(GaLoreProjector({2, 1, 1.0, "std"}).project(torch::ones({3}), 0), c10::ValueError);
  EXPECT_THROW(GaLoreProjector({2, 1, 1.0, "std"}).project_back(torch::ones({3, 2})), c10::ValueError);
}

}  // namespace
