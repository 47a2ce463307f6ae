#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

#include "subbyte_torch/subbyte.h"

namespace {

using subbyte::nn::MPQLayout;
using subbyte::nn::MPQLinear;
using subbyte::nn::MPQLinearImpl;
using subbyte::nn::MPQLinearOptions;
using torch::Tensor;

std::vector<torch::Device> devices() {
  std::vector<torch::Device> out{torch::kCPU};
  if (subbyte_torch_has_cuda() && torch::cuda::is_available()) out.emplace_back(torch::kCUDA);
  return out;
}

// int32 [ceil(K * bits / 32), N] of codes [K, N], the last word padded, by shifts of int64: the layout by another road than the
// op's.
Tensor column_words(const Tensor& codes, int bits) {
  const int64_t per_word = 32 / bits, words = (codes.size(0) + per_word - 1) / per_word;
  const Tensor padded = torch::constant_pad_nd(codes.to(torch::kLong), {0, 0, 0, words * per_word - codes.size(0)});
  const Tensor c = padded.view({words, per_word, codes.size(1)});
  Tensor out = torch::zeros({words, codes.size(1)}, torch::kLong);
  for (int64_t i = 0; i < per_word; ++i) out += c.select(1, i).bitwise_left_shift(i * bits);
  return out.to(torch::kInt);
}

// An old layer, and the weight [K, N] that it stands for.
struct OldLayer {
  MPQLinearOptions options{96, 24};
  MPQLinearImpl::State raw, prepared;
  Tensor weight;
};

OldLayer old_layer(MPQLayout layout, bool asym, int bits, bool act_order) {
  torch::manual_seed(bits);
  OldLayer out;
  MPQLinearOptions& o = out.options;
  o.bits = bits;
  o.group_size = 32;
  o.layout = layout;
  o.asym = asym;
  o.dq_group_size = 8;
  o.bias = true;
  const int64_t k = 96, n = 24, groups = 3;
  const Tensor codes = torch::randint(0, 1 << bits, {k, n}, torch::kLong);
  Tensor g_idx = torch::arange(k).floor_divide(32);
  if (act_order) g_idx = g_idx.index_select(0, torch::randperm(k));
  const Tensor bias = torch::randint(-8, 8, {n}).to(torch::kFloat) / 8;
  // Second level: exact in float32.
  auto level = [&](int64_t levels) {
    const Tensor c = torch::randint(0, levels, {groups, 3, 8}, torch::kByte);
    const Tensor z = torch::randint(-3, 0, {groups, 3, 1}).to(torch::kFloat);
    const Tensor s = torch::randint(1, 4, {groups, 3, 1}).to(torch::kFloat) / 128;
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{c, z, s, ((c.to(torch::kFloat) - z) * s).reshape({groups, n})};
  };
  auto common = [&](MPQLinearImpl::State& state) {
    state.insert("qweight", column_words(codes, bits));
    state.insert("g_idx", g_idx.to(torch::kInt));
    state.insert("bias", bias);
  };
  common(out.raw);
  common(out.prepared);
  const Tensor g = g_idx.to(torch::kLong);
  if (asym) {
    const auto [c, z, s, scales] = level(256);
    const Tensor fields = torch::randint(0, 1 << bits, {groups, n}, torch::kLong);
    const Tensor qzeros = column_words(fields.t(), bits).t().contiguous();
    const bool gba = layout == MPQLayout::kGba;
    out.raw.insert("qzeros", qzeros);
    out.prepared.insert("qzeros", qzeros);
    if (gba) {
      out.raw.insert("qscales", bits == 4 ? c : c.reshape({groups, n}));
      out.raw.insert("qscales_zeros", z);
      out.raw.insert("qscales_scales", s);
      out.raw.insert("zeros", torch::zeros({groups, n}));
      out.prepared.insert("zeros", qzeros);
    }
    out.raw.insert("scales", gba ? torch::ones({groups, n}) : scales);
    out.prepared.insert("scales", scales);
    out.weight = scales.index_select(0, g) * (codes - (fields + 1).index_select(0, g));
  } else {
    const auto [sc, sz, ss, scales] = level(16);
    const auto [zc, zz, zs, zeros] = level(16);
    out.raw.insert("qstatistic", (sc * 16 + zc).to(torch::kByte));
    out.raw.insert("qscales_zeros", sz);
    out.raw.insert("qscales_scales", ss);
    out.raw.insert("qzeros_zeros", zz);
    out.raw.insert("qzeros_scales", zs);
    out.raw.insert("scales", torch::ones({groups, n}));
    out.raw.insert("zeros", torch::zeros({groups, n}));
    out.prepared.insert("scales", scales);
    out.prepared.insert("zeros", zeros);
    out.weight = codes * scales.index_select(0, g) - zeros.index_select(0, g);
  }
  out.raw.insert("wf", torch::arange(0, 32, bits, torch::kInt).unsqueeze(0));
  return out;
}

TEST(MPQLinear, OldCheckpointsLoadComputeAndAreWrittenBackByteForByte) {
  for (const torch::Device& device : devices())
    for (const int bits : {2, 4, 8})
      for (const bool act_order : {false, true})
        for (const auto& [layout, asym] :
             {std::pair(MPQLayout::kGba, false), std::pair(MPQLayout::kGba, true), std::pair(MPQLayout::kGptq, true)})
          for (const bool raw : {false, true}) {
            const OldLayer old = old_layer(layout, asym, bits, act_order);
            MPQLinear layer(old.options);
            layer->to(device);
            const MPQLinearImpl::State& state = raw ? old.raw : old.prepared;
            layer->load_original(state);
            EXPECT_TRUE(torch::equal(layer->weight().dequantize().cpu(), old.weight.t())) << bits << act_order << int(layout);
            const Tensor x = torch::randn({5, 96});
            const Tensor want = torch::matmul(x.to(torch::kDouble), old.weight.to(torch::kDouble)) + *state.find("bias");
            EXPECT_TRUE(torch::allclose(layer->forward(x.to(device)).cpu().to(torch::kDouble), want, 1e-4, 1e-4));
            const MPQLinearImpl::State back = layer->export_original(raw);
            EXPECT_EQ(back.size(), state.size());
            for (const auto& item : state) {
              const Tensor* found = back.find(item.key());
              ASSERT_NE(found, nullptr) << item.key();
              EXPECT_EQ(found->scalar_type(), item.value().scalar_type()) << item.key();
              EXPECT_TRUE(torch::equal(found->cpu(), item.value())) << item.key() << bits << act_order << int(layout) << raw;
            }
          }
}

OldLayer mixed_layer() {
  torch::manual_seed(9);
  OldLayer out;
  out.options.layout = MPQLayout::kExl2;
  const Tensor eight = torch::randint(0, 256, {32, 24}, torch::kLong), four = torch::randint(0, 16, {64, 24}, torch::kLong);
  const Tensor scales = torch::randint(1, 64, {2, 24}).to(torch::kFloat) / 512,
               zeros = torch::randint(-64, 64, {2, 24}).to(torch::kFloat) / 64;
  const Tensor perm = torch::randperm(96),
               group = torch::cat({torch::zeros({32}, torch::kLong), torch::ones({64}, torch::kLong)});
  out.prepared.insert("qweight", torch::cat({column_words(eight, 8), column_words(four, 4)}));
  out.prepared.insert("q_groups", torch::tensor({8, 0, 4, 8}, torch::kShort));
  out.prepared.insert("scales", scales);
  out.prepared.insert("zeros", zeros);
  out.prepared.insert("q_perm", perm.to(torch::kShort));
  out.prepared.insert("channel_scale", (torch::randint(1, 4, {96}).to(torch::kFloat) / 2).view({1, 1, 96}));
  out.weight = torch::empty({96, 24});
  out.weight.index_copy_(0, perm, torch::cat({eight, four}) * scales.index_select(0, group) - zeros.index_select(0, group));
  return out;
}

TEST(MPQLinear, MixedWidthsLoadComputeAndAreWrittenBack) {
  const OldLayer old = mixed_layer();
  MPQLinear layer(old.options);
  layer->load_original(old.prepared);
  EXPECT_EQ(layer->weight().format, "uint8*32+uint4*64");
  EXPECT_TRUE(torch::equal(layer->weight().dequantize(), old.weight.t()));
  EXPECT_EQ(layer->forward(torch::randn({3, 96})).dim(), 2);  // M8
  const MPQLinearImpl::State back = layer->export_original();
  for (const auto& item : old.prepared) EXPECT_TRUE(torch::equal(*back.find(item.key()), item.value())) << item.key();
}

TEST(MPQLinear, SaveLoadCloneAndPrintKeepAPermutedMixedLayer) {
  const OldLayer old = mixed_layer();
  MPQLinear layer(old.options), other(old.options);
  layer->load_original(old.prepared);
  const Tensor x = torch::randn({3, 96}), want = layer->forward(x).detach();
  std::stringstream file;
  torch::save(layer, file);
  torch::load(other, file);
  EXPECT_TRUE(torch::equal(other->forward(x), want));
  const auto copy = std::dynamic_pointer_cast<MPQLinearImpl>(layer->clone());
  EXPECT_TRUE(torch::equal(copy->forward(x), want));
  copy->weight().encode_(torch::zeros({24, 96}));
  EXPECT_FALSE(torch::equal(copy->forward(x), want));
  EXPECT_TRUE(torch::equal(layer->forward(x), want));
  const MPQLinearImpl::State back = std::dynamic_pointer_cast<MPQLinearImpl>(other->clone())->export_original();
  for (const auto& item : old.prepared) EXPECT_TRUE(torch::equal(*back.find(item.key()), item.value())) << item.key();
  std::ostringstream text;
  text << *layer;
  EXPECT_EQ(text.str(),
            "subbyte::nn::MPQLinear(in_features=96, out_features=24, bias=false, format=uint8*32+uint4*64, group_size=32, "
            "layout=exl2, asym=false, channel_scale)");
}

TEST(MPQLinear, OptionsThatContradictEachOtherAreRefusedAtConstruction) {
  auto refused = [](auto change) {
    MPQLinearOptions o(64, 8);
    change(o);
    EXPECT_THROW(MPQLinear{o}, c10::ValueError);
  };
  refused([](auto& o) { o.bits = 9; });
  refused([](auto& o) { o.group_size = 0; });
  refused([](auto& o) { o.dq_mode = 3; });
  refused([](auto& o) { o.dq_group_size = 0; });
  refused([](auto& o) { o.format = "uint4"; });
  refused([](auto& o) {
    o.asym = true;
    o.layout = MPQLayout::kMbwq;
  });
  MPQLinear layer(64, 8);
  EXPECT_THROW(layer->load_original(MPQLinearImpl::State()), c10::ValueError);
}

TEST(MPQLinear, FromLinearTrainsWithStochasticUpdatesWhereNearestStandsStill) {
  double final[2];
  for (const bool stochastic : {false, true}) {
    torch::manual_seed(3);
    const Tensor x = torch::randn({256, 64}), y = torch::matmul(x, torch::randn({64, 16}) / 8);
    MPQLinearOptions o(0, 0);
    o.group_size = 32;
    MPQLinear layer = MPQLinear::from_linear(torch::nn::Linear(torch::nn::LinearOptions(64, 16).bias(false)), o);
    layer->weight().scales.mul_(3);
    layer->weight().offsets.mul_(3);
    const Tensor m = torch::zeros({16, 64}), v = torch::zeros({16, 64});
    subbyte::optim::MpqUpdateOptions u;
    u.lr = 4e-3;
    u.beta1 = 0.9;
    u.beta2 = 0.99;
    u.zeros_every = 0;
    u.stochastic = stochastic;
    const double first = torch::mse_loss(layer->forward(x), y).item<double>();
    for (int step = 1; step <= 200; ++step) {
      layer->zero_grad();
      torch::mse_loss(layer->forward(x), y).backward();
      subbyte::optim::mpq_update_(layer->weight(), layer->grad(), m, v, step, u);
    }
    final[stochastic] = torch::mse_loss(layer->forward(x), y).item<double>() / first;
  }
  EXPECT_GT(final[0], 0.98);
  EXPECT_LT(final[1], 0.35);
}

TEST(MPQLinear, ProjectedUpdatesAndGroupsOfDifferentLengthsFollowTheRule) {
  const OldLayer old = mixed_layer();
  MPQLinear layer(old.options);
  layer->load_original(old.prepared);
  const Tensor before = layer->weight().dequantize(), offsets = layer->weight().offsets.clone();
  const Tensor g = torch::ones({24, 96});
  subbyte::optim::MpqUpdateOptions u;
  u.lr = 0.5;
  u.beta1 = u.beta2 = 0;
  u.eps = 0;
  bool projected = false;
  subbyte::optim::mpq_update_(
      layer->weight(), g, torch::zeros({24, 96}), torch::zeros({24, 96}), 5, u,
      [&](const Tensor& r) {
        projected = true;
        return r * 0.5;
      },
      layer->parent());
  EXPECT_TRUE(projected);
  EXPECT_TRUE(torch::allclose(layer->weight().offsets, offsets - 0.25));
  EXPECT_TRUE(torch::allclose(layer->weight().dequantize(), before - 0.25, 1e-4, 1e-4));
}

}  // namespace
