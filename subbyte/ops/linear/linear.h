// y[m, n] = sum_k x[m, perm[k]] * w[n, k] + bias[n]        w = dequantized weight; weight-only quantization
//
// x     [M, K] float32, float16, bfloat16 or float64, row stride in elements, columns contiguous
// w     packed [N, K], any format, mixed width, zeros or offsets, perm
// bias  [N] of x's dtype, or null
// y     [M, N] of x's dtype, row stride in elements; written whole
// Accumulation: float64 x in double (the reference serves it); the others in float32, rounded once to x's dtype at the end,
// after the bias. With c = levels / 2 (integer division), the middle code rounded up, o = w's value at code c and s the scale,
// every kernel keeps
//   |y - y64| <= eps32 * (min(K, 512) + K / 8 + 16) * sum_k |x| (|s (q - c)| + |o| + |offset|)  +  1.01 * eps_x * |y64|
// plus half of x's smallest subnormal; y64 is that sum in double over the float32 dequantized weights, offset the stored one
// or 0, eps32 = 2^-24, eps_x = dtype_epsilon(x). (A chain of additions is at most 512 long in a block of K, blocks and lanes
// add K / 8. The offset stands in the sum because float32 forms s q + offset at its size.) A symmetric matrix has o = 0: codes
// are centred exactly, nothing cancels. Infinite or NaN x, or x beyond 2^100, make y non-finite without a promise which.
// M, N, K may be 0 (K = 0 gives y = bias); nothing need divide anything.
// Errors: std::invalid_argument for inconsistent sizes, missing arrays, perm out of range, a workspace that is too small.
// Threads: parallel over N. The result does not depend on the number of threads.
// Workspace: linear_workspace_bytes() bytes, 64-byte aligned, content ignored.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

struct LinearParams {
  const void* x = nullptr;
  DType dtype = DType::kF32;  // of x, bias and y
  int64_t m = 0;
  int64_t x_stride = 0;
  PackedMatrix w;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t linear_workspace_bytes(const LinearParams& p);
void linear(const LinearParams& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_sizes(const LinearParams& p);

namespace reference {
// Rows [n_begin, n_end) of the weight, all of M; double accumulation.
void linear_rows(const LinearParams& p, int64_t n_begin, int64_t n_end) noexcept;
}  // namespace reference

}  // namespace subbyte
