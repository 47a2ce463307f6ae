// The kernels that turn a packed row into numbers, shared by dequantize and embedding, and how one is chosen. Every kernel
// serves every format, mixed width, group size, tail, perm and dtype.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

// out [K] of out_dtype, contiguous: entry perm[k] (or k) is the value of code k of row n.
using DecodeRow = void (*)(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept;

struct DecodeKernel {
  const char* name;
  Isa isa;
  DecodeRow decode_row;
};

// Best first; the last row is the reference.
std::span<const DecodeKernel> decode_kernels();
// The first row that the instruction set includes.
const DecodeKernel& select_decode_kernel(Isa isa);

namespace reference {
void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept;
}
namespace avx2 {
void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept;
}
namespace avx512 {
void decode_row(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) noexcept;
}

}  // namespace subbyte
