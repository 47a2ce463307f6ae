// The integer product inside binary_matmul: rows of bits against rows of bits.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/dtype.h"

namespace subbyte {

// Rows are padded with zero bits to a multiple of this many bytes and start on 64 bytes.
inline constexpr int64_t kBitRowAlign = 64;

// counts[m * counts_stride + n] = popcount(x row m xor z row n). Rows lie row_bytes apart, and only their first used_bytes
// bytes, rounded up to row_bytes at most, hold anything but zeros.
using XorCountFn = void (*)(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes,
                            int64_t used_bytes, int32_t* counts, int64_t counts_stride) noexcept;
// Signs of the first elements of a row, as many as the kernel takes at a time: returns how many, a multiple of 8 and at most k.
// Sets `nan` if there is one among them (its bit is 0). float32, float16 and bfloat16; others: returns 0.
using PackSignsFn = int64_t (*)(const void* v, DType dtype, int64_t k, uint8_t* out, bool& nan) noexcept;

struct BinaryMatmulKernel {
  const char* name;
  Isa isa;
  XorCountFn fn;
  PackSignsFn pack;
};

// Best first; the last row is the reference, which serves everything.
std::span<const BinaryMatmulKernel> binary_matmul_kernels();
const BinaryMatmulKernel& select_binary_matmul_kernel(Isa isa);

// Signs of k elements from `begin`: ceil(k/8) bytes, spare bits 0. Returns whether there is a NaN.
bool pack_sign_row(const void* v, DType dtype, int64_t begin, int64_t k, uint8_t* out, PackSignsFn pack) noexcept;

}  // namespace subbyte
