// How the product of many rows is cut: rows of x into tiles that fit the registers, and for threads into rectangles of strips
// (columns of the result that share a panel) and parts of the rows.
#pragma once
#include "subbyte/base/int_math.h"

namespace subbyte {

// First row of tile t (m for one past the last) when m rows are cut into ceil(m / tile_rows) tiles of nearly equal height.
SB_HD int64_t tile_first_row(int64_t m, int64_t tile_rows, int64_t t) { return t * m / ceil_div(m, tile_rows); }
// The first tile that begins at `row` or after it.
SB_HD int64_t tile_from_row(int64_t m, int64_t tile_rows, int64_t row) { return ceil_div(row * ceil_div(m, tile_rows), m); }

// Units of work, numbered strip by strip: with few strips each is cut into parts of the rows as well, so that any number of
// threads gets equal shares. A part decodes its panel for itself: parts are no lower than four tiles.
struct TileGrid {
  int64_t m = 0, tile_rows = 1, strips = 0, parts = 1;

  static TileGrid make(int64_t m, int64_t tile_rows, int64_t strips) {
    constexpr int64_t kUnits = 64, kPartTiles = 4;
    const int64_t most = max_i64(1, ceil_div(m, tile_rows) / kPartTiles);
    return {m, tile_rows, strips, min_i64(most, ceil_div(kUnits, max_i64(1, strips)))};
  }
  int64_t units() const { return strips * parts; }
  int64_t first_row(int64_t part) const { return tile_first_row(m, tile_rows, part * ceil_div(m, tile_rows) / parts); }
  // f(strip_begin, strip_end, m_begin, m_end) for at most three rectangles that make up units [begin, end).
  template <class F>
  void rectangles(int64_t begin, int64_t end, F&& f) const {
    int64_t strip = begin / parts;
    const int64_t part = begin % parts, last_strip = end / parts, last_part = end % parts;
    if (strip == last_strip) {
      if (part < last_part) f(strip, strip + 1, first_row(part), first_row(last_part));
      return;
    }
    if (part > 0) {
      f(strip, strip + 1, first_row(part), m);
      ++strip;
    }
    if (strip < last_strip) f(strip, last_strip, int64_t(0), m);
    if (last_part > 0) f(last_strip, last_strip + 1, int64_t(0), first_row(last_part));
  }
};

}  // namespace subbyte
