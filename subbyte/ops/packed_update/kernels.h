// The kernels of packed_update and how one is chosen. Every kernel serves every format, mixed width, group size, tail, perm,
// dtype, rule and moment type, with the same bits.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/packed_update/packed_update.h"

namespace subbyte {

struct PackedUpdateKernel {
  const char* name;
  Isa isa;
  // Rows [row_begin, row_end), as reference::update_rows.
  void (*update_rows)(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept;
};

// Best first; the last row is the reference.
std::span<const PackedUpdateKernel> packed_update_kernels();
// The first row that the instruction set includes.
const PackedUpdateKernel& select_packed_update_kernel(Isa isa);

namespace avx2 {
void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept;
}
namespace avx512 {
void update_rows(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) noexcept;
}

}  // namespace subbyte
