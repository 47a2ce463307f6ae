// A program of another project: the LibTorch layer, no Python.
#include <torch/torch.h>

#include <cstdio>

#include "subbyte_torch/subbyte.h"

int main() {
  torch::manual_seed(1);
  torch::nn::Linear dense(64, 8);
  subbyte::QuantizeOptions options;
  options.bits = 8;
  subbyte::nn::Linear packed = subbyte::nn::Linear::from_float(dense, options);
  const torch::Tensor x = torch::randn({4, 64});
  packed->forward(x).sum().backward();
  const bool close = torch::allclose(packed->forward(x), dense->forward(x), 0.05, 0.05);
  const bool gradient = torch::allclose(packed->grad(), x.sum(0).expand({8, 64}), 1e-4, 1e-4);
  std::printf("torch %s, subbyte %s: %s\n", subbyte_torch_built_with(), subbyte_version(), close && gradient ? "ok" : "wrong");
  return close && gradient ? 0 : 1;
}
