// What quantized_matmul is made of: the integer product of int8 rows, and the making of such rows.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/dtype.h"
#include "subbyte/ops/quantized_matmul/int8_operands.h"

namespace subbyte {

// sums[m * sums_stride + n] = sum_k x[m, k] * z[n, k] for m in [0, m_count), n in [0, n_count); exact in int32.
// x_stride_bytes and z_stride_bytes are multiples of kInt8RowAlign and hold k_padded columns. |values| <= magnitude.
using Int8DotFn = void (*)(const int8_t* x, int64_t x_stride_bytes, int64_t m_count, const int8_t* z, int64_t z_stride_bytes,
                           int64_t n_count, int64_t k_padded, int magnitude, int32_t* sums, int64_t sums_stride) noexcept;
// Elements [begin, begin + k) of an array of `dtype` on `step` into out, which has room for round_up(k, kInt8RowAlign) bytes;
// what is behind the k-th is left undefined. Returns whether one is NaN.
using Int8QuantizeFn = bool (*)(const void* v, DType dtype, int64_t begin, int64_t k, float step, int bits,
                                int8_t* out) noexcept;
// The same from a canonical stream of k codes.
using Int8UnpackFn = void (*)(const uint8_t* codes, int64_t k, int bits, int8_t* out) noexcept;

struct QuantizedMatmulKernel {
  const char* name;
  Isa isa;
  int max_magnitude;  // the kernel is chosen for operands up to this magnitude
  Int8DotFn fn;
};
struct Int8RowKernel {
  const char* name;
  Isa isa;
  Int8QuantizeFn quantize;
  Int8UnpackFn unpack;
};

// Best first; the last row is the reference, which serves everything.
std::span<const QuantizedMatmulKernel> quantized_matmul_kernels();
const QuantizedMatmulKernel& select_quantized_matmul_kernel(int bits, Isa isa);
std::span<const Int8RowKernel> int8_row_kernels();
const Int8RowKernel& select_int8_row_kernel(Isa isa);

}  // namespace subbyte
