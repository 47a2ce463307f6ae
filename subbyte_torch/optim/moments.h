// Moments of an optimizer kept in 32, 16 or 8 bits.
//
// 16 bits: bfloat16. 8 bits: codes, and the largest magnitude of every 256 elements; signed moments on an even grid (int8),
// moments that are never negative on the grid of fourth powers (uint8), which is dense near 0, and never stored as 0 unless
// they are. Both are rounded stochastically by random numbers of PyTorch's default generators: a slow average takes steps far
// below one unit, which nearest rounding would lose.
#pragma once
#include <torch/types.h>

#include <cstdint>

namespace subbyte::optim {

constexpr int64_t kMomentsBlock = 256;

struct Moment {
  torch::Tensor values;  // undefined before the first store
  torch::Tensor absmax;  // float32 [ceil(numel / 256)] with 8 bits
};

// `value` is what a later load gives, up to the rounding. With 32 bits the tensor itself is kept.
Moment stored_moment(const torch::Tensor& value, int64_t bits, bool is_signed = true);
torch::Tensor loaded_moment(const Moment& moment, int64_t bits, torch::ScalarType dtype, bool is_signed = true);
// float32 to bfloat16, up or down in proportion to the distance: the mean is t.
torch::Tensor rounded_to_bfloat16(const torch::Tensor& t);

}  // namespace subbyte::optim
