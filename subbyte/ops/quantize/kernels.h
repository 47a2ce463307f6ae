// The kernels of quantize and encode and how one is chosen. Every kernel serves every format, mixed width, group size, tail,
// perm, dtype, scheme and rounding, with the same bits.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte {

struct QuantizeKernel {
  const char* name;
  Isa isa;
  // The first of rows [row_begin, row_end) of w that holds a NaN, an infinity or a float64 beyond float32; -1 if none.
  int64_t (*find_bad_row)(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
  // As reference::choose_rows and reference::encode_rows (quantize.h).
  bool (*choose_rows)(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
  void (*encode_rows)(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
};

// Best first; the last row is the reference.
std::span<const QuantizeKernel> quantize_kernels();
// The first row that the instruction set includes.
const QuantizeKernel& select_quantize_kernel(Isa isa);

namespace reference {
int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
}
namespace avx2 {
int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
}  // namespace avx2
namespace avx512 {
int64_t find_bad_row(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
bool choose_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
void encode_rows(const QuantizeParams& p, int64_t row_begin, int64_t row_end) noexcept;
}  // namespace avx512

}  // namespace subbyte
