// Trains a small network on Fashion-MNIST with packed weights, in C++: no Python, and no float copy of the weights.
//
//   fashion_mnist                          784-512-512-10 at 4 bits, five epochs, checkpoint in fashion_mnist.pt
//   fashion_mnist --bits 8 --epochs 1 --images 2000 --checkpoint /tmp/run.pt
//
// The data are the four IDX files of Debian's package dataset-fashion-mnist. Every epoch ends in a checkpoint, written beside
// the old one and renamed: a run that was killed goes on at its last epoch, with the same bits.
#include <subbyte_torch/subbyte.h>
#include <torch/torch.h>
#include <zlib.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <numbers>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Arguments {
  std::string data = "/usr/share/datasets/fashion-mnist", checkpoint = "fashion_mnist.pt", device = "cpu", moments = "8bit";
  int bits = 4, residual_bits = -1;
  int64_t epochs = 5, batch = 256, images = 60000, hidden = 512, seed = 0;
  double lr = 1e-3;
};

// A file of unsigned bytes in the IDX format: four magic bytes (0, 0, 8, dimensions), big-endian sizes, values; gzipped.
torch::Tensor read_idx(const std::string& path) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) throw std::runtime_error(path + " cannot be opened: apt-get install dataset-fashion-mnist");
  const auto read = [&](void* to, unsigned count) {
    if (gzread(file.get(), to, count) != int(count)) throw std::runtime_error(path + ": ends too early");
  };
  unsigned char magic[4];
  read(magic, 4);
  if (magic[0] || magic[1] || magic[2] != 8 || magic[3] < 1 || magic[3] > 3)
    throw std::runtime_error(path + ": expected an IDX file of bytes in one to three dimensions");
  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (int i = 0; i < magic[3]; ++i) {
    unsigned char size[4];
    read(size, 4);
    sizes.push_back(int64_t(size[0]) << 24 | size[1] << 16 | size[2] << 8 | size[3]);
    count *= sizes.back();
    if (count > 1 << 28) throw std::runtime_error(path + ": says that it holds more than 2^28 values");
  }
  torch::Tensor out = torch::empty(sizes, torch::kUInt8);
  read(out.data_ptr(), unsigned(count));
  return out;
}

struct Split {
  torch::Tensor images, labels;  // float32 [n, 784] of mean 0 and deviation 1; int64 [n]
};

Split read_split(const Arguments& args, const std::string& name) {
  const std::string start = args.data + "/" + name;
  const torch::Tensor images = read_idx(start + "-images-idx3-ubyte.gz").to(torch::kFloat32).div(255).sub(0.2860).div(0.3530);
  return {images.flatten(1).to(torch::Device(args.device)),
          read_idx(start + "-labels-idx1-ubyte.gz").to(torch::kLong).to(torch::Device(args.device))};
}

struct MlpImpl : torch::nn::Module {
  explicit MlpImpl(const Arguments& args) {
    const auto layer = [&](int64_t in, int64_t out) {
      subbyte::nn::LinearOptions options(in, out);
      options.quantize.bits = args.bits;
      options.quantize.residual_bits = args.residual_bits;
      options.quantize.scheme = "fan_in";  // fresh weights get room to grow
      return subbyte::nn::Linear(options);
    };
    first = register_module("first", layer(784, args.hidden));
    second = register_module("second", layer(args.hidden, args.hidden));
    last = register_module("last", layer(args.hidden, 10));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return last->forward(torch::relu(second->forward(torch::relu(first->forward(x)))));
  }
  subbyte::nn::Linear first{nullptr}, second{nullptr}, last{nullptr};
};
TORCH_MODULE(Mlp);

double accuracy(Mlp& model, const Split& split) {
  torch::NoGradGuard no_grad;
  return model->forward(split.images).argmax(1).eq(split.labels).to(torch::kDouble).mean().item<double>();
}

// What a run goes on from. `course` says what its bits depend on: another run's checkpoint is refused.
void save(const std::string& path, const std::string& course, const Mlp& model, const subbyte::optim::PackedAdamW& optimizer,
          int64_t epochs_done) {
  torch::serialize::OutputArchive archive, weights, states;
  model->save(weights);
  optimizer.save(states);
  archive.write("model", weights);
  archive.write("optimizer", states);
  archive.write("epochs_done", c10::IValue(epochs_done));
  archive.write("course", c10::IValue(course));
  archive.write("random", at::detail::getDefaultCPUGenerator().get_state());
  archive.save_to(path + ".part");
  std::filesystem::rename(path + ".part", path);
}

torch::serialize::InputArchive open_checkpoint(const std::string& path, const std::string& course) {
  torch::serialize::InputArchive archive;
  archive.load_from(path);
  c10::IValue kept;
  archive.read("course", kept);
  if (kept.toStringRef() != course)
    throw std::runtime_error(path + " is of another run (" + kept.toStringRef() + "); this is " + course);
  return archive;
}

void run(const Arguments& args) {
  torch::manual_seed(args.seed);
  Split learn = read_split(args, "train");
  const Split test = read_split(args, "t10k");
  const int64_t images = std::min(args.images, learn.labels.size(0));
  const int64_t steps_an_epoch = (images + args.batch - 1) / args.batch, steps = args.epochs * steps_an_epoch;

  char course[200];
  std::snprintf(course, sizeof course,
                "%d bits, %s moments, lr %g, %lld epochs, batch %lld, %lld images, hidden %lld, seed %lld", args.bits,
                args.moments.c_str(), args.lr, (long long)args.epochs, (long long)args.batch, (long long)images,
                (long long)args.hidden, (long long)args.seed);
  std::printf("%s\n", course);
  std::optional<torch::serialize::InputArchive> checkpoint;
  if (std::filesystem::exists(args.checkpoint)) checkpoint = open_checkpoint(args.checkpoint, course);

  Mlp model(args);
  torch::serialize::InputArchive part;
  if (checkpoint) checkpoint->read("model", part), model->load(part);
  model->to(torch::Device(args.device));
  // The optimizer shares the model's tensors, so it is made once these are the final ones.
  subbyte::optim::PackedAdamWOptions options(args.lr);
  options.first_moment(args.moments).second_moment(args.moments).seed(args.seed);
  subbyte::optim::PackedAdamW optimizer(subbyte::optim::packed_weights(*model), model->parameters(), options);
  int64_t epoch = 0;
  if (checkpoint) {
    torch::serialize::InputArchive states;
    checkpoint->read("optimizer", states);
    optimizer.load(states);
    c10::IValue done;
    checkpoint->read("epochs_done", done);
    epoch = done.toInt();
    torch::Tensor random;
    checkpoint->read("random", random);
    torch::Generator generator = at::detail::getDefaultCPUGenerator();
    generator.set_state(random);
    std::printf("goes on after epoch %lld of %s\n", (long long)epoch, args.checkpoint.c_str());
  }
  optimizer.update_in_backward();  // a layer's dense gradient is gone before the next one's exists
  for (; epoch < args.epochs; ++epoch) {
    const auto began = std::chrono::steady_clock::now();
    const torch::Tensor order = torch::randperm(images).to(torch::Device(args.device));
    torch::Tensor total = torch::zeros({}, torch::Device(args.device));
    for (int64_t i = 0; i < steps_an_epoch; ++i) {
      const double done = double(epoch * steps_an_epoch + i) / double(steps);
      for (auto& group : optimizer.param_groups())
        group.options().set_lr(args.lr * (0.5 + 0.5 * std::cos(std::numbers::pi * done)));
      const torch::Tensor batch = order.slice(0, i * args.batch, (i + 1) * args.batch);
      const torch::Tensor loss = torch::nn::functional::cross_entropy(model->forward(learn.images.index_select(0, batch)),
                                                                      learn.labels.index_select(0, batch));
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      total += loss.detach();
    }
    const double loss = total.item<double>() / double(steps_an_epoch);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    std::printf("epoch %2lld   loss %.4f   test accuracy %.2f %%   %.1f s\n", (long long)epoch + 1, loss,
                100 * accuracy(model, test), seconds);
    std::fflush(stdout);
    save(args.checkpoint, course, model, optimizer, epoch + 1);
  }
  int64_t deployed = 0, weights = 0;
  for (const subbyte::PackedWeight& w : subbyte::optim::packed_weights(*model)) {
    deployed += w.drop_residual().bytes();
    weights += w.out_features() * w.in_features;
  }
  std::printf("test accuracy %.2f %%; %lld weights in %lld bytes when deployed\n", 100 * accuracy(model, test),
              (long long)weights, (long long)deployed);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app("Trains a small network on Fashion-MNIST with packed weights");
  app.add_option("--data", args.data, "folder with the four IDX files")->capture_default_str();
  app.add_option("--bits", args.bits, "of a weight that products read")->check(CLI::Range(1, 8))->capture_default_str();
  app.add_option("--residual-bits", args.residual_bits,
                 "more that training keeps; 8 together below 4 bits, else 0, when not given")
      ->check(CLI::Range(0, 7));
  app.add_option("--moments", args.moments, "of the optimizer")
      ->check(CLI::IsMember({"float32", "bfloat16", "8bit", "4bit"}))
      ->capture_default_str();
  app.add_option("--epochs", args.epochs)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--batch", args.batch)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--images", args.images, "training images used")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--hidden", args.hidden, "width of the hidden layers")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--lr", args.lr, "highest learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seed", args.seed)->capture_default_str();
  app.add_option("--device", args.device)->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
  app.add_option("--checkpoint", args.checkpoint, "file; a run goes on from it where it exists")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (args.residual_bits < 0) args.residual_bits = args.bits < 4 ? 8 - args.bits : 0;
  try {
    run(args);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
  return 0;
}
