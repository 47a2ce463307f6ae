// The float kernels of linear, written once for the vector unit of the including file (x86_simd.h).
//
// Rows (few rows of x): each weight row is a stream that is read once; kN rows advance together so that x and the mask, magic
//   and bias constants of a field are loaded once for kN uses and kN * kM sums hide the latency of the multiply-add. x was
//   put into the order of the fields beforehand. A group's sum stays unscaled until the group (or, for groups smaller than a
//   block, the block) ends. Limited by decoding (4 operations a vector of codes) below 8 bits, by memory at 8 bits.
// Tile (many rows): lanes x lanes dwords of packed codes are transposed, which costs 1 / fields of a transpose of floats, and
//   each field of a transposed dword is one column of the panel. The product: x86_tile.h.
#pragma once
#include "subbyte/ops/linear/kernels.h"
#include "subbyte/ops/linear/x86_simd.h"
#include "subbyte/ops/linear/x86_tile.h"

namespace subbyte {
namespace {

constexpr int kGroupChunk = 256;  // groups whose scales are converted at a time

// ---- preparing x ----

// dst[j * lanes + lane] = src[lane * fields + j]
template <int kFields>
SB_INLINE void to_field_order(const float* src, float* dst) {
  for (int j = 0; j < kFields; ++j)
    for (int i = 0; i < Simd::kLanes; ++i) dst[j * Simd::kLanes + i] = src[i * kFields + j];
}

SB_INLINE float sum_floats(const float* x, int64_t count) {
  Simd::Float sum = Simd::zero();
  int64_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) sum = Simd::add(sum, Simd::load(x + i));
  float rest = 0;
  for (; i < count; ++i) rest += x[i];
  return Simd::sum(sum) + rest;
}

void prepare_rows(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept {
  const int fields = lane_codes(format_bits(w.format));
  const int64_t block = Simd::kLanes * fields, blocks = ceil_div(w.k, block);
  if (in.lane_groups != nullptr && m_begin == 0) {
    int64_t g = 0, left = w.group_size;
    for (int64_t i = 0; i < blocks * Simd::kLanes; ++i) {
      in.lane_groups[i] = int32_t(g);
      left -= fields;
      if (left == 0) {
        left = w.group_size;
        if (g + 1 < w.groups) ++g;
      }
    }
  }
  const int32_t* perm = in.perm != nullptr ? in.perm + w.k_begin : nullptr;
  const int64_t bytes = dtype_bytes(in.dtype);
  alignas(64) float natural[Simd::kLanes * 32];
  for (int64_t m = m_begin; m < m_end; ++m) {
    const uint8_t* x = static_cast<const uint8_t*>(in.x) + (m * in.x_stride + (perm == nullptr ? w.k_begin : 0)) * bytes;
    float* out = in.prepared + m * blocks * block;
    float* sums = in.sums != nullptr ? in.sums + m * in.sums_stride : nullptr;
    if (sums != nullptr)
      for (int64_t g = 0; g < in.sums_stride; ++g) sums[g] = 0.0f;
    int64_t g = 0, g_left = w.group_size;
    for (int64_t k = 0; k < w.k; k += block) {
      const int64_t count = min_i64(block, w.k - k);
      const float* src = natural;
      if (in.dtype == DType::kF32 && perm == nullptr && count == block) {
        src = reinterpret_cast<const float*>(x) + k;
      } else {
        convert_floats(x, in.dtype, perm, k, count, natural);
        for (int64_t i = count; i < block; ++i) natural[i] = 0.0f;
      }
      switch (fields) {
        case 4: to_field_order<4>(src, out + k); break;
        case 8: to_field_order<8>(src, out + k); break;
        case 16: to_field_order<16>(src, out + k); break;
        default: to_field_order<32>(src, out + k); break;
      }
      for (int64_t i = 0; sums != nullptr && i < count;) {
        const int64_t run = min_i64(g_left, count - i);
        sums[g] += sum_floats(src + i, run);
        i += run;
        g_left -= run;
        if (g_left == 0) ++g, g_left = w.group_size;
      }
    }
  }
}

void prepare_tiles(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept {
  const int32_t* perm = in.perm != nullptr ? in.perm + w.k_begin : nullptr;
  const uint8_t* x = static_cast<const uint8_t*>(in.x) + (perm == nullptr ? w.k_begin * dtype_bytes(in.dtype) : 0);
  pack_tiles(x, in.dtype, in.x_stride, perm, in.m, w.k, in.prepared, m_begin, m_end);
}

// ---- few rows of x ----

// kM rows of x from row m on with kN rows of the weight, of which the first `valid` exist.
template <Format kFormat, int kM, int kN>
void multiply_rows(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t m, int64_t n,
                   int64_t valid) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  const int64_t blocks = ceil_div(w.k, int64_t(B::kCodes)), x_stride = blocks * B::kCodes;
  const float* x = in.prepared + m * x_stride;
  const uint8_t* row[kN];
  int64_t row_index[kN];
  for (int r = 0; r < kN; ++r) {
    row_index[r] = n + (r < valid ? r : valid - 1);
    row[r] = w.codes + row_index[r] * w.row_bytes;
  }
  // A last block that the matrix does not fill is read from a copy.
  alignas(64) uint8_t copy[kN][64];
  int64_t readable = blocks;
  if (w.codes_end - row[kN - 1] < blocks * B::kBytes) {
    readable = blocks - 1;
    for (int r = 0; r < kN; ++r) {
      const uint8_t* p = row[r] + readable * B::kBytes;
      copy_start(copy[r], p, min_i64(B::kBytes, w.codes_end - p));
    }
  }
  S::Float total[kN][kM];
#pragma GCC unroll 8
  for (int r = 0; r < kN; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) total[r][i] = S::zero();

  if (segment_has_offset(w)) {
    for (int64_t g = 0; g < w.groups; g += S::kLanes) {
      const int64_t count = min_i64(S::kLanes, w.groups - g);
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r) {
        S::Float scale, offset;
        load_groups(w, row_index[r], g, count, scale, offset);
        if (count < S::kLanes) offset = S::first_lanes(offset, count);
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) total[r][i] = S::fma(offset, S::load(in.sums + (m + i) * in.sums_stride + g), total[r][i]);
      }
    }
  }

  // A run of blocks has one vector of scales: the blocks of a group, or one block whose lanes lie in several groups.
  const bool lanes_differ = in.lane_groups != nullptr;
  const int64_t run = w.groups == 1 ? blocks : lanes_differ ? 1 : w.group_size / B::kCodes;
  const int64_t chunk = lanes_differ ? (kGroupChunk - 1) * w.group_size / B::kCodes : kGroupChunk * run;
  alignas(64) float scales[kN][kGroupChunk + S::kLanes];
  for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
    const int64_t b1 = min_i64(b0 + chunk, blocks);
    const int64_t g0 = lanes_differ ? in.lane_groups[b0 * S::kLanes] : w.groups == 1 ? 0 : b0 / run;
    const int64_t g1 = lanes_differ ? in.lane_groups[b1 * S::kLanes - 1] + 1 : min_i64(g0 + kGroupChunk, w.groups);
    for (int r = 0; r < kN; ++r)
      for (int64_t g = g0; g < g1; g += S::kLanes) {
        const uint8_t* p = w.scales + (row_index[r] * w.row_groups + g) * dtype_bytes(w.scale_dtype);
        S::store(scales[r] + (g - g0), load_floats(p, w.scale_dtype, w.scales_end, g1 - g));
      }
    int64_t group = 0;
    for (int64_t begin = b0; begin < b1; begin += run, ++group) {
      const int64_t end = min_i64(begin + run, b1);
      S::Float sum[kN][kM];
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) sum[r][i] = S::zero();
      for (int64_t b = begin; b < end; ++b) {
        const typename B::Constants* constants = B::constants();  // here: loaded where used, not spilled before the loop
        B v[kN];
#pragma GCC unroll 8
        for (int r = 0; r < kN; ++r) v[r] = B::whole(b < readable ? row[r] + b * B::kBytes : copy[r]);
        const float* xb = x + b * B::kCodes;
#pragma GCC unroll 32
        for (int j = 0; j < B::kFields; ++j) {
#pragma GCC unroll 8
          for (int r = 0; r < kN; ++r) {
            const S::Float f = v[r].field(j, constants);
#pragma GCC unroll 8
            for (int i = 0; i < kM; ++i) sum[r][i] = S::fma(f, S::load(xb + i * x_stride + j * S::kLanes), sum[r][i]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r) {
        S::Float scale;
        if (lanes_differ) {
          const int32_t* index = in.lane_groups + begin * S::kLanes;
          scale = S::permute(S::load(scales[r] + (index[0] - g0)), index, index[0]);
        } else {
          scale = S::set1(scales[r][group]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) total[r][i] = S::fma(sum[r][i], scale, total[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kN; ++r) {
    if (r >= valid) break;
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      float* p = out.out + (m + i) * out.stride + n + r;
      float v = S::sum(total[r][i]);
      if (out.accumulate) v += *p;
      if (out.bias != nullptr) v += out.bias[n + r];
      *p = v;
    }
  }
}

template <Format kFormat>
void multiply_rows_range(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin,
                         int64_t n_end) noexcept {
  for (int64_t n = n_begin; n < n_end; n += 4) {
    const int64_t valid = min_i64(4, n_end - n);
    int64_t m = 0;
    for (; m + 4 <= in.m; m += 4) {
      multiply_rows<kFormat, 4, 2>(w, in, out, m, n, min_i64(2, valid));
      if (valid > 2) multiply_rows<kFormat, 4, 2>(w, in, out, m, n + 2, valid - 2);
    }
    if (m + 2 <= in.m) {
      multiply_rows<kFormat, 2, 4>(w, in, out, m, n, valid);
      m += 2;
    }
    if (m < in.m) multiply_rows<kFormat, 1, 4>(w, in, out, m, n, valid);
  }
}

// ---- many rows of x ----

// Element i of kStrip rows, `stride` elements apart, as float32; rows from `valid` on are 0.
SB_INLINE void load_column(const uint8_t* p, DType t, int64_t stride, int64_t valid, float* out) {
  using S = Simd;
  if (t == DType::kF32) {
    for (int64_t r = 0; r < kStrip; ++r) out[r] = r < valid ? load_one(p + 4 * r * stride, t) : 0.0f;
    return;
  }
  alignas(64) uint16_t column[kStrip];
  for (int64_t r = 0; r < kStrip; ++r) {
    column[r] = 0;
    if (r < valid) std::memcpy(column + r, p + 2 * r * stride, 2);
  }
  for (int64_t h = 0; h < kStrip; h += S::kLanes)
    S::store(out + h, t == DType::kF16 ? S::load_f16(column + h) : S::load_bf16(column + h));
}

// panel[k][0, 2 lanes) = w[n .. n + valid)[k0 + k] for k < depth (k0 a multiple of kPanelDepth), zeros for rows that do not
// exist. Up to 31 more k may be written.
template <Format kFormat>
void decode_panel(const WeightSegment& w, int64_t n, int64_t valid, int64_t k0, int64_t depth, float* panel) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  alignas(64) float scale[(S::kPanelDepth + 1) * kStrip];
  alignas(64) float offset[(S::kPanelDepth + 1) * kStrip];
  const int64_t g0 = k0 / w.group_size, g1 = (k0 + depth - 1) / w.group_size + 1;
  const bool has_offset = segment_has_offset(w);
  for (int64_t g = g0; g < g1; ++g) {
    float* s = scale + (g - g0) * kStrip;
    float* o = offset + (g - g0) * kStrip;
    const int64_t i = n * w.row_groups + g;
    load_column(w.scales + i * dtype_bytes(w.scale_dtype), w.scale_dtype, w.row_groups, valid, s);
    if (w.zero_kind != ZeroKind::kFixed)
      load_column(w.zeros + i * dtype_bytes(w.zero_dtype), w.zero_dtype, w.row_groups, valid, o);
    for (int h = 0; h < kStrip; h += S::kLanes) {
      const S::Float zero = w.zero_kind == ZeroKind::kFixed ? S::set1(format_fixed_zero(kFormat)) : S::load(o + h);
      S::store(o + h, has_offset ? group_offset(w.zero_kind, float(B::kCentre), S::load(s + h), zero) : S::zero());
    }
  }
  const typename B::Constants* constants = B::constants();
  const bool groups_end_in_lanes = w.groups > 1 && w.group_size % B::kFields != 0;
  for (int h = 0; h < 2; ++h) {
    const int64_t first = h * S::kLanes;
    float* out = panel + first;
    int64_t g = 0, g_left = w.group_size - k0 % w.group_size;
    for (int64_t k = 0; k < depth; k += B::kCodes) {
      S::Int v[S::kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < S::kLanes; ++r) {
        if (first + r >= valid) {
          v[r] = S::zero_int();
          continue;
        }
        const uint8_t* p = w.codes + (n + first + r) * w.row_bytes + (k0 + k) / 8 * B::kBits;
        v[r] = B::load(p, w.codes_end - p).low;
        _mm_prefetch(reinterpret_cast<const char*>(p + kStrip * w.row_bytes), _MM_HINT_T0);  // the next strip
      }
      S::transpose(v);
      if (!groups_end_in_lanes) {
        for (int i = 0; i < S::kLanes && k + i * B::kFields < depth; ++i) {
          const B lane = B::of(v[i]);
          const S::Float s = S::load(scale + g * kStrip + first), o = S::load(offset + g * kStrip + first);
#pragma GCC unroll 32
          for (int j = 0; j < B::kFields; ++j) S::store(out + j * kStrip, S::fma(lane.field(j, constants), s, o));
          out += B::kFields * kStrip;
          g_left -= B::kFields;
          if (g_left == 0) ++g, g_left = w.group_size;
        }
      } else {
        for (int i = 0; i < S::kLanes && k + i * B::kFields < depth; ++i) {
          const B lane = B::of(v[i]);
          alignas(64) int64_t group[B::kFields];
          for (int j = 0; j < B::kFields; ++j) {
            group[j] = min_i64(g, g1 - g0 - 1) * kStrip + first;
            if (--g_left == 0) ++g, g_left = w.group_size;
          }
#pragma GCC unroll 32
          for (int j = 0; j < B::kFields; ++j)
            S::store(out + j * kStrip, S::fma(lane.field(j, constants), S::load(scale + group[j]), S::load(offset + group[j])));
          out += B::kFields * kStrip;
        }
      }
    }
  }
}

using DecodeFunction = void (*)(const WeightSegment&, int64_t, int64_t, int64_t, int64_t, float*) noexcept;
constexpr DecodeFunction kDecodePanel[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) decode_panel<Format::id>,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};

void multiply_tiles_range(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin,
                          int64_t n_end) noexcept {
  using S = Simd;
  alignas(64) float panel[(S::kPanelDepth + 32) * kStrip];
  const DecodeFunction decode = kDecodePanel[int(w.format)];
  for_row_blocks(in.m, out.m_begin, out.m_end, [&](int64_t tile_first, int64_t tile_last) {
    for (int64_t k = 0; k < w.k; k += S::kPanelDepth) {
      const int64_t depth = min_i64(S::kPanelDepth, w.k - k);
      const TileProduct product{in.prepared + k * in.m, in.m, depth, out.out, out.stride, out.accumulate || k > 0};
      const float* bias = k + depth == w.k ? out.bias : nullptr;
      for (int64_t n = n_begin; n < n_end; n += kStrip) {
        const int64_t columns = min_i64(kStrip, n_end - n);
        decode(w, n, columns, k, depth, panel);
        multiply_strip(product, tile_first, tile_last, panel, n, columns, bias);
      }
    }
  });
}

using RangeFunction = void (*)(const WeightSegment&, const LinearInput&, const LinearOutput&, int64_t, int64_t) noexcept;
constexpr RangeFunction kRowsRange[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) multiply_rows_range<Format::id>,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};

}  // namespace
}  // namespace subbyte
