// y[b, m, n] = sx * sz * sum_k qx[b, m, k] * qz[b, n, k] + bias[n]     both operands of `bits` bits on one step each
//
//   q(v, s) = clamp(rint(v / s), lo, hi), ties to even, lo = -2^(bits-1), hi = 2^(bits-1) - 1        float32
//   sx = max(*x_step, eps), sz = max(*z_step, eps)
// The steps are those of learned step size quantization (LSQ, Esser et al. 2020); the gradients stand in the LibTorch layer
// (step_gradient.h). bits 4 is the Q4 matmul and the Q4 linear layer; 2 to 8 are served.
//
// x        [B, M, K] float32, float16, bfloat16 or float64, quantized on the way in; rows contiguous, row and batch strides in
//          elements (a batch stride of 0 repeats an operand)
// z        [B, N, K] of z_dtype, any of these four, quantized on the way in; strides as x. Or, instead of it,
// z_codes  u8 [N, stream_bytes(K, bits)], a canonical stream of codes q + 2^(bits-1), the same for the whole batch: what a
// layer
//          with packed weights holds. z_step is then its scale. The same bits as from the float z it was packed from.
// bias     [N] of dtype, or null
// y        [B, M, N] of dtype, which is also x's
// x_step, z_step   one float32 each, in host memory here, in device memory for cuda::quantized_matmul
// Accumulation: the sum is exact in int32 for K <= 131072 (larger K is refused), then (float(sum) * sx) * sz + bias in float32,
// one rounding an operation (float64: in double), and one rounding to the dtype: the scales are applied before the narrow type
// is reached. Same bits on every path and thread count.
// An infinity saturates; a NaN in a row of x (or z) makes that row (or column) of y NaN.
// B, M, N, K may be 0 (K = 0 gives the bias); nothing need divide anything.
// Errors: std::invalid_argument for sizes, strides, bits outside 2..8, a step that is NaN or infinite, eps <= 0, both or
// neither
//         of z and z_codes, missing arrays, a workspace that is too small.
// Threads: parallel over B * N. Workspace: quantized_matmul_workspace_bytes() bytes, 64-byte aligned, content ignored.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

struct QuantizedMatmulParams {
  const void* x = nullptr;
  const void* z = nullptr;
  const uint8_t* z_codes = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  DType dtype = DType::kF32;
  DType z_dtype = DType::kF32;
  int64_t batch = 1, m = 0, n = 0, k = 0;
  int64_t x_stride = 0, x_batch_stride = 0;
  int64_t z_stride = 0, z_batch_stride = 0;
  int64_t y_stride = 0, y_batch_stride = 0;
  int bits = 4;
  const float* x_step = nullptr;
  const float* z_step = nullptr;
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
