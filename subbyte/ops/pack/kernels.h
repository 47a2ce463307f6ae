// The kernels of pack and unpack and how one is chosen. A kernel moves one run of codes of one width; pack.cc walks rows and
// segments. Every kernel serves every width and count.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"

namespace subbyte {

// codes u8 [count], each below 2^bits  ->  stream u8 [stream_bytes(count, bits)], written whole; spare bits zero.
using PackCodes = void (*)(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept;
using UnpackCodes = void (*)(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept;

struct PackKernel {
  const char* name;
  Isa isa;
  PackCodes pack;
  UnpackCodes unpack;
};

// Best first; the last row is the reference.
std::span<const PackKernel> pack_kernels();
// The first row that the instruction set includes.
const PackKernel& select_pack_kernel(Isa isa);

namespace reference {
void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept;
void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept;
}  // namespace reference
namespace avx2 {
void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept;
void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept;
}  // namespace avx2
namespace avx512 {
void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* stream) noexcept;
void unpack_codes(const uint8_t* stream, int64_t count, int bits, uint8_t* codes) noexcept;
}  // namespace avx512

}  // namespace subbyte
