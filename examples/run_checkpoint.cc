// Runs the feed-forward block of a language model on packed weights, from a native checkpoint, without Python and without
// torch:
//
//   h = row `token` of the packed embedding, RMS-normalised
//   y = W_down (silu(W_gate h) * (W_up h))                      SwiGLU (Shazeer 2020), as in Llama-like models
//
// and compares with the same computation in double over the dequantized weights.
//
//   subbyte convert SmolLM2-135M-Instruct.Q4_1.gguf model.safetensors
//   run_checkpoint model.safetensors [layer] [token] [--a8]
//
// Tensor names of GGUF files (blk.0.ffn_gate.weight) and of transformers (model.layers.0.mlp.gate_proj.weight) are known.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "subbyte/formats/packed_matrix.h"
#include "subbyte/io/checkpoint.h"
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/embedding/embedding.h"
#include "subbyte/ops/linear/linear.h"
#include "subbyte/ops/linear_a8/linear_a8.h"

namespace {

using subbyte::CheckpointFile;
using subbyte::PackedMatrix;
using subbyte::PackedTensor;

PackedTensor load(const CheckpointFile& file, const std::string& gguf_name, const std::string& transformers_name) {
  for (const std::string& name : {gguf_name, transformers_name})
    if (const auto* spec = file.find_packed(name)) return file.load(*spec);
  throw std::runtime_error("the checkpoint has no packed weight '" + gguf_name + "' or '" + transformers_name + "'");
}

// x [K] through a packed weight [N, K]; float x, or x rounded to 8 bits on the way in.
std::vector<float> apply(const PackedMatrix& w, const std::vector<float>& x, bool a8) {
  std::vector<float> y(size_t(w.n));
  std::vector<uint8_t> workspace;
  auto call = [&](auto params, auto workspace_bytes, auto op) {
    params.x = x.data();
    params.m = 1;
    params.x_stride = w.k;
    params.w = w;
    params.y = y.data();
    params.y_stride = w.n;
    params.workspace_bytes = workspace_bytes(params);
    workspace.resize(size_t(params.workspace_bytes) + 64);
    params.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    op(params);
  };
  if (a8)
    call(
        subbyte::LinearA8Params{}, [](const subbyte::LinearA8Params& p) { return subbyte::linear_a8_workspace_bytes(p); },
        [](const subbyte::LinearA8Params& p) { subbyte::linear_a8(p); });
  else
    call(
        subbyte::LinearParams{}, [](const subbyte::LinearParams& p) { return subbyte::linear_workspace_bytes(p); },
        [](const subbyte::LinearParams& p) { subbyte::linear(p); });
  return y;
}

std::vector<float> dense(const PackedMatrix& w) {
  std::vector<float> out(size_t(w.n * w.k));
  subbyte::DequantizeParams p;
  p.w = w;
  p.out = out.data();
  p.out_stride = w.k;
  subbyte::dequantize(p);
  return out;
}

std::vector<double> apply_dense(const std::vector<float>& w, const std::vector<double>& x) {
  std::vector<double> y(w.size() / x.size());
  for (size_t n = 0; n < y.size(); ++n)
    for (size_t k = 0; k < x.size(); ++k) y[n] += double(w[n * x.size() + k]) * x[k];
  return y;
}

template <class T>
T silu(T v) {
  return v / (T(1) + std::exp(-v));
}

int run(const std::string& path, long layer, int64_t token, bool a8) {
  const auto file = CheckpointFile::open(path);
  const std::string blk = "blk." + std::to_string(layer) + ".ffn_", mlp = "model.layers." + std::to_string(layer) + ".mlp.";
  const PackedTensor embedding = load(*file, "token_embd.weight", "model.embed_tokens.weight");
  const PackedTensor gate = load(*file, blk + "gate.weight", mlp + "gate_proj.weight");
  const PackedTensor up = load(*file, blk + "up.weight", mlp + "up_proj.weight");
  const PackedTensor down = load(*file, blk + "down.weight", mlp + "down_proj.weight");
  if (gate.spec.k != embedding.spec.k || up.spec.k != gate.spec.k || up.spec.n != gate.spec.n || down.spec.k != gate.spec.n)
    throw std::runtime_error("the shapes of embedding, gate, up and down do not fit together");

  std::vector<float> h(size_t(embedding.spec.k));
  subbyte::EmbeddingParams e;
  e.table = embedding.view();
  e.indices = &token;
  e.count = 1;
  e.out = h.data();
  e.out_stride = embedding.spec.k;
  subbyte::embedding(e);
  double squares = 0;
  for (const float v : h) squares += double(v) * v;
  const auto scale = float(1 / std::sqrt(squares / double(h.size()) + 1e-5));
  for (float& v : h) v *= scale;

  std::vector<float> y;
  auto forward = [&] {
    std::vector<float> g = apply(gate.view(), h, a8);
    const std::vector<float> u = apply(up.view(), h, a8);
    for (size_t i = 0; i < g.size(); ++i) g[i] = silu(g[i]) * u[i];
    y = apply(down.view(), g, a8);
  };
  double best = 1e30;
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    forward();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }

  const std::vector<double> x(h.begin(), h.end());
  std::vector<double> g = apply_dense(dense(gate.view()), x);
  const std::vector<double> u = apply_dense(dense(up.view()), x);
  for (size_t i = 0; i < g.size(); ++i) g[i] = silu(g[i]) * u[i];
  const std::vector<double> expected = apply_dense(dense(down.view()), g);
  double error = 0, norm = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += (y[i] - expected[i]) * (y[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const int64_t packed_bytes = gate.spec.bytes() + up.spec.bytes() + down.spec.bytes();
  const int64_t weights = gate.spec.n * gate.spec.k + up.spec.n * up.spec.k + down.spec.n * down.spec.k;
  std::printf("layer %ld: gate, up [%lld, %lld] %s, down [%lld, %lld] %s\n", layer, static_cast<long long>(gate.spec.n),
              static_cast<long long>(gate.spec.k), gate.spec.layout.name().c_str(), static_cast<long long>(down.spec.n),
              static_cast<long long>(down.spec.k), down.spec.layout.name().c_str());
  std::printf("weights: %.2f MB packed (%.3f bits each), %.2f MB as float32\n", double(packed_bytes) / 1e6,
              double(packed_bytes) * 8 / double(weights), double(weights) * 4 / 1e6);
  std::printf("token %lld through the block: %.1f us (%s)\n", static_cast<long long>(token), best * 1e6,
              a8 ? "8-bit x" : "float32 x");
  std::printf("relative error against the dense computation in double: %.3g\n", relative);
  // float32 rounding, or the rounding of x to 8 bits in three products.
  const double allowed = a8 ? 0.05 : 1e-5;
  if (!(relative <= allowed)) {
    std::fprintf(stderr, "run_checkpoint: the error is above %.3g\n", allowed);
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> args(argv + 1, argv + argc);
  const auto flag = std::find(args.begin(), args.end(), "--a8");
  const bool a8 = flag != args.end();
  if (a8) args.erase(flag);
  if (args.empty() || args.size() > 3) {
    std::fprintf(stderr, "usage: run_checkpoint CHECKPOINT [layer] [token] [--a8]\n");
    return 2;
  }
  try {
    return run(args[0], args.size() > 1 ? std::atol(args[1].c_str()) : 0, args.size() > 2 ? std::atoll(args[2].c_str()) : 504,
               a8);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "run_checkpoint: %s\n", e.what());
    return 1;
  }
}
