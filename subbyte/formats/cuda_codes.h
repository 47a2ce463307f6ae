// Device-side reading of canonical streams and of affine parameters. Included by .cu files only.
// Codes are read eight at a time: eight codes of b bits are b bytes, so a run of eight starts on a byte whenever its first
// column is a multiple of eight within its segment.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "subbyte/formats/packed_matrix.h"

namespace subbyte::cuda {
namespace {

// Where codes may be read: no byte outside [begin, end) is touched.
struct CodeSpan {
  const uint8_t* begin;
  const uint8_t* end;
};

// The 32-bit word at p (4-byte aligned); bytes outside the span read as zero.
__device__ __forceinline__ uint32_t load_word(const uint8_t* p, CodeSpan span) {
  if (p >= span.begin && span.end - p >= 4) return __ldg(reinterpret_cast<const uint32_t*>(p));
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i)
    if (p + i >= span.begin && p + i < span.end) v |= uint32_t(p[i]) << (8 * i);
  return v;
}

// `count` bits (1..64) that start `bit` bits after `row`; higher bits of the result are whatever follows them.
__device__ __forceinline__ uint64_t load_bits(const uint8_t* row, int64_t bit, int count, CodeSpan span) {
  const uint8_t* p = row + bit / 8;
  const unsigned misaligned = unsigned(reinterpret_cast<uintptr_t>(p) & 3u);
  const unsigned shift = misaligned * 8 + unsigned(bit & 7);  // below 32
  p -= misaligned;
  const uint32_t w0 = load_word(p, span);
  const uint32_t w1 = shift + count > 32 ? load_word(p + 4, span) : 0u;
  const uint32_t w2 = shift + count > 64 ? load_word(p + 8, span) : 0u;
  return uint64_t(__funnelshift_r(w1, w2, shift)) << 32 | __funnelshift_r(w0, w1, shift);
}

// An integer below 2^23 as float, exactly, without the slow conversion unit.
__device__ __forceinline__ float small_to_float(uint32_t v) { return __fsub_rn(__uint_as_float(0x4B000000u | v), 8388608.0f); }

__device__ __forceinline__ float load_param(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::kF32: return __ldg(static_cast<const float*>(p) + i);
    case DType::kF16: return __half2float(__ushort_as_half(__ldg(static_cast<const unsigned short*>(p) + i)));
    default: return __uint_as_float(uint32_t(__ldg(static_cast<const unsigned short*>(p) + i)) << 16);
  }
}

// Scale and zero (or offset) of group index i = n * G + g in a segment whose fixed zero is given.
struct GroupParams {
  float scale, zero;
};
__device__ __forceinline__ GroupParams load_group(const PackedMatrix& w, float fixed_zero, int64_t i) {
  GroupParams g;
  g.scale = load_param(w.scales, w.scale_dtype, i);
  g.zero = w.zero_kind == ZeroKind::kFixed ? fixed_zero : load_param(w.zeros, w.zero_dtype, i);
  return g;
}

// Activations by type: exact conversion to float (or double), one rounding back.
template <DType kType>
struct Elem;
template <>
struct Elem<DType::kF32> {
  using Storage = float;
  using Sum = float;
  __device__ static Sum load(float v) { return v; }
  __device__ static float store(float v) { return v; }
};
template <>
struct Elem<DType::kF64> {
  using Storage = double;
  using Sum = double;
  __device__ static Sum load(double v) { return v; }
  __device__ static double store(double v) { return v; }
};
template <>
struct Elem<DType::kF16> {
  using Storage = unsigned short;
  using Sum = float;
  __device__ static Sum load(unsigned short v) { return __half2float(__ushort_as_half(v)); }
  __device__ static unsigned short store(float v) { return __half_as_ushort(__float2half_rn(v)); }
};
template <>
struct Elem<DType::kBF16> {
  using Storage = unsigned short;
  using Sum = float;
  __device__ static Sum load(unsigned short v) { return __uint_as_float(uint32_t(v) << 16); }
  __device__ static unsigned short store(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
};

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Calls f(std::integral_constant-like tag) for a run-time type.
template <DType kType>
struct TypeTag {
  static constexpr DType value = kType;
};
template <class F>
void dispatch_dtype(DType t, F&& f) {
  switch (t) {
    case DType::kF32: f(TypeTag<DType::kF32>{}); break;
    case DType::kF16: f(TypeTag<DType::kF16>{}); break;
    case DType::kBF16: f(TypeTag<DType::kBF16>{}); break;
    case DType::kF64: f(TypeTag<DType::kF64>{}); break;
  }
}

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0; }

}  // namespace
}  // namespace subbyte::cuda
