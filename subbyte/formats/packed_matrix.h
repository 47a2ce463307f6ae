// A packed weight matrix W [N, K]: N output features (rows), K input features (columns).
//
//   part      type, shape                 meaning
//   codes     u8 [N, row_bytes]           canonical code streams (bits.h), row-major, no gap between rows
//   scales    f32/f16/bf16 [N, G]         G = ceil(K / group_size); the last group may be short
//   zeros     f32/f16/bf16 [N, G]         optional; in units of codes (GPTQ, AWQ), fractions allowed
//   offsets   f32/f16/bf16 [N, G]         optional, instead of zeros; in units of values (GGUF Q4_1)
//   perm      i32 [K]                     optional; stored column k is input feature perm[k]
//
// Meaning of a stored code q in row n, stored column k, group g = k / group_size, all in float32, one rounding an operation:
//   with offsets:              w = scale * q + offset
//   with zeros, or neither:    w = scale * (q - zero)         zero = the format's fixed zero when there are no zeros
// Both are spelled out because each is the exact value of the files that use it; in particular scale * (q - zero) is exact up
// to one rounding where scale * q - scale * zero would round three times.
//
// With mixed width every segment but the last must end on a multiple of group_size, so a group has one width.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"
#include "subbyte/formats/format.h"

namespace subbyte {

enum class ZeroKind : uint8_t { kFixed, kZeros, kOffsets };

// A view: owns no memory. The pointers are host or device pointers, as the op that takes the view says.
struct PackedMatrix {
  RowLayout layout;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_size = 0;
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  const void* zeros = nullptr;  // zeros or offsets, as zero_kind says; null when kFixed
  const int32_t* perm = nullptr;
  DType scale_dtype = DType::kF32;
  DType zero_dtype = DType::kF32;
  ZeroKind zero_kind = ZeroKind::kFixed;

  SB_MEMBER_HD int64_t groups() const { return group_size > 0 ? ceil_div(k, group_size) : 0; }
  SB_MEMBER_HD int64_t codes_bytes() const { return n * layout.row_bytes; }
};

// Throws std::invalid_argument naming `op` when sizes contradict each other: negative n or k, group_size < 1, a layout for
// another k, a segment boundary inside a group, float64 scales, missing pointers of non-empty parts.
void validate(const PackedMatrix& w, const char* op);
// Throws std::invalid_argument when an entry of perm (host memory) is outside [0, K). O(K); CPU ops call it, so that no
// content of a file can make them read or write out of bounds.
void validate_perm(const PackedMatrix& w, const char* op);

// One value by the rule above. `zero` is the zero, offset or fixed zero that `kind` asks for.
SB_HD constexpr float affine_value(float code, float scale, float zero, ZeroKind kind) {
#if defined(__CUDA_ARCH__)
  return kind == ZeroKind::kOffsets ? __fadd_rn(__fmul_rn(scale, code), zero) : __fmul_rn(scale, __fsub_rn(code, zero));
#else
  if (kind == ZeroKind::kOffsets) {
    const float product = scale * code;
    return product + zero;
  }
  return scale * (code - zero);
#endif
}

// Zero of group g in row n for a segment of format f (row-major [N, G] index i = n * G + g).
SB_HD float group_zero(const PackedMatrix& w, Format f, int64_t i) {
  return w.zero_kind == ZeroKind::kFixed ? format_fixed_zero(f) : load_float(w.zeros, w.zero_dtype, i);
}

// The segment that holds stored column k.
SB_HD const Segment& segment_of(const RowLayout& layout, int64_t k) {
  int s = 0;
  while (s + 1 < layout.segment_count && k >= layout.segments[s + 1].k_begin) ++s;
  return layout.segments[s];
}

// Code and value of stored column k in row n; the definition that every kernel is held to.
SB_HD uint32_t packed_code(const PackedMatrix& w, int64_t n, int64_t k) {
  const Segment& s = segment_of(w.layout, k);
  return get_code(w.codes + n * w.layout.row_bytes + s.byte_begin, k - s.k_begin, format_bits(s.format));
}
SB_HD float packed_value(const PackedMatrix& w, int64_t n, int64_t k) {
  const int64_t i = n * w.groups() + k / w.group_size;
  return affine_value(float(packed_code(w, n, k)), load_float(w.scales, w.scale_dtype, i),
                      group_zero(w, segment_of(w.layout, k).format, i), w.zero_kind);
}

}  // namespace subbyte
