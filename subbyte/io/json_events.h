// JSON text as a stream of events: no tree is built, so memory stays proportional to what the receiver keeps plus the keys of
// the objects that are open. Stricter than JSON where checkpoints need it: duplicate keys, nesting beyond `max_depth`, arrays
// inside arrays and text after the value (other than white space) are errors.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace subbyte {

struct JsonEvent {
  enum Kind : uint8_t {
    kOpenObject,
    kOpenArray,
    kClose,
    kString,
    kUnsigned,
    kOther
  };  // kOther: negative, fraction, bool, null
  Kind kind = kOther;
  // Keys that lead here. A member's own key is the last entry; an element of an array has its array's path.
  const std::vector<std::string>& path;
  bool in_array = false;
  const std::string& text;    // of kString
  uint64_t number = 0;        // of kUnsigned
  uint64_t offset_bytes = 0;  // a position inside or just after the value
};

// Throws FormatError (`where`, offset counted from base_offset) for anything that is not such JSON; exceptions of `receive`
// pass.
void parse_json(std::span<const uint8_t> text, const std::string& where, uint64_t base_offset, int max_depth,
                const std::function<void(const JsonEvent&)>& receive);

// `text` as a JSON string literal, quotes included. Bytes that are not UTF-8 throw std::invalid_argument naming `what`.
std::string json_quoted(const std::string& text, const char* what);

}  // namespace subbyte
