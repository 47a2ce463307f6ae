// Many rows of x: the blocked product that linear and linear_grad_input share, for the vector unit of the including file.
//
//   c [M, columns] (+)= a [M, depth] * panel [depth][2 vectors]
//
// a is packed once, block of depth by block of depth, in the order that the register tile reads (pack_tiles). A block of
// Simd::kRowBlock rows and kPanelDepth of a stays in L2 while strip after strip is decoded to a panel that stays in L1, and the
// tile is limited by its multiply-adds: AVX2 6x16 at depth 256 reaches 93 to 96 % of their peak on Zen 3, a read from L2. The
// blocks must lie together: with a in one piece a tile (rows of 4096 apart) lines of a evict each other, 84 %. Deeper panels
// (384, 512) and an unrolled loop gained nothing.
#pragma once
#include "subbyte/ops/linear/tile_grid.h"
#include "subbyte/ops/linear/x86_simd.h"

namespace subbyte {
namespace {

constexpr int kStrip = 2 * Simd::kLanes;  // columns of a panel

SB_INLINE int64_t tile_begin(int64_t m, int64_t t) { return tile_first_row(m, Simd::kTileRows, t); }

// Rows of x to a = [depth blocks][tiles][depth][rows of the tile], for the tiles that begin in rows [m_begin, m_end). x may
// have any float type but float64; column k is perm[k] when there is perm.
[[maybe_unused]] void pack_tiles(const uint8_t* x, DType t, int64_t x_stride, const int32_t* perm, int64_t m, int64_t k_count,
                                 float* a, int64_t m_begin, int64_t m_end) noexcept {
  using S = Simd;
  constexpr int kLanes = S::kLanes, kRun = 128;  // columns converted at a time
  static_assert(S::kPanelDepth % kRun == 0);
  const int64_t bytes = dtype_bytes(t), last = tile_from_row(m, S::kTileRows, m_end);
  alignas(64) float converted[S::kTileRows][kRun];
  for (int64_t tile = tile_from_row(m, S::kTileRows, m_begin); tile < last; ++tile) {
    const int64_t first = tile_begin(m, tile), height = tile_begin(m, tile + 1) - first;
    for (int64_t k = 0; k < k_count; k += kRun) {
      const int64_t block = k / S::kPanelDepth * S::kPanelDepth, depth = min_i64(S::kPanelDepth, k_count - block);
      const int64_t count = min_i64(kRun, k_count - k);
      float* const out = a + block * m + first * depth + (k - block) * height;
      // A vector stored for one k reaches into the next ones; the last of the block must not reach beyond it.
      const int64_t room = (depth - (k - block)) * height - kLanes;
      const float* rows[kLanes];
      for (int64_t r = 0; r < height; ++r) {
        const uint8_t* from = x + (first + r) * x_stride * bytes;
        if (t == DType::kF32 && perm == nullptr && count == kRun) {
          rows[r] = reinterpret_cast<const float*>(from) + k;
        } else {
          convert_floats(from, t, perm, k, count, converted[r]);
          rows[r] = converted[r];
        }
      }
      for (int64_t i = 0; i < count; i += kLanes) {
        S::Int v[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) v[r] = r < height ? S::as_int(S::load(rows[r] + i)) : S::zero_int();
        S::transpose(v);
        for (int64_t j = 0; j < kLanes && i + j < count; ++j) {
          float* to = out + (i + j) * height;
          if ((i + j) * height <= room) [[likely]] {
            S::store(to, S::as_float(v[j]));
          } else {
            alignas(64) float column[kLanes];
            S::store(column, S::as_float(v[j]));
            for (int64_t r = 0; r < height; ++r) to[r] = column[r];
          }
        }
      }
    }
  }
}

// c[r][0, 2 lanes) = (add ? c : 0) + sum_k a[k][r] panel[k][.] + bias, for kRows rows; `columns` of them are written.
template <int kRows>
void multiply_tile(const float* a, const float* panel, int64_t depth, float* c, int64_t c_stride, int64_t columns, bool add,
                   const float* bias) noexcept {
  using S = Simd;
  constexpr int kLanes = S::kLanes;
  // The sums so far come from L3 or memory; asked for now, they are there when the products are.
  for (int r = 0; r < kRows; ++r)
    for (int64_t i = 0; i < columns; i += 16) _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride + i), _MM_HINT_T0);
  S::Float sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = S::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const S::Float b0 = S::load(panel), b1 = S::load(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const S::Float v = S::set1(a[r]);
      sum[r][0] = S::fma(v, b0, sum[r][0]);
      sum[r][1] = S::fma(v, b1, sum[r][1]);
    }
    a += kRows;
    panel += kStrip;
  }
  if (columns == kStrip) [[likely]] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        float* p = c + r * c_stride + h * kLanes;
        S::Float v = sum[r][h];
        if (add) v = S::add(S::load(p), v);
        if (bias != nullptr) v = S::add(v, S::load(bias + h * kLanes));
        S::store(p, v);
      }
    return;
  }
  alignas(64) float row[kStrip];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    S::store(row, sum[r][0]);
    S::store(row + kLanes, sum[r][1]);
    for (int64_t i = 0; i < columns; ++i) {
      float v = add ? c[r * c_stride + i] + row[i] : row[i];
      if (bias != nullptr) v += bias[i];
      c[r * c_stride + i] = v;
    }
  }
}

using TileFunction = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, bool, const float*) noexcept;
constexpr TileFunction kTileFunctions[] = {
    nullptr,           multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,
    multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
#if defined(__AVX512F__)
    multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,  multiply_tile<10>,
    multiply_tile<11>, multiply_tile<12>, multiply_tile<13>, multiply_tile<14>,
#endif
};
static_assert(sizeof(kTileFunctions) / sizeof(kTileFunctions[0]) == Simd::kTileRows + 1);

// The product with one block of depth of a; c and bias at the strip's first column, c at row 0.
struct TileProduct {
  const float* a;  // the depth block, see pack_tiles
  int64_t m = 0, depth = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool add = false;
};

SB_INLINE void multiply_strip(const TileProduct& p, int64_t tile_first, int64_t tile_last, const float* panel, int64_t column,
                              int64_t columns, const float* bias) {
  for (int64_t t = tile_first; t < tile_last; ++t) {
    const int64_t row = tile_begin(p.m, t), height = tile_begin(p.m, t + 1) - row;
    kTileFunctions[height](p.a + row * p.depth, panel, p.depth, p.c + row * p.c_stride + column, p.c_stride, columns, p.add,
                           bias != nullptr ? bias + column : nullptr);
  }
}

// f(tile_first, tile_last) for blocks of rows that L2 holds, of nearly equal height.
template <class F>
SB_INLINE void for_row_blocks(int64_t m, int64_t m_begin, int64_t m_end, F&& f) {
  const int64_t first = tile_from_row(m, Simd::kTileRows, m_begin), last = tile_from_row(m, Simd::kTileRows, m_end);
  const int64_t blocks = ceil_div((last - first) * Simd::kTileRows, Simd::kRowBlock);
  for (int64_t b = 0; b < blocks; ++b) f(first + b * (last - first) / blocks, first + (b + 1) * (last - first) / blocks);
}

}  // namespace
}  // namespace subbyte
