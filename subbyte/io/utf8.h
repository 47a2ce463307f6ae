// UTF-8 (Unicode 15, table 3-7: shortest forms, no surrogates). Names and texts of files go into messages, terminals and JSON.
#pragma once
#include <string>
#include <string_view>

namespace subbyte {

// Length of the character that `text` begins with; 0 when its first byte begins none.
int utf8_character_bytes(std::string_view text);
bool is_utf8(std::string_view text);
// `text` with U+FFFD for each byte that is part of no character.
std::string utf8_replaced(std::string_view text);

}  // namespace subbyte
