// y[b, m, n] = sum_k sign(x[b, m, k]) * sign(z[b, n, k]) * scale * second_scale + bias[n]
//            = (K - 2 popcount(bits(x) xor bits(z))) * scale * second_scale + bias[n]
//
// sign(v) = +1 for v >= 0 (also -0), else -1; a bit is 1 for +1, bit k of a row in canonical order (formats/bits.h, "sign").
// Source: Rastegari et al., "XNOR-Net" (2016), without its scales, which the caller multiplies into `scale`.
//
// x      [B, M, K] float32, float16, bfloat16 or float64, rows contiguous, row and batch strides in elements
// z      [B, N, K] in the same form, of any float type: only signs are read; or z_bits u8 [N, ceil(K/8)], the codes of a "sign"
//        matrix, shared by the batch (binary linear)
// scale, second_scale  one float32 (float64 where x is float64), or null for 1; bias [N] of x's dtype, or null
// y      [B, M, N] of x's dtype
// The sum is an exact integer. (float(sum) * scale) * second_scale, then + bias, in float32 (float64: double), rounded once to
// the dtype, so bfloat16 is exact up to that one rounding. Same bits on every path and thread count.
// A NaN in a row of x (or float z) makes that row (or column) of y NaN. A batch stride of 0 repeats an operand.
// B, M, N, K may be 0 (K = 0 gives the bias); nothing need divide anything. Spare bits of z_bits are not read.
// Errors: std::invalid_argument for sizes, strides, both or neither of z and z_bits, missing arrays, a small workspace.
// Threads: parallel over B * N. Workspace: binary_matmul_workspace_bytes() bytes, 64-byte aligned, content ignored.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"

namespace subbyte {

struct BinaryMatmulParams {
  const void* x = nullptr;
  const void* z = nullptr;
  const uint8_t* z_bits = nullptr;
  void* y = nullptr;
  DType dtype = DType::kF32;
  DType z_dtype = DType::kF32;
  int64_t batch = 1, m = 0, n = 0, k = 0;
  int64_t x_stride = 0, x_batch_stride = 0;
  int64_t z_stride = 0, z_batch_stride = 0;
  int64_t y_stride = 0, y_batch_stride = 0;
  const void* scale = nullptr;
  const void* second_scale = nullptr;
  const void* bias = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t binary_matmul_workspace_bytes(const BinaryMatmulParams& p);
void binary_matmul(const BinaryMatmulParams& p);

// What both paths refuse; false when there is nothing to write. Host memory is not read.
bool check_sizes(const BinaryMatmulParams& p);

namespace reference {
void binary_matmul(const BinaryMatmulParams& p) noexcept;
}

}  // namespace subbyte
