// gx[m, perm[k]] = sum_n gy[m, n] * w[n, k]        the gradient of linear to x
//
// gy    [M, N] float32, float16, bfloat16 or float64, row stride in elements
// w     packed [N, K] as in linear
// gx    [M, K] of gy's dtype, row stride in elements; written whole (N = 0 gives zeros)
// Accumulation: float64 in double, the others in float32, rounded once at the end; the error bound of linear with the sum over
// n in place of k:
//   |gx - gx64| <= eps32 * (min(N, 512) + N / 8 + 16) * sum_n |gy| (|s (q - c)| + |o| + |offset|)  +  1.01 * eps_gy * |gx64|
// M, N, K may be 0. Errors as in linear. Threads: parallel over columns, and with few rows over chunks of 512 weight rows whose
// sums are added in order, so the result does not depend on the number of threads.
// Workspace: linear_grad_input_workspace_bytes() bytes, 64-byte aligned, content ignored.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

struct LinearGradInputParams {
  const void* gy = nullptr;
  DType dtype = DType::kF32;  // of gy and gx
  int64_t m = 0;
  int64_t gy_stride = 0;
  PackedMatrix w;
  void* gx = nullptr;
  int64_t gx_stride = 0;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t linear_grad_input_workspace_bytes(const LinearGradInputParams& p);
void linear_grad_input(const LinearGradInputParams& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_sizes(const LinearGradInputParams& p);

namespace reference {
// Stored columns [k_begin, k_end), all of M; double accumulation.
void linear_grad_input_columns(const LinearGradInputParams& p, int64_t k_begin, int64_t k_end) noexcept;
}  // namespace reference

}  // namespace subbyte
