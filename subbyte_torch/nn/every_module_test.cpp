// What every module owes a C++ program: it computes and trains, its archive and its clone give the same outputs, it prints
// itself, moves between types, and an archive of another shape leaves it as it was.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "subbyte_torch/subbyte.h"

namespace subbyte::nn {
namespace {

using torch::Tensor;

// A module of two sizes (the second does not fit the first's archive), its inputs, and how they are given to it.
struct Case {
  std::string name;
  std::function<std::shared_ptr<torch::nn::Module>(int64_t features)> make;
  std::function<std::vector<Tensor>(int64_t features)> inputs;
  std::function<Tensor(torch::nn::Module&, const std::vector<Tensor>&)> run;
  std::function<Tensor(std::shared_ptr<torch::nn::Module>, const std::vector<Tensor>&)> run_in_sequential;
  bool looks_up = false;  // inputs are indices
};

template <class Impl>
Tensor call(torch::nn::Module& module, const std::vector<Tensor>& x) {
  if constexpr (requires(Impl m) { std::get<0>(m.forward(x[0])); }) return std::get<0>(module.as<Impl>()->forward(x[0]));
  else if constexpr (
      requires(Impl m) { m.forward(x[0], x[1]); } && !requires(Impl m) { m.forward(x[0]); })
    return module.as<Impl>()->forward(x[0], x[1]);
  else return module.as<Impl>()->forward(x[0]);
}

// The same through torch::nn::Sequential, which knows the number and types of forward's arguments only at run time.
template <class Impl>
Tensor call_in_sequential(const std::shared_ptr<torch::nn::Module>& module, const std::vector<Tensor>& x) {
  torch::nn::Sequential sequential;
  sequential->push_back(torch::nn::AnyModule(std::dynamic_pointer_cast<Impl>(module)));
  if constexpr (requires(Impl m) { std::get<0>(m.forward(x[0])); })
    return std::get<0>(sequential->template forward<std::tuple<Tensor, Tensor>>(x[0]));
  else if constexpr (
      requires(Impl m) { m.forward(x[0], x[1]); } && !requires(Impl m) { m.forward(x[0]); })
    return sequential->forward(x[0], x[1]);
  else return sequential->forward(x[0]);
}

template <class Holder, class Make>
Case case_of(const std::string& name, Make make, const std::function<std::vector<Tensor>(int64_t)>& inputs,
             bool looks_up = false) {
  using Impl = typename Holder::ContainedType;
  return {name, make, inputs, call<Impl>, call_in_sequential<Impl>, looks_up};
}

std::vector<Case> cases() {
  const auto rows = [](int64_t f) { return std::vector<Tensor>{torch::randn({2, 3, f})}; };
  const auto images = [](int64_t f) { return std::vector<Tensor>{torch::randn({2, f, 5, 6})}; };
  const auto indices = [](int64_t) { return std::vector<Tensor>{torch::tensor({{1, 2, 2}, {6, 0, 3}})}; };
  const auto pairs = [](int64_t f) { return std::vector<Tensor>{torch::randn({2, 3, f}), torch::randn({2, 4, f})}; };
  std::vector<Case> all;
  for (const int bits : {0, 8})
    all.push_back(case_of<Linear>(
        "Linear a" + std::to_string(bits),
        [bits](int64_t f) {
          LinearOptions o(f, 6);
          o.activation_bits = bits;
          return std::make_shared<LinearImpl>(o);
        },
        rows));
  for (const bool sparse : {false, true}) {
    all.push_back(case_of<Embedding>(
        sparse ? "Embedding sparse" : "Embedding",
        [sparse](int64_t f) {
          EmbeddingOptions o(7, f);
          o.sparse = sparse;
          return std::make_shared<EmbeddingImpl>(o);
        },
        indices, true));
    all.push_back(case_of<EmbeddingBag>(
        sparse ? "EmbeddingBag sparse" : "EmbeddingBag",
        [sparse](int64_t f) {
          EmbeddingBagOptions o(7, f);
          o.sparse = sparse;
          o.mode = sparse ? "sum" : "mean";
          return std::make_shared<EmbeddingBagImpl>(o);
        },
        indices, true));
  }
  for (const MPQLayout layout : {MPQLayout::kGba, MPQLayout::kGptq, MPQLayout::kMbwq, MPQLayout::kExl2})
    all.push_back(case_of<MPQLinear>(
        "MPQLinear " + std::to_string(int(layout)),
        [layout](int64_t f) {
          MPQLinearOptions o(f, 6);
          o.layout = layout;
          o.group_size = 8;
          o.bias = true;
          o.channel_scale = true;
          return std::make_shared<MPQLinearImpl>(o);
        },
        rows));
  for (const bool train_scale : {false, true})
    all.push_back(case_of<BinaryEmbedding>(
        train_scale ? "BinaryEmbedding scale" : "BinaryEmbedding",
        [train_scale](int64_t f) {
          BinaryEmbeddingOptions o(7, f);
          o.train_scale = train_scale;
          o.padding_idx = 2;
          return std::make_shared<BinaryEmbeddingImpl>(o);
        },
        indices, true));
  for (const char* mode : {"sum", "mean", "majority"})
    all.push_back(case_of<BinaryEmbeddingBag>(
        std::string("BinaryEmbeddingBag ") + mode,
        [mode](int64_t f) {
          BinaryEmbeddingOptions o(7, f);
          o.mode = mode;
          return std::make_shared<BinaryEmbeddingBagImpl>(o);
        },
        indices, true));
  for (const TernaryState state : {TernaryState::kLatent, TernaryState::kPacked, TernaryState::kFrozen}) {
    all.push_back(case_of<BitLinear>(
        "BitLinear " + std::to_string(int(state)),
        [state](int64_t f) {
          TernaryLinearOptions o(f, 6);
          o.state = state;
          return std::make_shared<BitLinearImpl>(o);
        },
        rows));
    all.push_back(case_of<MultiTernaryLinear>(
        "MultiTernaryLinear " + std::to_string(int(state)),
        [state](int64_t f) {
          TernaryLinearOptions o = MultiTernaryLinearImpl::default_options(f, 6, 2);
          o.state = state;
          return std::make_shared<MultiTernaryLinearImpl>(o);
        },
        rows));
  }
  all.push_back(case_of<QuantizedLinear>(
      "QuantizedLinear",
      [](int64_t f) {
        QuantizedLinearOptions o(f, 6);
        o.bias = true;
        return std::make_shared<QuantizedLinearImpl>(o);
      },
      rows));
  all.push_back(case_of<QuantizedConv2d>(
      "QuantizedConv2d",
      [](int64_t f) {
        QuantizedConv2dOptions o(f, 6, {3, 2});
        o.stride = {2, 1};
        o.padding = 1;
        o.bias = true;
        return std::make_shared<QuantizedConv2dImpl>(o);
      },
      images));
  all.push_back(case_of<QuantizedMatmul>(
      "QuantizedMatmul", [](int64_t) { return std::make_shared<QuantizedMatmulImpl>(); }, pairs));
  all.push_back(case_of<QuantizedAttention>(
      "QuantizedAttention", [](int64_t f) { return std::make_shared<QuantizedAttentionImpl>(f, 4); }, rows));
  all.push_back(case_of<BinaryLinear>(
      "BinaryLinear",
      [](int64_t f) {
        BinaryLinearOptions o(f, 6);
        o.bias = true;
        return std::make_shared<BinaryLinearImpl>(o);
      },
      rows));
  all.push_back(case_of<BinaryConv2d>(
      "BinaryConv2d",
      [](int64_t f) {
        BinaryConv2dOptions o(f, 6, {3, 2});
        o.stride = {2, 1};
        o.padding = {1, 1};
        o.pad_value = -1;
        return std::make_shared<BinaryConv2dImpl>(o);
      },
      images));
  all.push_back(case_of<BinaryMatmul>(
      "BinaryMatmul", [](int64_t) { return std::make_shared<BinaryMatmulImpl>(); }, pairs));
  all.push_back(case_of<BinaryAttention>(
      "BinaryAttention",
      [](int64_t f) {
        BinaryAttentionOptions o(f, 8, 4);
        o.dropout = 0;
        o.binary_scores = true;
        return std::make_shared<BinaryAttentionImpl>(o);
      },
      rows));
  return all;
}

// Modules of trained steps have seen a batch.
std::shared_ptr<torch::nn::Module> ready(const Case& c, int64_t features, const std::vector<Tensor>& x) {
  auto module = c.make(features);
  c.run(*module, x);
  return module;
}

std::string archive_of(const torch::nn::Module& module) {
  torch::serialize::OutputArchive archive;
  module.save(archive);
  std::ostringstream stream;
  archive.save_to(stream);
  return stream.str();
}

void load(torch::nn::Module& module, const std::string& bytes) {
  std::istringstream stream(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  module.load(archive);
}

class EveryModule : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override { torch::manual_seed(1); }
  static constexpr int64_t kFeatures = 24, kOther = 32;
};

INSTANTIATE_TEST_SUITE_P(All, EveryModule, testing::ValuesIn(cases()), [](const auto& tested) {
  std::string name = tested.param.name;
  std::replace(name.begin(), name.end(), ' ', '_');
  return name;
});

TEST_P(EveryModule, GradientsReachInputsAndParameters) {
  const Case& c = GetParam();
  std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x);
  if (!c.looks_up)
    for (Tensor& t : x) t.requires_grad_();
  c.run(*module, x).square().sum().backward();
  if (!c.looks_up)
    for (const Tensor& t : x) {
      EXPECT_TRUE(t.grad().defined() && t.grad().ne(0).any().item<bool>());
    }
  for (const auto& p : module->named_parameters())
    if (p->requires_grad()) {
      EXPECT_TRUE(p->grad().defined()) << p.key();
    }
  module->zero_grad();
  for (const auto& p : module->named_parameters())
    EXPECT_TRUE(!p->grad().defined() || p->grad().eq(0).all().item<bool>()) << p.key();
}

TEST_P(EveryModule, ArchivesGiveTheSameOutputs) {
  const Case& c = GetParam();
  const std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x), other = c.make(kFeatures);
  const std::string bytes = archive_of(*module);
  module->eval();
  const torch::NoGradGuard no_grad;
  const Tensor y = c.run(*module, x);
  load(*other, bytes);
  other->eval();
  EXPECT_TRUE(torch::equal(c.run(*other, x), y));
  // Parameters are the objects that an optimizer made before the load knows.
  const auto before = other->parameters();
  load(*other, bytes);
  const auto after = other->parameters();
  ASSERT_EQ(before.size(), after.size());
  for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(before[i].is_same(after[i])) << i;
}

TEST_P(EveryModule, AnArchiveOfAnotherShapeIsAnErrorAndChangesNothing) {
  const Case& c = GetParam();
  if (c.name.find("Matmul") != std::string::npos) GTEST_SKIP() << "one shape for all sizes";
  const std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x), larger = ready(c, kOther, c.inputs(kOther));
  module->eval();
  const torch::NoGradGuard no_grad;
  const Tensor y = c.run(*module, x);
  EXPECT_ANY_THROW(load(*module, archive_of(*larger)));
  EXPECT_TRUE(torch::equal(c.run(*module, x), y));
}

TEST_P(EveryModule, ClonesAreEqualAndIndependent) {
  const Case& c = GetParam();
  const std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x);
  module->eval();
  const auto copy = module->clone();
  EXPECT_FALSE(copy->is_training());
  const torch::NoGradGuard no_grad;
  const Tensor y = c.run(*module, x);
  EXPECT_TRUE(torch::equal(c.run(*copy, x), y));
  for (const auto& t : copy->named_buffers())
    if (t->numel() > 0) {
      EXPECT_FALSE(t->is_alias_of(*module->named_buffers().find(t.key()))) << t.key();
    }
  for (const auto& t : copy->named_parameters())
    if (t->numel() > 0) {
      EXPECT_FALSE(t->is_alias_of(*module->named_parameters().find(t.key()))) << t.key();
    }
  std::ostringstream a, b;
  a << *module;
  b << *copy;
  EXPECT_EQ(a.str(), b.str());
  for (const auto& p : copy->named_parameters())
    EXPECT_EQ(p->requires_grad(), module->named_parameters().find(p.key())->requires_grad()) << p.key();
}

TEST_P(EveryModule, PrintsItsNameAndSizes) {
  const auto module = GetParam().make(kFeatures);
  std::ostringstream text;
  text << *module;
  const std::string name = GetParam().name.substr(0, GetParam().name.find(' '));
  EXPECT_EQ(text.str().find("subbyte::nn::" + name + "("), 0u) << text.str();
}

TEST_P(EveryModule, ConvertsToOtherTypes) {
  const Case& c = GetParam();
  const std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x);
  module->eval();
  const torch::NoGradGuard no_grad;
  const Tensor y = c.run(*module, x);
  const double scale = std::max(1e-6, y.abs().max().item<double>());
  for (const torch::ScalarType type : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    module->to(type);
    std::vector<Tensor> converted;
    for (const Tensor& t : x) converted.push_back(t.is_floating_point() ? t.to(type) : t);
    const Tensor z = c.run(*module, converted);
    EXPECT_EQ(z.scalar_type(), type);
    EXPECT_TRUE(z.isfinite().all().item<bool>());
    // Signs and codes near a boundary may change with a rounded input, so this is a bound on gross errors.
    const Tensor error = (z.to(torch::kFloat) - y).abs();
    EXPECT_LT((c.looks_up ? error.max() : error.mean()).item<double>(), (c.looks_up ? 0.02 : 0.2) * scale) << type;
  }
  for (const auto& b : module->named_buffers()) {
    const bool is_packed = b.key().ends_with("codes") || b.key().ends_with("qweight");
    EXPECT_EQ(b->scalar_type() == torch::kByte, is_packed) << b.key();
  }
}

TEST_P(EveryModule, RunsInASequential) {
  const Case& c = GetParam();
  const std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x);
  module->eval();
  EXPECT_TRUE(torch::equal(c.run_in_sequential(module, x), c.run(*module, x)));
}

TEST_P(EveryModule, EmptyBatchesHaveTheirShape) {
  const Case& c = GetParam();
  std::vector<Tensor> x = c.inputs(kFeatures);
  const auto module = ready(c, kFeatures, x);
  const Tensor y = c.run(*module, x);
  for (Tensor& t : x) t = t.slice(0, 0, 0);
  const Tensor z = c.run(*module, x);
  std::vector<int64_t> sizes = y.sizes().vec();
  sizes[0] = 0;
  EXPECT_EQ(z.sizes(), torch::IntArrayRef(sizes));
}

}  // namespace
}  // namespace subbyte::nn
