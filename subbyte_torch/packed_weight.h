// A packed weight as a value: its tensors, what they mean, and the leaf that receives its gradient.
#pragma once
#include <torch/types.h>

#include <optional>
#include <string>

#include "subbyte_torch/ops/packed.h"

namespace subbyte {

// How a float matrix is packed.
struct QuantizeOptions {
  // Row layout, "uint4" or "uint8*64+uint4*448"; empty: by `bits` ("sign" for 1, "uint<bits>" for 2 to 8).
  std::string format;
  int bits = 4;
  // Columns that share a scale; 0: one group a row.
  int64_t group_size = 64;
  // Symmetric: no zeros or offsets, the format's fixed zero. sign and ternary are always symmetric.
  bool sym = false;
  // "" chooses: midrise with a residual (unless sym); else minmax when asymmetric, absmean for symmetric sign and ternary,
  // absmax for other symmetric formats. midrise and fan_in lay the levels evenly around 0 (subbyte/ops/quantize/quantize.h).
  std::string scheme;
  // "offsets" or "zeros", when asymmetric.
  std::string zero_kind = "offsets";
  std::optional<torch::ScalarType> scale_dtype;
  torch::Tensor perm;  // int32 [K]; undefined: none
  // More bits a weight for training, below those of the codes; with these at most 8.
  int residual_bits = 0;

  // The options with every default replaced by what it means for K columns. Throws c10::ValueError.
  QuantizeOptions resolved(int64_t in_features) const;
};

struct PackedWeight {
  torch::Tensor codes;           // uint8 [N, row_bytes]
  torch::Tensor scales;          // f32/f16/bf16 [N, G]
  torch::Tensor zeros, offsets;  // [N, G] or undefined; at most one
  torch::Tensor perm;            // int32 [K] or undefined
  std::string format;
  int64_t in_features = 0;
  int64_t group_size = 0;
  // Bits below those of the codes that training keeps, a code stream of residual_bits: uint8 [N, bytes], or undefined and 0.
  // Products read the codes alone, the deployed weight; what writes reads and writes both: the code q = code * 2^r + residual
  // with scale / 2^r and zero * 2^r + (2^r - 1) / 2.
  torch::Tensor residual;
  int residual_bits = 0;

  static PackedWeight quantize(const torch::Tensor& w, const QuantizeOptions& options = {}, bool stochastic = false,
                               int64_t seed = 0, int64_t offset = 0);

  int64_t out_features() const { return codes.size(0); }
  // Of the codes alone, as products use them.
  torch::Tensor dequantize(std::optional<torch::ScalarType> dtype = std::nullopt) const;
  // Of codes and residual together; dequantize() without a residual.
  torch::Tensor dequantize_fine(std::optional<torch::ScalarType> dtype = std::nullopt) const;
  // The weight as it is deployed: the same tensors without the residual; the handle of the result is fresh.
  PackedWeight drop_residual() const;
  // Requantizes dense values on the scales it has. seed and offset choose the random bits of stochastic rounding.
  void encode_(const torch::Tensor& w, bool stochastic = false, int64_t seed = 0, int64_t offset = 0);
  // W <- W + delta, rounded stochastically: unbiased, so that steps below one level are not lost. `delta` is dense [N, K].
  void apply_update_(const torch::Tensor& delta, int64_t seed, int64_t offset);
  // On another device; the handle of the result is fresh.
  PackedWeight to(torch::Device device) const;
  PackedWeight clone() const;
  // Bytes of all parts.
  int64_t bytes() const;

  // A leaf of shape [N, K] with one element of storage that requires grad: pass it to the ops as `weight`, and after backward()
  // its grad() is the dense gradient. Its values mean nothing. Made on first use; shared by copies of this value from then on.
  const torch::Tensor& handle() const;
  // The next handle() is a fresh one, without gradient.
  void forget_handle() { handle_ = torch::Tensor(); }

 private:
  mutable torch::Tensor handle_;
};

// The ops on a PackedWeight. When the handle exists, or `with_gradient`, the dense gradient goes there.
torch::Tensor linear(const torch::Tensor& x, const PackedWeight& w, const OptionalTensor& bias = std::nullopt,
                     bool with_gradient = true);
torch::Tensor linear_a8(const torch::Tensor& x, const PackedWeight& w, const OptionalTensor& bias = std::nullopt,
                        const std::string& x_scale = "row", bool with_gradient = true);
// sparse: the gradient is a sparse tensor of the looked-up rows.
torch::Tensor embedding(const torch::Tensor& indices, const PackedWeight& w, int64_t padding_idx = -1,
                        bool with_gradient = true, bool sparse = false);

}  // namespace subbyte
