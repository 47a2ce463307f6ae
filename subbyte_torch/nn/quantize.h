// Packs the layers of an existing model in place.
#pragma once
#include <torch/nn/module.h>

#include <string>
#include <vector>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::nn {

struct QuantizeModuleOptions {
  QuantizeOptions quantize;
  int activation_bits = 0;
  bool embeddings = false;
  std::vector<std::string> skip;  // full names, "0.2"
};

struct QuantizeReport {
  std::vector<std::string> replaced;
  std::vector<std::string> out_of_reach;
};

// Replaces torch::nn::Linear (and Embedding and EmbeddingBag, if asked) in every torch::nn::Sequential inside `module`. A layer
// that a C++ class keeps as a member of type torch::nn::Linear cannot be exchanged from outside, since the class calls its
// member: such layers are left as they are and named in out_of_reach; write them as subbyte::nn::Linear::from_float(...) in the
// class.
QuantizeReport quantize_(torch::nn::Module& module, const QuantizeModuleOptions& options = {});

// Exchanges in the same way every layer that has a residual for one without: what is deployed, with the same outputs. The
// layers are new modules; a class exchanges its own members by `fc = replace_module("fc", fc.drop_residual())`.
QuantizeReport drop_residuals_(torch::nn::Module& module);

}  // namespace subbyte::nn
