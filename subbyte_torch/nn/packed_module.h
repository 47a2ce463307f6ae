// What Linear and Embedding have in common: a packed weight kept in buffers of a torch::nn::Module.
#pragma once
#include <torch/nn/cloneable.h>
#include <torch/serialize/archive.h>

#include "subbyte_torch/packed_weight.h"

namespace subbyte::nn {

// Buffers `codes`, `scales`, and where there are such, `zeros` or `offsets`, `perm` and `residual`: torch::save, torch::load
// and to(device) see them. The archive also keeps format, group size and residual bits, so that loading into a module of
// another format is an error. The gradient handle is no parameter (PyTorch would save and move [N, K] values that mean
// nothing): it is reached by handle().
template <class Derived>
class PackedModule : public torch::nn::Cloneable<Derived> {
 public:
  using torch::nn::Cloneable<Derived>::Cloneable;

  // The weight, on the module's own buffers: encode_ and apply_update_ change the module.
  PackedWeight& weight() { return weight_; }
  const PackedWeight& weight() const { return weight_; }
  const torch::Tensor& handle() const { return weight_.handle(); }
  // The dense gradient of the last backward pass; undefined when there was none.
  torch::Tensor grad() const { return weight_.handle().grad(); }

  void zero_grad(bool set_to_none = true) override {
    torch::nn::Module::zero_grad(set_to_none);
    weight_.handle().mutable_grad() = torch::Tensor();
  }

  // The buffers keep their types: codes are bytes whatever the module computes in. scales, zeros, offsets and parameters
  // convert to float32, float16 or bfloat16; float64 leaves them as they are.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    convert(device, dtype, non_blocking);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override { convert(std::nullopt, dtype, non_blocking); }
  void to(torch::Device device, bool non_blocking = false) override { convert(device, std::nullopt, non_blocking); }

  void save(torch::serialize::OutputArchive& archive) const override {
    torch::nn::Module::save(archive);
    archive.write("format", c10::IValue(weight_.format));
    archive.write("group_size", c10::IValue(weight_.group_size));
    if (weight_.residual_bits > 0) archive.write("residual_bits", c10::IValue(int64_t(weight_.residual_bits)));
  }
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  // Registers the parts of `w`, or puts them into the buffers that are there.
  void set_weight(PackedWeight w);

  PackedWeight weight_;

 private:
  void convert(std::optional<torch::Device> device, std::optional<torch::Dtype> dtype, bool non_blocking);
};

}  // namespace subbyte::nn
