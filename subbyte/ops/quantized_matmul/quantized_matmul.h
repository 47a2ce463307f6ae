// y[b, m, n] = sx * sz * sum_k qx[b, m, k] * qz[b, n, k]        both operands float, quantized to `bits` bits on the way in
//
//   q(v, s) = clamp(rint(v / s), lo, hi), ties to even, lo = -2^(bits-1), hi = 2^(bits-1) - 1        float32
//   sx = max(x_step, eps), sz = max(z_step, eps)
// The steps are those of learned step size quantization (LSQ, Esser et al. 2020); the gradients to x, z and both steps stand in
// the LibTorch layer (quantized_matmul.cpp). bits 4 is the Q4 matmul; 2 to 8 are served.
//
// x  [B, M, K], z [B, N, K], y [B, M, N]: float32, float16, bfloat16 or float64, all of one dtype; rows contiguous, row and
// batch
//    strides in elements (a batch stride of 0 repeats an operand)
// Accumulation: the sum is exact in int32 for K <= 131072 (larger K is refused), then (float(sum) * sx) * sz in float32, one
// rounding an
//    operation (float64: in double), and one rounding to the dtype: the scales are applied before the narrow type is reached.
//    Same bits on every path and thread count.
// An infinity saturates; a NaN in a row of x (or z) makes that row (or column) of y NaN.
// B, M, N, K may be 0 (K = 0 gives zeros); nothing need divide anything.
// Errors: std::invalid_argument for sizes, strides, bits outside 2..8, a step that is NaN or infinite, eps <= 0, missing
// arrays,
//    a workspace that is too small.
// Threads: parallel over B * N. Workspace: quantized_matmul_workspace_bytes() bytes, 64-byte aligned, content ignored.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

struct QuantizedMatmulParams {
  const void* x = nullptr;
  const void* z = nullptr;
  void* y = nullptr;
  DType dtype = DType::kF32;
  int64_t batch = 1, m = 0, n = 0, k = 0;
  int64_t x_stride = 0, x_batch_stride = 0;
  int64_t z_stride = 0, z_batch_stride = 0;
  int64_t y_stride = 0, y_batch_stride = 0;
  int bits = 4;
  float x_step = 1, z_step = 1;
  float eps = 1e-5f;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t quantized_matmul_workspace_bytes(const QuantizedMatmulParams& p);
void quantized_matmul(const QuantizedMatmulParams& p);

namespace reference {
void quantized_matmul(const QuantizedMatmulParams& p) noexcept;
}

}  // namespace subbyte
