#include "subbyte/io/utf8.h"

#include <cstdint>

namespace subbyte {

int utf8_character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? unsigned(uint8_t(text[i])) : 0u; };
  const auto follows = [&](size_t i, unsigned low = 0x80, unsigned high = 0xbf) { return byte(i) >= low && byte(i) <= high; };
  const unsigned b = byte(0);
  if (text.empty()) return 0;
  if (b < 0x80) return 1;
  if (b >= 0xc2 && b <= 0xdf) return follows(1) ? 2 : 0;
  if (b >= 0xe0 && b <= 0xef) return follows(1, b == 0xe0 ? 0xa0 : 0x80, b == 0xed ? 0x9f : 0xbf) && follows(2) ? 3 : 0;
  if (b >= 0xf0 && b <= 0xf4)
    return follows(1, b == 0xf0 ? 0x90 : 0x80, b == 0xf4 ? 0x8f : 0xbf) && follows(2) && follows(3) ? 4 : 0;
  return 0;
}

bool is_utf8(std::string_view text) {
  for (int bytes = 0; !text.empty(); text.remove_prefix(size_t(bytes)))
    if ((bytes = utf8_character_bytes(text)) == 0) return false;
  return true;
}

std::string utf8_replaced(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const int bytes = utf8_character_bytes(text);
    out += bytes > 0 ? text.substr(0, size_t(bytes)) : std::string_view("\xef\xbf\xbd");
    text.remove_prefix(bytes > 0 ? size_t(bytes) : 1);
  }
  return out;
}

}  // namespace subbyte
