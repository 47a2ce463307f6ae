#include "subbyte/formats/format.h"

#include <gtest/gtest.h>

namespace subbyte {
namespace {

TEST(RowLayout, NameOfAMixedRowParsesBackToTheSameLayout) {
  const RowLayout a = row_layout("uint8*64+uint4*100+sign*3", 167);
  EXPECT_EQ(a.segment_count, 3);
  EXPECT_EQ(a.segments[1].byte_begin, 64);
  EXPECT_EQ(a.segments[2].byte_begin, 114);
  EXPECT_EQ(a.row_bytes, 115);
  EXPECT_EQ(a.name(), "uint8*64+uint4*100+sign*3");
}

TEST(RowLayout, RefusesCountsThatDoNotAddUpToK) {
  EXPECT_THROW(row_layout("uint8*64+uint4*100", 165), std::invalid_argument);
  EXPECT_THROW(row_layout("uint8*64+uint4*100", 163), std::invalid_argument);
  EXPECT_THROW(row_layout("uint8*64+uint4", 164), std::invalid_argument);
  EXPECT_THROW(row_layout("uint9", 1), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
