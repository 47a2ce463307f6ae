// The float kernels of linear_grad_input, written once for the vector unit of the including file (../linear/x86_simd.h).
//
// Rows (few rows of gy): gy[n] * scale times the decoded fields of row n is added to sums that stay in L1, in the order of the
//   fields, so nothing is shuffled; kN rows at a time share one load and store of a sum. Limited by decoding.
// Tile (many rows): rows of the weight are decoded in column order, a line of codes of each (the lines of one column of blocks
//   share cache sets, so none would survive until the next strip), to panels [n][2 lanes] of several strips that L2 holds. One
//   function serves all widths: each lane picks its bytes and shifts. Decoding in the order of the fields takes a third fewer
//   operations, but a block of 1-bit codes is then 256 or 512 columns wide, of which a narrow matrix fills half. The product:
//   ../linear/x86_tile.h.
#pragma once
#include "subbyte/ops/linear/x86_simd.h"
#include "subbyte/ops/linear/x86_tile.h"
#include "subbyte/ops/linear_grad_input/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kDepth = Simd::kPanelDepth;  // weight rows of a panel
constexpr int64_t kPanelColumns = 128;         // decoded at a time: 128 KiB
constexpr int64_t kMaxSpan = 4096;             // columns of a unit of the rows kernel
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

// Which bytes of 8 (AVX2) or 16 codes each lane takes, and how far it shifts them. A code lies in two bytes at most.
struct SpreadTable {
  alignas(64) uint8_t index[9][64];
  alignas(64) int32_t shift[9][16];
};
constexpr SpreadTable make_spread_table() {
  SpreadTable t{};
  for (int bits = 1; bits <= 8; ++bits)
    for (int lane = 0; lane < 16; ++lane) {
      const int byte = lane * bits / 8;
      t.shift[bits][lane] = lane * bits % 8;
      for (int i = 0; i < 4; ++i) t.index[bits][4 * lane + i] = uint8_t(i < 2 ? byte + i : 0x80);
    }
  return t;
}
constexpr SpreadTable kSpreadTable = make_spread_table();

// panel[strip][n - n0][2 lanes] = w[n][k0 ...] for rows [n0, n0 + depth) and `strips` strips of columns of the segment. Columns
// beyond the segment get values without meaning.
void decode_strips(const WeightSegment& w, int64_t k0, int64_t strips, int64_t n0, int64_t depth, float* panel) noexcept {
  using S = Simd;
  constexpr int64_t kVectors = kPanelColumns / S::kLanes;
  const int bits = format_bits(w.format), centre = format_centre(w.format);
  const int64_t vectors = 2 * strips, vector_bytes = S::kLanes * bits / 8;
  const int64_t read_bytes = (vectors - 1) * vector_bytes + S::kSpreadBytes;
  const S::Int index = S::load_int(kSpreadTable.index[bits]), shift = S::load_int(kSpreadTable.shift[bits]);
  const uint32_t mask = (1u << bits) - 1u, magic = uint32_t(127 + 23) << 23;
  const float bias = 0x1p23f + float(centre);
  const bool has_offset = segment_has_offset(w);
  const int64_t scale_bytes = dtype_bytes(w.scale_dtype), zero_bytes = dtype_bytes(w.zero_dtype);

  // The group of each column, counted from the first one's; a vector mostly lies in one group.
  const int64_t g0 = k0 / w.group_size, g1 = min_i64((k0 + vectors * S::kLanes - 1) / w.group_size + 1, w.groups);
  alignas(64) int32_t group[kPanelColumns];
  bool vectors_cross_groups = false;
  for (int64_t i = 0; i < vectors * S::kLanes; ++i) {
    group[i] = int32_t(min_i64((k0 + i) / w.group_size, w.groups - 1) - g0);
    vectors_cross_groups |= group[i] != group[i / S::kLanes * S::kLanes];
  }
  alignas(64) float scales[kPanelColumns + S::kLanes], offsets[kPanelColumns + S::kLanes];
  alignas(64) uint8_t copy[kPanelColumns + 64];
  for (int64_t r = 0; r < depth; ++r) {
    const int64_t n = n0 + r, first_group = n * w.row_groups + g0;
    const uint8_t* p = w.codes + n * w.row_bytes + k0 / 8 * bits;
    for (int64_t i = 0; i < read_bytes; i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(p + 8 * w.row_bytes + i), _MM_HINT_T0);
    if (w.codes_end - p < read_bytes) [[unlikely]] {
      std::memset(copy, 0, sizeof(copy));
      std::memcpy(copy, p, size_t(w.codes_end - p));
      p = copy;
    }
    float* out = panel + r * kStrip;
    const auto decode = [&](int64_t v) { return S::field(S::spread(p + v * vector_bytes, index, shift), mask, magic, bias); };
    const auto place = [&](int64_t v) { return out + v / 2 * (kDepth * kStrip) + v % 2 * S::kLanes; };
    if (vectors_cross_groups) [[unlikely]] {
      for (int64_t g = g0; g < g1; g += S::kLanes) {
        S::Float scale, offset;
        load_groups(w, n, g, g1 - g, scale, offset);
        S::store(scales + (g - g0), scale);
        S::store(offsets + (g - g0), has_offset ? offset : S::zero());
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int32_t* at = group + v * S::kLanes;
        S::store(place(v), S::fma(decode(v), S::gather(scales, at), S::gather(offsets, at)));
      }
      continue;
    }
    for (int64_t v = 0; v < vectors;) {
      const int32_t g = group[v * S::kLanes];
      const S::Float scale = S::set1(load_one(w.scales + (first_group + g) * scale_bytes, w.scale_dtype));
      S::Float offset = S::zero();
      if (has_offset) {
        const float zero = w.zero_kind == ZeroKind::kFixed ? format_fixed_zero(w.format)
                                                           : load_one(w.zeros + (first_group + g) * zero_bytes, w.zero_dtype);
        offset = group_offset(w.zero_kind, float(centre), scale, S::set1(zero));
      }
      for (; v < vectors && group[v * S::kLanes] == g; ++v) S::store(place(v), S::fma(decode(v), scale, offset));
    }
  }
  static_assert(kVectors * S::kLanes == kPanelColumns);
}

void multiply_tiles_units(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept {
  constexpr int64_t kStrips = kPanelColumns / kStrip;
  const WeightSegment& w = task.w;
  alignas(64) float panel[kStrips * kDepth * kStrip];
  for_row_blocks(task.m, task.m_begin, task.m_end, [&](int64_t tile_first, int64_t tile_last) {
    for (int64_t n = 0; n < w.n; n += kDepth) {
      const int64_t depth = min_i64(kDepth, w.n - n);
      const TileProduct product{task.prepared + n * task.m, task.m, depth, task.out, task.out_stride, n > 0};
      for (int64_t unit = unit_begin; unit < unit_end; unit += kStrips) {
        const int64_t strips = min_i64(kStrips, unit_end - unit);
        decode_strips(w, unit * kStrip, strips, n, depth, panel);
        for (int64_t s = 0; s < strips; ++s) {
          const int64_t k = (unit + s) * kStrip;
          multiply_strip(product, tile_first, tile_last, panel + s * kDepth * kStrip, k, min_i64(kStrip, w.k - k), nullptr);
        }
      }
    }
  });
}

using UnitsFunction = void (*)(const GradInputTask&, int64_t, int64_t) noexcept;
constexpr UnitsFunction kRowsUnits[] = {
#define SB_FORMAT(id, name, bits, levels, fixed_zero) multiply_rows_units<Format::id>,
#include "subbyte/formats/formats.inc"
#undef SB_FORMAT
};

}  // namespace
}  // namespace subbyte
