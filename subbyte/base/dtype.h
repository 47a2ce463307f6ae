// Float element types of activations, scales and zeros, and their exact conversions.
// float16 and bfloat16 travel as uint16_t bit patterns; conversion to float is exact, conversion from float rounds to
// nearest, ties to even, and keeps NaN and infinity.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

#include "subbyte/base/int_math.h"

namespace subbyte {

enum class DType : uint8_t { kF32, kF16, kBF16, kF64 };

SB_HD constexpr int64_t dtype_bytes(DType t) { return t == DType::kF64 ? 8 : t == DType::kF32 ? 4 : 2; }
// PyTorch's names: "float32", "float16", "bfloat16", "float64".
const char* dtype_name(DType t);
// Unit roundoff: half the distance from 1 to the next number.
SB_HD constexpr double dtype_epsilon(DType t) {
  return t == DType::kF64 ? 0x1p-53 : t == DType::kF32 ? 0x1p-24 : t == DType::kF16 ? 0x1p-11 : 0x1p-8;
}

SB_HD constexpr float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

SB_HD constexpr uint16_t float_to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x0040u);  // NaN stays NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

SB_HD constexpr float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 0x1p-24f;  // subnormal: exact in float
  return sign ? -magnitude : magnitude;
}

SB_HD constexpr uint16_t float_to_f16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (a >= 0x38800000u) {                                 // normal in float16
    const uint32_t r = a - 0x38000000u;
    return uint16_t(sign | ((r + 0xfffu + ((r >> 13) & 1u)) >> 13));
  }
  if (a < 0x33000000u) return uint16_t(sign);  // below half of the smallest subnormal
  const uint32_t shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u;
  const uint32_t q = m >> shift, rest = m & ((1u << shift) - 1u), half = 1u << (shift - 1u);
  return uint16_t(sign | (q + (rest > half || (rest == half && (q & 1u)))));
}

// Element i of an array of type t, as float (float64 is rounded) and as double (exact).
SB_HD float load_float(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::kF32: return static_cast<const float*>(p)[i];
    case DType::kF16: return f16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::kBF16: return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    default: return float(static_cast<const double*>(p)[i]);
  }
}
SB_HD double load_double(const void* p, DType t, int64_t i) {
  return t == DType::kF64 ? static_cast<const double*>(p)[i] : double(load_float(p, t, i));
}
SB_HD void store_float(void* p, DType t, int64_t i, float v) {
  switch (t) {
    case DType::kF32: static_cast<float*>(p)[i] = v; break;
    case DType::kF16: static_cast<uint16_t*>(p)[i] = float_to_f16(v); break;
    case DType::kBF16: static_cast<uint16_t*>(p)[i] = float_to_bf16(v); break;
    default: static_cast<double*>(p)[i] = double(v); break;
  }
}
SB_HD void store_double(void* p, DType t, int64_t i, double v) {
  if (t == DType::kF64) static_cast<double*>(p)[i] = v;
  else store_float(p, t, i, float(v));
}

static_assert(float_to_f16(1.0f) == 0x3c00 && f16_to_float(0x3c00) == 1.0f);
static_assert(float_to_f16(65519.0f) == 0x7bff && float_to_f16(65520.0f) == 0x7c00);
static_assert(float_to_f16(0x1p-24f) == 1 && float_to_f16(0x1p-25f) == 0 && f16_to_float(1) == 0x1p-24f);
static_assert(float_to_bf16(1.00390625f) == 0x3f80 && float_to_bf16(1.01171875f) == 0x3f82);  // ties to even

}  // namespace subbyte
