// y[m, n] = sum_k xq[m, k] * xs[m, .] * w[n, k] + bias[n]        x quantized to int8 on the way in, integer dot products
//
// Quantization of x, per row (kRow) or per row and weight group (kRowGroup), float32, on x rounded to float32, columns in
// stored order (x[m, perm[k]]):  a = max|x| over the row or group;  xs = a / 127;  xq = rint(x * (127 / a)) in [-127, 127]; a
// below 2^-120 (where 127 / a leaves float32) counts as 0: xs = 0, xq = 0. The same bits on every path. A NaN or infinity in a
// row makes that whole row of y NaN.  BitNet b1.58 (Ma et al. 2024) uses the per-row form.
// Products: d[m,n,g] = sum_{k in g} xq * (q - c), c as in linear.h, exact in int32 (no saturation anywhere) and
// e[m,g] = sum_{k in g} xq exact in int32; then in float32
//   y = sum_g xs * (s[n,g] * d + o[n,g] * e) + bias        o = the weight's value at code c
// A kernel may round parts of d before it adds them (one for each vector lane), so the float32 part is held to
//   |y - y64| <= eps32 * (2 G + 16) * (sum_g |xs| (|s| sum_{k in g} |xq (q - c)| + |o e|) + |bias|) + eps_x |y64|
// against the same formula in double; where all products and sums are integers below 2^24 it is exact.
// Groups of more than 131072 columns leave int32 and are computed by the reference, which sums in int64.
//
// x [M, K], bias [N], y [M, N] float32, float16 or bfloat16 (float64 is refused), strides as in linear.
// M, N, K may be 0; nothing need divide anything. Errors, threads, workspace as in linear.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

// Magnitudes of x below this count as 0.
inline constexpr float kLinearA8SmallestX = 0x1p-120f;

enum class ActivationScale : uint8_t { kRow, kRowGroup };

struct LinearA8Params {
  const void* x = nullptr;
  DType dtype = DType::kF32;  // of x, bias and y
  int64_t m = 0;
  int64_t x_stride = 0;
  ActivationScale x_scale = ActivationScale::kRow;
  PackedMatrix w;
  const void* bias = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t linear_a8_workspace_bytes(const LinearA8Params& p);
void linear_a8(const LinearA8Params& p);
// The checks of the entry that need no content: sizes, strides, missing arrays. Shared by the CPU and CUDA entries.
// False when the result is empty and there is nothing to do.
bool check_sizes(const LinearA8Params& p);

namespace reference {
// The whole op, one thread, double float part.
void linear_a8(const LinearA8Params& p);
}  // namespace reference

}  // namespace subbyte
