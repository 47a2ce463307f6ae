// The row decoder over a vector type V (x86_<isa>_vector.h). Included by x86_*.cc files only, which compile it for their
// instruction set; V is local to the file, so no instance of these templates leaves it.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {
namespace {

// value = (code - minus) * scale + plus serves both affine rules bit for bit: with offsets minus is 0, else plus is -0, and
// neither changes any number it is applied to.
struct Affine {
  float scale, minus, plus;
};

inline float load_parameter(const void* p, DType t, int64_t i) {
  if (t == DType::kF32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return t == DType::kF16 ? _cvtsh_ss(h) : bf16_to_float(h);
}

inline Affine load_affine(const PackedMatrix& w, float fixed_zero, int64_t i) {
  const float scale = load_parameter(w.scales, w.scale_dtype, i);
  if (w.zero_kind == ZeroKind::kFixed) return {scale, fixed_zero, -0.0f};
  const float zero = load_parameter(w.zeros, w.zero_dtype, i);
  return w.zero_kind == ZeroKind::kOffsets ? Affine{scale, 0.0f, zero} : Affine{scale, zero, -0.0f};
}

// Columns [k_begin, k_end) of a segment. out is where column k_begin goes; `room` elements may be written there: a whole
// vector is stored at the end of a group where it fits, since the next group writes the surplus again.
template <class V, DType T>
void decode_columns(const PackedMatrix& w, int64_t n, const Segment& s, int64_t k_begin, int64_t k_end, void* out,
                    int64_t room) {
  const int bits = format_bits(s.format);
  const typename V::Fields fields(bits);
  const uint8_t* const stream = w.codes + n * w.layout.row_bytes + s.byte_begin;
  const uint8_t* const end = stream + stream_bytes(s.k_count, bits);
  const int64_t groups = w.groups(), group_first = s.k_begin / w.group_size;
  for (int64_t k = k_begin, g = k_begin / w.group_size; k < k_end; ++g) {
    const int64_t group_end = min_i64(k_end, (g + 1) * w.group_size);
    const Affine a = load_affine(w, format_fixed_zero(s.format), n * groups + group_first + g);
    const typename V::F scale = V::set(a.scale), minus = V::set(a.minus), plus = V::set(a.plus);
    auto value = [&](typename V::F code) { return V::add(V::mul(V::sub(code, minus), scale), plus); };
    const int in_block = int(k % 8) * bits, shift = in_block % 8;
    const uint8_t* p = stream + k / 8 * bits + in_block / 8;
    constexpr int kRuns = V::kLanes / 8;  // runs of 8 codes, `bits` bytes each, in a vector
    for (; k + V::kLanes <= group_end && end - p >= V::Fields::kSafeBytes; k += V::kLanes, p += kRuns * bits)
      V::template store<T>(out, k - k_begin, value(fields.read(p, shift)));
    for (; k < group_end; k += V::kLanes, p += kRuns * bits) {
      const typename V::F v = value(fields.read_before(p, shift, end));
      if (k - k_begin + V::kLanes <= room) {
        V::template store<T>(out, k - k_begin, v);
        continue;
      }
      alignas(64) uint8_t lanes[V::kLanes * 8];
      V::template store<T>(lanes, 0, v);
      const int64_t count = min_i64(V::kLanes, group_end - k);
      std::memcpy(static_cast<uint8_t*>(out) + (k - k_begin) * dtype_bytes(T), lanes, size_t(count * dtype_bytes(T)));
    }
    k = group_end;
  }
}

template <class V, DType T>
void decode_row_as(const PackedMatrix& w, int64_t n, void* out) {
  for (int i = 0; i < w.layout.segment_count; ++i) {
    const Segment& s = w.layout.segments[i];
    if (w.perm == nullptr) {
      decode_columns<V, T>(w, n, s, 0, s.k_count, static_cast<uint8_t*>(out) + s.k_begin * dtype_bytes(T), w.k - s.k_begin);
      continue;
    }
    constexpr int64_t kChunk = 512;
    alignas(64) uint8_t values[kChunk * dtype_bytes(T)];
    for (int64_t k = 0; k < s.k_count; k += kChunk) {
      const int64_t count = min_i64(kChunk, s.k_count - k);
      decode_columns<V, T>(w, n, s, k, k + count, values, kChunk);
      const int32_t* const perm = w.perm + s.k_begin + k;
      for (int64_t j = 0; j < count; ++j) {
        if constexpr (T == DType::kF32) static_cast<float*>(out)[perm[j]] = reinterpret_cast<const float*>(values)[j];
        else if constexpr (T == DType::kF64) static_cast<double*>(out)[perm[j]] = reinterpret_cast<const double*>(values)[j];
        else static_cast<uint16_t*>(out)[perm[j]] = reinterpret_cast<const uint16_t*>(values)[j];
      }
    }
  }
}

template <class V>
void decode_row_any(const PackedMatrix& w, int64_t n, void* out, DType out_dtype) {
  switch (out_dtype) {
    case DType::kF32: return decode_row_as<V, DType::kF32>(w, n, out);
    case DType::kF16: return decode_row_as<V, DType::kF16>(w, n, out);
    case DType::kBF16: return decode_row_as<V, DType::kBF16>(w, n, out);
    case DType::kF64: return decode_row_as<V, DType::kF64>(w, n, out);
  }
}

}  // namespace
}  // namespace subbyte
