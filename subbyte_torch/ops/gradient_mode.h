// Shared by the ops with a C++ gradient: whether a gradient is wanted, and what of a packed weight is kept for the backward
// pass.
#pragma once
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <string>

#include "subbyte_torch/packed_args.h"

namespace subbyte {

inline OptionalTensor optional_of(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// True when the op must be recorded. At one row of x an op lasts microseconds, so calls without gradient go straight through.
// Forward-mode tangents count, so that they reach the function that refuses them instead of being dropped.
inline bool needs_gradient(std::initializer_list<const at::Tensor*> tensors,
                           std::initializer_list<const OptionalTensor*> optional) {
  const bool enabled = at::GradMode::is_enabled();
  auto wants = [enabled](const at::Tensor& t) {
    return t.defined() && ((enabled && t.requires_grad()) || (t.is_floating_point() && t._fw_grad(0).defined()));
  };
  for (const at::Tensor* t : tensors)
    if (wants(*t)) return true;
  for (const OptionalTensor* t : optional)
    if (t->has_value() && wants(**t)) return true;
  return false;
}

// The parts of a packed weight that never have a gradient; owns what it refers to.
struct PackedRest {
  at::Tensor codes;
  OptionalTensor perm;
  std::string format;
  int64_t in_features;
  int64_t group_size;

  PackedArgs args(const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets) const {
    return {codes, scales, zeros, offsets, perm, format, in_features, group_size};
  }
  // Saves `first` and then the parts. Changing codes in place before the backward pass is an error, as for any saved tensor.
  void save(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list first) const {
    first.push_back(codes);
    first.push_back(perm.value_or(at::Tensor()));
    ctx->save_for_backward(std::move(first));
    ctx->saved_data["format"] = format;
    ctx->saved_data["in_features"] = in_features;
    ctx->saved_data["group_size"] = group_size;
  }
};

// What PackedRest::save kept: tensors[0 .. count) are `first`.
struct SavedPacked {
  torch::autograd::variable_list tensors;
  PackedRest rest;

  SavedPacked(torch::autograd::AutogradContext* ctx, size_t count) : tensors(ctx->get_saved_variables()) {
    rest.codes = tensors[count];
    rest.perm = optional_of(tensors[count + 1]);
    rest.format = ctx->saved_data["format"].toStringRef();
    rest.in_features = ctx->saved_data["in_features"].toInt();
    rest.group_size = ctx->saved_data["group_size"].toInt();
  }
  PackedArgs args(const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets) const {
    return rest.args(scales, zeros, offsets);
  }
};

}  // namespace subbyte
