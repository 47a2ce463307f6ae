// The float kernels of linear_grad_input, written once for the vector unit of the including file (../linear/x86_simd.h).
//
// Rows (few rows of gy): gy[n] * scale times the decoded fields of row n is added to sums that stay in L1, in the order of the
//   fields, so nothing is shuffled; kN rows at a time share one load and store of a sum. Limited by decoding.
// Tile (many rows): the panel is [n][2 lanes] with columns in the order of the fields, so decoding needs no shuffle either;
//   columns return to their order when gx is written. Limited by the multiply-add of the tile.
#pragma once
#include "subbyte/ops/linear/x86_simd.h"
#include "subbyte/ops/linear_grad_input/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kDepth = 256;     // weight rows of a panel
constexpr int64_t kMaxSpan = 4096;  // columns of a unit of the rows kernel
constexpr int64_t kMaxGroups = kMaxSpan / 4 + 2;

void prepare_rows(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept {
  if (task.prepared == nullptr) return;
  for (int64_t m = m_begin; m < m_end; ++m)
    convert_floats(static_cast<const uint8_t*>(task.gy) + m * task.gy_stride * dtype_bytes(task.dtype), task.dtype, nullptr, 0,
                   task.w.n, task.prepared + m * task.gy_float_stride);
}

void prepare_tiles(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept {
  pack_tiles(static_cast<const uint8_t*>(task.gy), task.dtype, task.gy_stride, nullptr, task.m, task.w.n, task.prepared,
             m_begin, m_end);
}

// ---- few rows of gy ----

// sums[i][block * codes + ...] += gy[m + i][n + r] * s * (q - c) for kM rows of gy and kN rows of the weight, of which the
// first `valid` exist; group_sums[i][g - g0] += gy * o when the segment has offsets.
template <Format kFormat, int kM, int kN>
void add_rows(const GradInputTask& task, int64_t m, int64_t n, int64_t valid, int64_t b0, int64_t b1, float* sums,
              float* group_sums) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  const WeightSegment& w = task.w;
  const uint8_t* row[kN];
  int64_t row_index[kN];
  float gy[kN][kM];
  for (int r = 0; r < kN; ++r) {
    row_index[r] = n + (r < valid ? r : valid - 1);
    row[r] = w.codes + row_index[r] * w.row_bytes;
    for (int i = 0; i < kM; ++i) gy[r][i] = r < valid ? task.gy_float[(m + i) * task.gy_float_stride + row_index[r]] : 0.0f;
  }
  const int64_t g0 = b0 * B::kCodes / w.group_size, g1 = min_i64((b1 * B::kCodes - 1) / w.group_size + 1, w.groups);
  const bool offsets = segment_has_offset(w);
  alignas(64) float scales[kN][kMaxGroups + S::kLanes];
  for (int r = 0; r < kN; ++r)
    for (int64_t g = g0; g < g1; g += S::kLanes) {
      S::Float scale, offset;
      load_groups(w, row_index[r], g, g1 - g, scale, offset);
      S::store(scales[r] + (g - g0), scale);
      if (!offsets || r >= valid) continue;
      for (int i = 0; i < kM; ++i) {
        float* p = group_sums + i * task.group_stride + (g - g0);
        S::store(p, S::fma(S::set1(gy[r][i]), offset, S::load(p)));
      }
    }

  // A last block that the matrix does not fill is read from a copy.
  alignas(64) uint8_t copy[kN][64];
  int64_t readable = b1;
  if (w.codes_end - row[kN - 1] < b1 * B::kBytes) {
    readable = b1 - 1;
    for (int r = 0; r < kN; ++r) {
      const uint8_t* p = row[r] + readable * B::kBytes;
      copy_start(copy[r], p, min_i64(B::kBytes, w.codes_end - p));
    }
  }
  const bool lanes_differ = task.group_map != nullptr;
  for (int64_t begin = b0; begin < b1;) {
    const int64_t group = begin * B::kCodes / w.group_size;
    const int64_t end = lanes_differ ? begin + 1 : w.groups == 1 ? b1 : min_i64(b1, (group + 1) * (w.group_size / B::kCodes));
    S::Float factor[kN][kM];
#pragma GCC unroll 8
    for (int r = 0; r < kN; ++r) {
      const S::Float scale = lanes_differ ? S::permute(S::load(scales[r] + (group - g0)), task.group_map + begin * B::kCodes, 0)
                                          : S::set1(scales[r][group - g0]);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) factor[r][i] = S::mul(S::set1(gy[r][i]), scale);
    }
    for (int64_t b = begin; b < end; ++b) {
      const typename B::Constants* constants = B::constants();
      B v[kN];
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r) v[r] = B::whole(b < readable ? row[r] + b * B::kBytes : copy[r]);
      float* p = sums + (b - b0) * B::kCodes;
#pragma GCC unroll 32
      for (int j = 0; j < B::kFields; ++j) {
        S::Float sum[kM];
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) sum[i] = S::load(p + i * task.k_padded + j * S::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kN; ++r) {
          const S::Float f = v[r].field(j, constants);
#pragma GCC unroll 8
          for (int i = 0; i < kM; ++i) sum[i] = S::fma(factor[r][i], f, sum[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kM; ++i) S::store(p + i * task.k_padded + j * S::kLanes, sum[i]);
      }
    }
    begin = end;
  }
}

template <Format kFormat>
void multiply_rows_units(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  const WeightSegment& w = task.w;
  const int64_t blocks = ceil_div(w.k, int64_t(B::kCodes)), spans = ceil_div(blocks, task.span_blocks);
  const bool offsets = segment_has_offset(w);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t chunk = unit / spans, b0 = unit % spans * task.span_blocks, b1 = min_i64(b0 + task.span_blocks, blocks);
    const int64_t n_end = min_i64((chunk + 1) * kGradInputChunk, w.n);
    float* sums = task.sums + chunk * task.m * task.k_padded + b0 * B::kCodes;
    float* group_sums = offsets ? task.group_sums + unit * task.m * task.group_stride : nullptr;
    for (int64_t m = 0; m < task.m; ++m) {
      for (int64_t k = 0; k < (b1 - b0) * B::kCodes; ++k) sums[m * task.k_padded + k] = 0.0f;
      for (int64_t g = 0; offsets && g < task.group_stride; ++g) group_sums[m * task.group_stride + g] = 0.0f;
    }
    for (int64_t n = chunk * kGradInputChunk; n < n_end; n += 4) {
      const int64_t valid = min_i64(4, n_end - n);
      int64_t m = 0;
      const auto at = [&](int64_t i) { return offsets ? group_sums + i * task.group_stride : nullptr; };
      for (; m + 4 <= task.m; m += 4) {
        add_rows<kFormat, 4, 2>(task, m, n, min_i64(2, valid), b0, b1, sums + m * task.k_padded, at(m));
        if (valid > 2) add_rows<kFormat, 4, 2>(task, m, n + 2, valid - 2, b0, b1, sums + m * task.k_padded, at(m));
      }
      if (m + 2 <= task.m) {
        add_rows<kFormat, 2, 4>(task, m, n, valid, b0, b1, sums + m * task.k_padded, at(m));
        m += 2;
      }
      if (m < task.m) add_rows<kFormat, 1, 4>(task, m, n, valid, b0, b1, sums + m * task.k_padded, at(m));
    }
    // Back to stored column order, with the offsets.
    alignas(64) float natural[B::kCodes];
    for (int64_t m = 0; m < task.m; ++m) {
      int64_t g = 0, g_left = w.group_size - b0 * B::kCodes % w.group_size;
      for (int64_t b = b0; b < b1; ++b) {
        float* p = sums + m * task.k_padded + (b - b0) * B::kCodes;
        for (int i = 0; i < S::kLanes; ++i)
          for (int j = 0; j < B::kFields; ++j) natural[i * B::kFields + j] = p[j * S::kLanes + i];
        for (int64_t i = 0; offsets && i < B::kCodes;) {
          const int64_t run = min_i64(g_left, B::kCodes - i);
          const float offset = group_sums[m * task.group_stride + g];
          for (int64_t e = i + run; i < e; ++i) natural[i] += offset;
          g_left -= run;
          if (g_left == 0) {
            g_left = w.group_size;
            if (g + 1 < task.group_stride) ++g;
          }
        }
        for (int64_t i = 0; i < B::kCodes; ++i) p[i] = natural[i];
      }
    }
  }
}

// ---- many rows of gy ----

// panel[j / 2][n - n0][j % 2] = fields j0 + j of block b of rows [n0, n0 + depth), j < count.
template <Format kFormat, int kFirst, int kCount>
void decode_panel(const GradInputTask& task, int64_t b, int64_t n0, int64_t depth, float* panel) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  const WeightSegment& w = task.w;
  const int64_t g0 = b * B::kCodes / w.group_size, g1 = min_i64(((b + 1) * B::kCodes - 1) / w.group_size + 1, w.groups);
  const int64_t scale_bytes = dtype_bytes(w.scale_dtype), zero_bytes = dtype_bytes(w.zero_dtype);
  const int32_t* map = task.group_map != nullptr ? task.group_map + b * B::kCodes : nullptr;
  const bool groups_end_in_lanes = w.groups > 1 && w.group_size % B::kFields != 0;
  alignas(64) float scales[B::kCodes + S::kLanes], offsets[B::kCodes + S::kLanes];
  const typename B::Constants* constants = B::constants();
  for (int64_t r = 0; r < depth; ++r) {
    const int64_t n = n0 + r, index = n * w.row_groups + g0;
    const uint8_t* p = w.codes + n * w.row_bytes + b * B::kBytes;
    const B v = B::load(p, w.codes_end - p);
    float* out = panel + r * 2 * S::kLanes;
    if (groups_end_in_lanes) {
      for (int64_t g = g0; g < g1; g += S::kLanes) {
        S::Float scale, offset;
        load_groups(w, n, g, g1 - g, scale, offset);
        S::store(scales + (g - g0), scale);
        S::store(offsets + (g - g0), offset);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        const int32_t* at = map + (kFirst + j) * S::kLanes;
        S::store(out + (j / 2) * kDepth * 2 * S::kLanes + j % 2 * S::kLanes,
                 S::fma(v.field(kFirst + j, constants), S::gather(scales, at), S::gather(offsets, at)));
      }
      continue;
    }
    S::Float scale, offset;
    if (map != nullptr) {
      load_groups(w, n, g0, g1 - g0, scale, offset);
      scale = S::permute(scale, map, 0);
      offset = S::permute(offset, map, 0);
    } else {
      scale = S::set1(load_one(w.scales + index * scale_bytes, w.scale_dtype));
      const float zero =
          w.zero_kind == ZeroKind::kFixed ? format_fixed_zero(kFormat) : load_one(w.zeros + index * zero_bytes, w.zero_dtype);
      offset = group_offset(w.zero_kind, float(B::kCentre), scale, S::set1(zero));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j)
      S::store(out + (j / 2) * kDepth * 2 * S::kLanes + j % 2 * S::kLanes,
               S::fma(v.field(kFirst + j, constants), scale, offset));
  }
}

// Columns of the block, fields [kFirst, kFirst + kCount), all rows of gy.
template <Format kFormat, int kFirst, int kCount>
void multiply_tiles_part(const GradInputTask& task, int64_t b) noexcept {
  using S = Simd;
  using B = Block<kFormat>;
  const WeightSegment& w = task.w;
  alignas(64) float panel[kDepth * kCount * S::kLanes];
  const int64_t tiles = ceil_div(task.m, S::kTileRows);
  float* sums = task.sums + b * B::kCodes + kFirst * S::kLanes;
  for (int64_t n = 0; n < w.n; n += kDepth) {
    const int64_t depth = min_i64(kDepth, w.n - n);
    decode_panel<kFormat, kFirst, kCount>(task, b, n, depth, panel);
    for (int64_t t = 0; t < tiles; ++t) {  // outside: a tile's gy stays in L1 over the strips, the panel in L2
      const int64_t m = tile_begin(task.m, t), height = tile_begin(task.m, t + 1) - m;
      for (int strip = 0; strip < kCount / 2; ++strip)
        kTileFunctions[height](task.prepared + m * w.n + n * height, panel + strip * kDepth * 2 * S::kLanes, depth,
                               sums + m * task.k_padded + strip * 2 * S::kLanes, task.k_padded, 2 * S::kLanes, n > 0, nullptr);
    }
  }
  for (int64_t m = 0; m < task.m; ++m) {
    const float* from = sums + m * task.k_padded;
    for (int i = 0; i < S::kLanes; ++i)
      for (int j = 0; j < kCount; ++j) {
        const int64_t k = b * B::kCodes + i * B::kFields + kFirst + j;
        if (k >= w.k) break;
        const int64_t column = task.perm != nullptr ? task.perm[w.k_begin + k] : w.k_begin + k;
        store_float(task.gx, task.dtype, m * task.gx_stride + column, from[j * S::kLanes + i]);
      }
  }
}

template <Format kFormat>
void multiply_tiles_units(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept {
  constexpr int kFields = Block<kFormat>::kFields, kCount = kFields < kGradInputFields ? kFields : int(kGradInputFields);
  constexpr int kParts = kFields / kCount;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t b = unit / kParts;
    switch (unit % kParts) {
      case 0: multiply_tiles_part<kFormat, 0, kCount>(task, b); break;
      case 1: multiply_tiles_part<kFormat, (kParts > 1 ? kCount : 0), kCount>(task, b); break;
      case 2: multiply_tiles_part<kFormat, (kParts > 2 ? 2 * kCount : 0), kCount>(task, b); break;
      default: multiply_tiles_part<kFormat, (kParts > 3 ? 3 * kCount : 0), kCount>(task, b); break;
    }
  }
}

using UnitsFunction = void (*)(const GradInputTask&, int64_t, int64_t) noexcept;
constexpr UnitsFunction kRowsUnits[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) multiply_rows_units<Format::id>,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};
constexpr UnitsFunction kTilesUnits[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) multiply_tiles_units<Format::id>,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};

}  // namespace
}  // namespace subbyte
