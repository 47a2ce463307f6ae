#include "subbyte_torch/optim/moments.h"

#include <torch/utils.h>

namespace subbyte::optim {
namespace {

using torch::Tensor;

Tensor blocks_of(const Tensor& t) {
  const Tensor flat = t.flatten();
  const int64_t spare = (kMomentsBlock - flat.numel() % kMomentsBlock) % kMomentsBlock;
  return torch::constant_pad_nd(flat, {0, spare}).view({-1, kMomentsBlock});
}

Tensor without_padding(const Tensor& blocks, const Tensor& like) {
  return blocks.flatten().slice(0, 0, like.numel()).view(like.sizes());
}

}  // namespace

Tensor rounded_to_bfloat16(const Tensor& t) {
  const Tensor bits = t.to(torch::kFloat).contiguous().view(torch::kInt);
  const Tensor random = torch::randint(0, 65536, t.sizes(), bits.options());
  // Infinities and NaN keep their bits.
  return torch::where(t.isfinite(), (bits + random).bitwise_and(-65536), bits).view(torch::kFloat).to(torch::kBFloat16);
}

Moment stored_moment(const Tensor& value, int64_t bits, bool is_signed) {
  if (bits == 32) return {value, {}};
  if (bits == 16) return {rounded_to_bfloat16(value), {}};
  const Tensor blocks = blocks_of(value.to(torch::kFloat));
  const Tensor top = blocks.abs().amax(1, /*keepdim=*/true);
  const Tensor unit = blocks / torch::where(top.gt(0), top, 1.0);
  Tensor codes;
  if (is_signed) {
    codes = unit.mul(127).add_(torch::rand_like(unit)).floor_().clamp_(-127, 127).to(torch::kChar);
  } else {
    // Rounded in value between the two grid points around it.
    const Tensor low = unit.sqrt().sqrt_().mul_(255).floor_().clamp_max_(254);
    const Tensor below = low.div(255).pow(4), above = low.add(1).div_(255).pow(4);
    const Tensor up = torch::rand_like(unit).mul_(above - below).lt(unit - below);
    codes = torch::where(unit.gt(0), low.add(up).clamp_min_(1), low).to(torch::kByte);
  }
  return {without_padding(codes, value), top.squeeze(1)};
}

Tensor loaded_moment(const Moment& moment, int64_t bits, torch::ScalarType dtype, bool is_signed) {
  if (bits != 8) return moment.values.to(dtype);
  const Tensor codes = blocks_of(moment.values.to(torch::kFloat));
  const Tensor unit = is_signed ? codes.div(127) : codes.div(255).pow(4);
  return without_padding(unit * moment.absmax.unsqueeze(1), moment.values).to(dtype);
}

}  // namespace subbyte::optim
