// Correctly rounded roots and quotients without branches, for arguments whose intermediate results neither overflow nor
// underflow: the sequences that __fsqrt_rn and __fdiv_rn run after they have looked for other arguments. Included by .cu files
// only.
#pragma once

namespace subbyte::cuda {
namespace {

// a in [2^-100, 2^127).
__device__ __forceinline__ float exact_sqrt(float a) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  const float root = __fmul_rn(a, inverse), half = __fmul_rn(inverse, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, a), half, root);
}

// |a| in [2^-60, 2^64], b in [2^-60, 2^60]; a = 0 gives a zero of either sign.
constexpr float kSmallestDividend = 0x1p-60f, kLargestExactDivisor = 0x1p60f;
__device__ __forceinline__ float exact_quotient(float a, float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  const float q = __fmul_rn(a, y);
  return __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
}

}  // namespace
}  // namespace subbyte::cuda
