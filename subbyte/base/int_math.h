// Integer arithmetic on sizes. All arguments are non-negative.
#pragma once
#include <cstdint>

// Functions that host, device and per-ISA kernel files share have internal linkage on purpose: an inline function with
// external linkage compiled in an AVX-512 file could be the copy the linker keeps for baseline callers.
#if defined(__CUDACC__)
#define SB_HD __host__ __device__ static inline
#define SB_MEMBER_HD __host__ __device__
#else
#define SB_HD [[maybe_unused]] static inline
#define SB_MEMBER_HD [[gnu::always_inline]]
#endif

namespace subbyte {

SB_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
SB_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
SB_HD constexpr int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
SB_HD constexpr int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace subbyte
