// A character language model in C++ that uses all five kinds of low-bit layer at once, trains them, packs them and runs them:
// no Python, no float copy of what is packed.
//
//   binary embedding    a table of one bit a weight; a step moves bits of the characters that occurred
//   Q4 linear           4-bit weights and activations on learnt steps: the attention's projections
//   Q4 matmul           both operands 4-bit: attention scores and context
//   BitLinear           ternary weights, 8-bit activations: the hidden layer
//   MPQ linear          4-bit groupwise weights, trained packed: the head
//
//   five_systems TEXT --steps 400      reads a text, trains, prints the loss, deploys, saves, loads and compares
//
// The exit status says whether the loss fell, the packed weights moved and the loaded model computes the same bits.
#include <subbyte_torch/subbyte.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {

constexpr int64_t kCharacters = 128, kWidth = 64, kLength = 32, kBatch = 32;

struct LanguageModelImpl : torch::nn::Module {
  LanguageModelImpl() {
    subbyte::nn::MPQLinearOptions packed_head(2 * kWidth, kCharacters);
    packed_head.group_size = 32;
    packed_head.bias = true;
    embedding = register_module("embedding", subbyte::nn::BinaryEmbedding(kCharacters, kWidth));
    position = register_parameter("position", torch::randn({kLength, kWidth}) * 0.3);
    query = register_module("query", subbyte::nn::QuantizedLinear(kWidth, kWidth));
    key = register_module("key", subbyte::nn::QuantizedLinear(kWidth, kWidth));
    scores = register_module("scores", subbyte::nn::QuantizedMatmul());
    context = register_module("context", subbyte::nn::QuantizedMatmul());
    hidden = register_module("hidden", subbyte::nn::BitLinear(2 * kWidth, 2 * kWidth));
    head = register_module("head", subbyte::nn::MPQLinear(packed_head));
  }

  // ids [B, L] -> logits [B, L, characters]; position l sees positions up to l.
  torch::Tensor forward(const torch::Tensor& ids) {
    const torch::Tensor x = embedding->forward(ids) + position.slice(0, 0, ids.size(1));
    const torch::Tensor future = torch::ones({ids.size(1), ids.size(1)}, torch::kBool).triu(1);
    torch::Tensor attention = scores->forward(query->forward(x), key->forward(x)) / std::sqrt(double(kWidth));
    attention = attention.masked_fill(future, -1e9).softmax(-1);
    const torch::Tensor seen = context->forward(attention, x.transpose(1, 2));
    return head->forward(torch::gelu(hidden->forward(torch::cat({x, seen}, -1))));
  }

  subbyte::nn::BinaryEmbedding embedding{nullptr};
  torch::Tensor position;
  subbyte::nn::QuantizedLinear query{nullptr}, key{nullptr};
  subbyte::nn::QuantizedMatmul scores{nullptr}, context{nullptr};
  subbyte::nn::BitLinear hidden{nullptr};
  subbyte::nn::MPQLinear head{nullptr};
};
TORCH_MODULE(LanguageModel);

// Bytes as ids; those beyond ASCII share the ids of others.
torch::Tensor read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) throw std::runtime_error("cannot read " + path);
  const auto length = int64_t(text.size());
  if (length < 8 * kLength)
    throw std::runtime_error(path + " has " + std::to_string(length) + " bytes, expected at least " +
                             std::to_string(8 * kLength));
  return torch::from_blob(text.data(), {length}, torch::kByte).to(torch::kLong).remainder(kCharacters);
}

torch::Tensor loss_of(LanguageModel& model, const torch::Tensor& windows) {
  const torch::Tensor logits = model->forward(windows.slice(1, 0, kLength));
  return torch::nn::functional::cross_entropy(logits.reshape({-1, kCharacters}), windows.slice(1, 1).reshape({-1}));
}

// After training: the float weights that are left become codes.
void deploy(LanguageModel& model) {
  model->eval();
  model->query->generate_quantized_weight(/*qweight_only=*/true);
  model->key->generate_quantized_weight(/*qweight_only=*/true);
  model->hidden->enter(subbyte::nn::TernaryState::kFrozen);
}

struct Settings {
  std::string text;
  int64_t steps = 400, seed = 1;
};

int run(const Settings& settings) {
  torch::manual_seed(uint64_t(settings.seed));
  const torch::Tensor windows = read_text(settings.text).unfold(0, kLength + 1, 1);
  const auto sample = [&] { return windows.index_select(0, torch::randint(windows.size(0), {kBatch}, torch::kLong)); };

  LanguageModel model;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3).weight_decay(0));
  const subbyte::PackedWeight& head = model->head->weight();
  const torch::Tensor mean = torch::zeros({kCharacters, 2 * kWidth}), square = torch::zeros_like(mean);
  subbyte::optim::MpqUpdateOptions rule;
  rule.lr = 3e-3;
  rule.beta1 = 0.9;
  rule.beta2 = 0.999;
  rule.zeros_every = 0;
  rule.seed = settings.seed;
  const torch::Tensor first_codes = head.codes.clone(), first_bits = model->embedding->weight().codes.clone();

  const int64_t some = std::min<int64_t>(10, settings.steps / 2);
  double first = 0, last = 0;
  for (int64_t step = 1; step <= settings.steps; ++step) {
    model->zero_grad();
    torch::Tensor loss = loss_of(model, sample());
    loss.backward();
    optimizer.step();             // what is still float
    model->embedding->update_();  // bits of the characters that occurred
    subbyte::optim::mpq_update_(model->head->weight(), head.handle().grad(), mean, square, step, rule);  // 4-bit codes
    const double value = loss.item<double>();
    if (step <= some) first += value / double(some);
    if (step > settings.steps - some) last += value / double(some);
    if (step == 1 || step % std::max<int64_t>(1, settings.steps / 10) == 0)
      std::printf("step %5lld   loss %.3f\n", (long long)step, value);
  }
  std::printf("mean of %lld steps: first %.3f, last %.3f nats a character\n", (long long)some, first, last);
  const auto share_moved = [](const torch::Tensor& now, const torch::Tensor& then) {
    return 100 * now.ne(then).to(torch::kFloat).mean().item<double>();
  };
  const double moved_codes = share_moved(head.codes, first_codes);
  const double moved_bits = share_moved(model->embedding->weight().codes, first_bits);
  std::printf("moved: %.1f %% of the head's code bytes, %.1f %% of the embedding's\n", moved_codes, moved_bits);

  deploy(model);
  torch::NoGradGuard no_grad;
  const torch::Tensor ids = windows.slice(0, 0, 8).slice(1, 0, kLength);
  const torch::Tensor logits = model->forward(ids);
  std::stringstream archive;
  torch::save(model, archive);
  LanguageModel loaded;
  deploy(loaded);
  torch::load(loaded, archive);
  const bool same = torch::equal(loaded->forward(ids), logits);
  std::printf("deployed: %zu bytes in the archive; loaded again, the logits are %s\n", archive.str().size(),
              same ? "the same bits" : "DIFFERENT");
  return same && last < 0.85 * first && moved_codes > 0 && moved_bits > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains a character language model of five kinds of low-bit layer on a text, packs it, saves and loads it.",
               "five_systems"};
  Settings settings;
  app.add_option("TEXT", settings.text, "text to learn")->required()->check(CLI::ExistingFile);
  app.add_option("--steps", settings.steps, "steps of training")->check(CLI::Range(2, 1000000))->capture_default_str();
  app.add_option("--seed", settings.seed, "of weights, batches and rounding")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.footer("Exit codes: 0 done, 1 the loss did not fall or a result was wrong, 2 wrong usage.");
  try {
    app.parse(argc, argv);
    return run(settings);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;  // --help comes this way too
  } catch (const std::exception& error) {
    std::fprintf(stderr, "five_systems: %s\n", error.what());
    return 1;
  }
}
