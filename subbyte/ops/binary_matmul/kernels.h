// The integer product inside binary_matmul: rows of bits against rows of bits.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"

namespace subbyte {

// Rows are padded with zero bits to a multiple of this many bytes and start on 64 bytes.
inline constexpr int64_t kBitRowAlign = 64;

// counts[m * counts_stride + n] = popcount(x row m xor z row n) over row_bytes bytes.
using XorCountFn = void (*)(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes,
                            int32_t* counts, int64_t counts_stride) noexcept;

struct BinaryMatmulKernel {
  const char* name;
  Isa isa;
  XorCountFn fn;
};

// Best first; the last row is the reference, which serves everything.
std::span<const BinaryMatmulKernel> binary_matmul_kernels();
const BinaryMatmulKernel& select_binary_matmul_kernel(Isa isa);

}  // namespace subbyte
