// The integer product inside quantized_matmul: rows of int8 against rows of int8.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"

namespace subbyte {

// Rows are padded with zeros to a multiple of this many columns and start on 64 bytes.
inline constexpr int64_t kInt8RowAlign = 64;

// sums[m * sums_stride + n] = sum_k x[m, k] * z[n, k] for m in [0, m_count), n in [0, n_count); exact in int32.
// x_stride_bytes and z_stride_bytes are multiples of kInt8RowAlign and hold k_padded columns. |values| <= magnitude.
using Int8DotFn = void (*)(const int8_t* x, int64_t x_stride_bytes, int64_t m_count, const int8_t* z, int64_t z_stride_bytes,
                           int64_t n_count, int64_t k_padded, int magnitude, int32_t* sums, int64_t sums_stride) noexcept;

struct QuantizedMatmulKernel {
  const char* name;
  Isa isa;
  int max_magnitude;  // the kernel is chosen for operands up to this magnitude
  Int8DotFn fn;
};

// Best first; the last row is the reference, which serves everything.
std::span<const QuantizedMatmulKernel> quantized_matmul_kernels();
const QuantizedMatmulKernel& select_quantized_matmul_kernel(int bits, Isa isa);

}  // namespace subbyte
