// A character language model in C++ that uses all five kinds of low-bit layer at once, trains them, packs them and runs them:
// no Python, no float copy of what is packed.
//
//   binary embedding    a table of one bit a weight; a step moves bits of the characters that occurred
//   Q4 linear           4-bit weights and activations on learnt steps: the attention's projections
//   Q4 matmul           both operands 4-bit: attention scores and context
//   BitLinear           ternary weights, 8-bit activations: the hidden layer
//   MPQ linear          4-bit groupwise weights, trained packed: the head
//
//   five_systems TEXT [STEPS]      reads a text, trains, prints the loss, deploys, saves, loads and compares
#include <subbyte_torch/subbyte.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
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

torch::Tensor read_text(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (int64_t(text.size()) < 8 * kLength) throw std::runtime_error(std::string(path) + " is too short");
  torch::Tensor ids = torch::empty({int64_t(text.size())}, torch::kLong);
  for (size_t i = 0; i < text.size(); ++i) ids[int64_t(i)] = int64_t(static_cast<unsigned char>(text[i])) % kCharacters;
  return ids;
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

int run(const char* path, int64_t steps) {
  torch::manual_seed(1);
  const torch::Tensor windows = read_text(path).unfold(0, kLength + 1, 1);
  const auto sample = [&] { return windows.index_select(0, torch::randint(windows.size(0), {kBatch}, torch::kLong)); };

  LanguageModel model;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-3).weight_decay(0));
  const subbyte::PackedWeight& packed = model->head->weight();
  const torch::Tensor mean = torch::zeros({kCharacters, 2 * kWidth}), square = torch::zeros_like(mean);
  subbyte::optim::MpqUpdateOptions rule;
  rule.lr = 3e-3;
  rule.beta1 = 0.9;
  rule.beta2 = 0.999;
  rule.zeros_every = 0;

  double first = 0, last = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    model->zero_grad();
    torch::Tensor loss = loss_of(model, sample());
    loss.backward();
    optimizer.step();             // what is still float
    model->embedding->update_();  // bits of the characters that occurred
    subbyte::optim::mpq_update_(model->head->weight(), packed.handle().grad(), mean, square, step, rule);  // 4-bit codes
    const double value = loss.item<double>();
    if (step <= 10) first += value / 10;
    if (step > steps - 10) last += value / 10;
    if (step == 1 || step % (steps / 10) == 0) std::printf("step %5lld   loss %.3f\n", (long long)step, value);
  }
  std::printf("mean of ten steps: first %.3f, last %.3f nats a character\n", first, last);

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
  return same && last < 0.85 * first ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3 || (argc == 3 && std::atoll(argv[2]) < 20)) {
    std::fprintf(stderr, "usage: %s TEXT [STEPS]      STEPS: at least 20, 400 when not given\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argc == 3 ? std::atoll(argv[2]) : 400);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}
