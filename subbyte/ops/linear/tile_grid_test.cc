#include "subbyte/ops/linear/tile_grid.h"

#include <gtest/gtest.h>

#include <vector>

namespace subbyte {
namespace {

TEST(TileGrid, TilesCoverTheRowsAndAreFoundByTheirFirstRow) {
  for (const int64_t tile_rows : {1, 6, 14})
    for (int64_t m = 1; m < 200; ++m) {
      const int64_t tiles = ceil_div(m, tile_rows);
      EXPECT_EQ(tile_first_row(m, tile_rows, 0), 0);
      EXPECT_EQ(tile_first_row(m, tile_rows, tiles), m);
      EXPECT_EQ(tile_from_row(m, tile_rows, m), tiles);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = tile_first_row(m, tile_rows, t), height = tile_first_row(m, tile_rows, t + 1) - row;
        EXPECT_TRUE(height >= 1 && height <= tile_rows) << "m=" << m << " t=" << t;
        EXPECT_EQ(tile_from_row(m, tile_rows, row), t) << "m=" << m;
        EXPECT_EQ(tile_from_row(m, tile_rows, row + 1), t + 1) << "m=" << m;
      }
    }
}

// Every strip of every row lies in exactly one rectangle, however the units are cut into ranges.
TEST(TileGrid, RangesOfUnitsCoverEveryRowOfEveryStripOnce) {
  for (const int64_t m : {1, 5, 47, 64, 333})
    for (const int64_t strips : {1, 2, 7, 63, 64, 100})
      for (const int64_t tile_rows : {6, 14}) {
        const TileGrid grid = TileGrid::make(m, tile_rows, strips);
        EXPECT_TRUE(grid.parts == 1 || m / grid.parts >= 3 * tile_rows) << "parts are high enough to pay for their panels";
        for (const int64_t range : {int64_t(1), int64_t(3), int64_t(10), ceil_div(grid.units(), 3), grid.units()}) {
          std::vector<int> seen(size_t(m * strips));
          for (int64_t begin = 0; begin < grid.units(); begin += range)
            grid.rectangles(begin, min_i64(begin + range, grid.units()), [&](int64_t s0, int64_t s1, int64_t m0, int64_t m1) {
              EXPECT_EQ(tile_first_row(m, tile_rows, tile_from_row(m, tile_rows, m0)), m0);
              EXPECT_LT(s0, s1);
              EXPECT_LT(m0, m1);
              for (int64_t s = s0; s < s1; ++s)
                for (int64_t row = m0; row < m1; ++row) ++seen[size_t(s * m + row)];
            });
          for (const int count : seen) ASSERT_EQ(count, 1) << "m=" << m << " strips=" << strips << " range=" << range;
        }
      }
}

TEST(TileGrid, ManyStripsAreNotCutAndFewAre) {
  EXPECT_EQ(TileGrid::make(512, 6, 256).parts, 1);
  EXPECT_EQ(TileGrid::make(512, 14, 18).parts, 4);
  EXPECT_EQ(TileGrid::make(64, 14, 18).parts, 1);
  EXPECT_EQ(TileGrid::make(64, 6, 36).parts, 2);
}

}  // namespace
}  // namespace subbyte
