#include "subbyte/io/utf8.h"

#include <gtest/gtest.h>

namespace subbyte {
namespace {

using namespace std::string_literals;

TEST(Utf8, TakesWhatTheTableOfUnicodeTakes) {
  for (const std::string& good : {""s, "a"s, "\0"s, "\x7f"s, "\xc2\x80"s, "\xdf\xbf"s, "\xe0\xa0\x80"s, "\xed\x9f\xbf"s,
                                  "\xee\x80\x80"s, "\xef\xbf\xbf"s, "\xf0\x90\x80\x80"s, "\xf4\x8f\xbf\xbf"s, "a\xc3\xa9z"s})
    EXPECT_TRUE(is_utf8(good)) << good;
  for (const std::string& bad :
       {"\x80"s, "\xbf"s, "\xc0\x80"s, "\xc1\xbf"s, "\xc2"s, "\xc2z"s, "\xe0\x9f\xbf"s, "\xe1\x80"s, "\xed\xa0\x80"s,
        "\xf0\x8f\xbf\xbf"s, "\xf0\x90\x80"s, "\xf4\x90\x80\x80"s, "\xf5\x80\x80\x80"s, "\xff"s, "ok\xfe"s})
    EXPECT_FALSE(is_utf8(bad));
}

TEST(Utf8, ReplacesBytesThatBelongToNoCharacter) {
  EXPECT_EQ(utf8_replaced("a\xff\xc3\xa9\xe2\x82"), "a\xef\xbf\xbd\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd");
  EXPECT_EQ(utf8_replaced("plain"), "plain");
  EXPECT_EQ(utf8_character_bytes(""), 0);
  EXPECT_EQ(utf8_character_bytes("\xf0\x9f\x98\x80!"), 4);
}

}  // namespace
}  // namespace subbyte
