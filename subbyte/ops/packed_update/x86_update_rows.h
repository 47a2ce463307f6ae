// packed_update over a vector type V: V of quantize (x86_<isa>_vector.h) and what UpdateVector of each x86_*.cc adds. Included
// by x86_*.cc files only, which compile it for their instruction set; V is local to the file, so no instance leaves it.
//
// A row passes through the first-level cache in its moment blocks of 256 columns: gradient, moments and codes become float,
// every group is stepped from input to output arrays (so that a whole vector may run over a group's end: the next group writes
// the surplus again), then the moments are stored on the block's new grid.
#pragma once
#include <cstring>

#include "subbyte/ops/packed_update/update_rule.h"
#include "subbyte/ops/quantize/x86_quantize_rows.h"

namespace subbyte {
namespace {

template <class V>
struct UpdateBlock {
  static constexpr int64_t kRoom = kMomentBlock + V::kLanes;
  alignas(64) float grad[kRoom], m[kRoom], v[kRoom], m_after[kRoom], v_after[kRoom];
  alignas(64) uint8_t codes[kRoom], low[kRoom], codes_after[kRoom], low_after[kRoom], bytes[kRoom];
  // A block starts up to 3 words into its first Philox block; Philox blocks come in steps.
  alignas(64) uint32_t words[kRoom + 8 * V::kBlocks];
};

template <class V>
void load_gradient(const PackedUpdateParams& p, int64_t n, int64_t k, int64_t count, float* out) {
  const void* row = static_cast<const uint8_t*>(p.grad) + n * p.grad_stride * dtype_bytes(p.grad_dtype);
  switch (p.grad_dtype) {
    case DType::kF32: load_piece_as<V, DType::kF32>(row, p.w.perm, k, count, out); break;
    case DType::kF16: load_piece_as<V, DType::kF16>(row, p.w.perm, k, count, out); break;
    case DType::kBF16: load_piece_as<V, DType::kBF16>(row, p.w.perm, k, count, out); break;
    case DType::kF64: load_piece_as<V, DType::kF64>(row, p.w.perm, k, count, out); break;
  }
  V::template store<DType::kF32>(out, count, V::set(0.0f));
}

// Codes of stored columns [k, k + count), one a byte, from one stream or from segments; and back. Segments that do not start on
// a multiple of 8 go code by code.
template <class V>
void unpack_columns(const RowLayout& layout, const uint8_t* row, int64_t k, int64_t count, uint8_t* out) {
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int64_t begin = max_i64(k, s.k_begin) - s.k_begin, end = min_i64(k + count, s.k_begin + s.k_count) - s.k_begin;
    if (begin >= end) continue;
    const int bits = format_bits(s.format);
    const uint8_t* const stream = row + s.byte_begin;
    uint8_t* const to = out + s.k_begin + begin - k;
    if (begin % 8 == 0) {
      V::unpack(stream + begin / 8 * bits, end - begin, bits, to);
    } else {
      for (int64_t j = begin; j < end; ++j) to[j - begin] = uint8_t(get_code(stream, j, bits));
    }
  }
}

template <class V>
void pack_columns(const RowLayout& layout, uint8_t* row, int64_t k, int64_t count, const uint8_t* codes) {
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int64_t begin = max_i64(k, s.k_begin) - s.k_begin, end = min_i64(k + count, s.k_begin + s.k_count) - s.k_begin;
    if (begin >= end) continue;
    const int bits = format_bits(s.format);
    uint8_t* const stream = row + s.byte_begin;
    const uint8_t* const from = codes + s.k_begin + begin - k;
    // A piece that ends inside a byte would clear the bits after it, which belong to the next piece.
    if (begin % 8 == 0 && (end % 8 == 0 || end == s.k_count)) {
      V::pack(from, end - begin, bits, stream + begin / 8 * bits);
    } else {
      for (int64_t j = begin; j < end; ++j) set_code(stream, j, bits, from[j - begin]);
      if (end == s.k_count) clear_spare_bits(stream, s.k_count, bits);
    }
  }
}

// A moment of stored columns [k, k + count) of row n as float; zeros after them.
template <class V, bool kSigned>
void load_moment(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k, int64_t count, float* out,
                 uint8_t* bytes) {
  const uint8_t* const row = static_cast<const uint8_t*>(moment.data) + n * row_bytes;
  switch (moment.type) {
    case MomentType::kNone: std::memset(out, 0, size_t(count) * sizeof(float)); break;
    case MomentType::kF32: load_piece_as<V, DType::kF32>(row, nullptr, k, count, out); break;
    case MomentType::kBF16: load_piece_as<V, DType::kBF16>(row, nullptr, k, count, out); break;
    default: {
      const bool eight = moment.type == MomentType::kQ8;
      const uint8_t* codes = bytes;
      if (!eight) V::unpack(row + k / 2, count, 4, bytes);
      else if (count == kMomentBlock) codes = row + k;
      else std::memcpy(bytes, row + k, size_t(count));
      const MomentGrid grid{kSigned ? signed_levels(moment.type) : unsigned_levels(moment.type),
                            moment.absmax[n * blocks + k / kMomentBlock], 0.0f};
      for (int64_t j = 0; j < count; j += V::kLanes) {
        const typename V::F code = V::load_codes(codes + j);
        V::template store<DType::kF32>(out, j, kSigned ? signed_value<V>(grid, code) : unsigned_value<V>(grid, code));
      }
    }
  }
  V::template store<DType::kF32>(out, count, V::set(0.0f));
}

template <class V, bool kSigned>
void store_moment(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k, int64_t count,
                  const float* values, const uint32_t* words, uint8_t* bytes) {
  constexpr uint32_t kMix = kSigned ? kMixM : kMixV;
  uint8_t* const row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  switch (moment.type) {
    case MomentType::kNone: break;
    case MomentType::kF32: {
      float* const out = reinterpret_cast<float*>(row) + k;
      int64_t j = 0;
      for (; j + V::kLanes <= count; j += V::kLanes)
        V::template store<DType::kF32>(out, j, V::template load<DType::kF32>(values, j));
      for (; j < count; ++j) out[j] = values[j];
      break;
    }
    case MomentType::kBF16: {
      uint16_t* const out = reinterpret_cast<uint16_t*>(row) + k;
      int64_t j = 0;
      for (; j + V::kLanes <= count; j += V::kLanes)
        V::store_stochastic_bf16(out + j, V::template load<DType::kF32>(values, j), words + j, kMix);
      for (; j < count; ++j) out[j] = stochastic_bf16(values[j], words[j] * kMix);
      break;
    }
    default: {
      const bool eight = moment.type == MomentType::kQ8;
      typename V::F largest = V::set(0.0f);
      for (int64_t j = 0; j < count; j += V::kLanes)
        largest = V::max(V::abs(V::template load<DType::kF32>(values, j)), largest);
      const float absmax = stored_absmax(V::reduce_max(largest));
      moment.absmax[n * blocks + k / kMomentBlock] = absmax;
      const bool in_place = eight && count == kMomentBlock;
      uint8_t* const codes = in_place ? row + k : bytes;
      if (absmax == 0.0f) {
        std::memset(codes, 0, size_t(count));
      } else {
        const MomentGrid grid = moment_grid(kSigned ? signed_levels(moment.type) : unsigned_levels(moment.type), absmax);
        for (int64_t j = 0; j < count; j += V::kLanes) {
          const typename V::F value = V::template load<DType::kF32>(values, j), u = V::mixed_uniform(words + j, kMix);
          if constexpr (kSigned) V::store_codes(codes + j, signed_code<V>(grid, value, u));
          else V::store_codes(codes + j, unsigned_code<V>(grid, value, u));
        }
      }
      if (!eight) V::pack(bytes, count, 4, row + k / 2);
      else if (!in_place) std::memcpy(row + k, bytes, size_t(count));
    }
  }
}

template <class V, UpdateRule kRule>
void update_rows_as(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) {
  const PackedMatrix& w = p.w;
  const UpdateNumbers c = update_numbers(p, host_numbers(p));
  const int64_t blocks = ceil_div(w.k, kMomentBlock), groups = w.groups(), residual_bytes = stream_bytes(w.k, p.residual_bits);
  const int64_t m_bytes = moment_row_bytes(p.m.type, w.k), v_bytes = moment_row_bytes(p.v.type, w.k);
  const bool has_residual = p.residual_bits > 0;
  const float span = float(1 << p.residual_bits), inverse_span = 1.0f / span;
  UpdateBlock<V> x;
  std::memset(&x, 0, sizeof(x));
  for (int64_t n = row_begin; n < row_end; ++n) {
    uint8_t* const row = p.codes + n * w.layout.row_bytes;
    uint8_t* const residual = p.residual + n * residual_bytes;
    for (int64_t k = 0; k < w.k; k += kMomentBlock) {
      const int64_t count = min_i64(kMomentBlock, w.k - k);
      load_gradient<V>(p, n, k, count, x.grad);
      load_moment<V, true>(p.m, m_bytes, blocks, n, k, count, x.m, x.bytes);
      if constexpr (kRule == UpdateRule::kAdamW) load_moment<V, false>(p.v, v_bytes, blocks, n, k, count, x.v, x.bytes);
      unpack_columns<V>(w.layout, row, k, count, x.codes);
      if (has_residual) V::unpack(residual + k / 8 * p.residual_bits, count, p.residual_bits, x.low);
      const uint64_t element = (p.first_row + uint64_t(n)) * uint64_t(w.k) + uint64_t(k);
      const int64_t lead = int64_t(element % 4);
      philox_blocks<V>(p.seed, c.offset, element / 4, ceil_div(lead + count, 4), x.words);
      const uint32_t* const words = x.words + lead;
      for (int64_t j = 0; j < count;) {
        const int64_t g = (k + j) / w.group_size, end = min_i64(count, (g + 1) * w.group_size - k), i = n * groups + g;
        const Segment& s = segment_of(w.layout, k + j);
        const GroupStep group =
            group_step(load_float(w.scales, w.scale_dtype, i), group_zero(w, s.format, i), w.zero_kind, p.residual_bits, c);
        const float top = float((format_levels(s.format) << p.residual_bits) - 1);
        for (; j < end; j += V::kLanes) {
          Element<V> e;
          e.m = V::template load<DType::kF32>(x.m, j);
          e.v = V::template load<DType::kF32>(x.v, j);
          const typename V::F high = V::load_codes(x.codes + j);
          e.q = has_residual ? V::add(V::mul(high, V::set(span)), V::load_codes(x.low + j)) : high;
          e = stepped<kRule, V>(c, group, top, V::template load<DType::kF32>(x.grad, j), e, V::uniform(words + j));
          V::template store<DType::kF32>(x.m_after, j, e.m);
          if constexpr (kRule == UpdateRule::kAdamW) V::template store<DType::kF32>(x.v_after, j, e.v);
          typename V::F q = e.q;
          if (has_residual) {
            q = V::floor(V::mul(q, V::set(inverse_span)));
            V::store_codes(x.low_after + j, V::sub(e.q, V::mul(q, V::set(span))));
          }
          V::store_codes(x.codes_after + j, q);
        }
        j = end;
      }
      // What the last group wrote after the block does not count for absmax.
      V::template store<DType::kF32>(x.m_after, count, V::set(0.0f));
      V::template store<DType::kF32>(x.v_after, count, V::set(0.0f));
      pack_columns<V>(w.layout, row, k, count, x.codes_after);
      if (has_residual) V::pack(x.low_after, count, p.residual_bits, residual + k / 8 * p.residual_bits);
      store_moment<V, true>(p.m, m_bytes, blocks, n, k, count, x.m_after, words, x.bytes);
      if constexpr (kRule == UpdateRule::kAdamW)
        store_moment<V, false>(p.v, v_bytes, blocks, n, k, count, x.v_after, words, x.bytes);
    }
  }
}

template <class V>
void update_rows_with(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.rule) {
    case UpdateRule::kAdamW: return update_rows_as<V, UpdateRule::kAdamW>(p, row_begin, row_end);
    case UpdateRule::kSign: return update_rows_as<V, UpdateRule::kSign>(p, row_begin, row_end);
    case UpdateRule::kSgd: return update_rows_as<V, UpdateRule::kSgd>(p, row_begin, row_end);
  }
}

}  // namespace
}  // namespace subbyte
