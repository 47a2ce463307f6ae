#include "subbyte/io/json_events.h"

#include <iterator>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "subbyte/base/error.h"

namespace subbyte {
namespace {

using nlohmann::json;

// Hands the lexer one character at a time and keeps count, so that errors of meaning carry a position too.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* p, const char** position) : p_(p), position_(position) {}
  reference operator*() const { return *p_; }
  CountingIterator& operator++() {
    *position_ = ++p_;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator old = *this;
    ++*this;
    return old;
  }
  bool operator==(const CountingIterator& o) const { return p_ == o.p_; }
  bool operator!=(const CountingIterator& o) const { return p_ != o.p_; }

 private:
  const char* p_;
  const char** position_;
};

// The parser's messages quote the bytes that it could not read; an error's text is to be UTF-8 all the same.
std::string ascii(std::string_view text) {
  static const char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    const auto u = uint8_t(c);
    if (u < 0x80) out += c;
    else out += std::string("\\x") + kHex[u >> 4] + kHex[u & 15];
  }
  return out;
}

class Handler : public nlohmann::json_sax<json> {
 public:
  Handler(const char* begin, const char** position, const std::string& where, uint64_t base_offset, int max_depth,
          const std::function<void(const JsonEvent&)>& receive)
      : begin_(begin), position_(position), where_(where), base_(base_offset), max_depth_(max_depth), receive_(receive) {}

  bool null() override { return emit(JsonEvent::kOther); }
  bool boolean(bool) override { return emit(JsonEvent::kOther); }
  bool number_integer(number_integer_t) override { return emit(JsonEvent::kOther); }
  bool number_unsigned(number_unsigned_t v) override { return emit(JsonEvent::kUnsigned, empty_, v); }
  bool number_float(number_float_t, const string_t&) override { return emit(JsonEvent::kOther); }
  bool string(string_t& v) override { return emit(JsonEvent::kString, v); }
  bool binary(binary_t&) override { return emit(JsonEvent::kOther); }

  bool start_object(std::size_t) override {
    emit(JsonEvent::kOpenObject);
    open(false);
    return true;
  }
  bool start_array(std::size_t) override {
    if (in_array()) fail("an array inside an array");
    emit(JsonEvent::kOpenArray);
    open(true);
    return true;
  }
  bool key(string_t& k) override {
    Frame& f = frames_.back();
    if (f.has_key) path_.pop_back();
    if (!f.seen.insert(k).second) fail("duplicate key '" + k + "'");
    path_.push_back(k);
    f.has_key = true;
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t, const std::string&, const json::exception& e) override {
    // The library's text begins with an error number and a position of its own; keep what follows.
    const std::string text = e.what();
    const size_t colon = text.find(": ");
    fail("not JSON: " + ascii(std::string_view(text).substr(colon == std::string::npos ? 0 : colon + 2)));
  }

 private:
  struct Frame {
    bool array = false;
    bool has_key = false;
    std::unordered_set<std::string> seen;
  };
  bool in_array() const { return !frames_.empty() && frames_.back().array; }
  uint64_t offset() const { return base_ + uint64_t(*position_ - begin_); }
  [[noreturn]] void fail(const std::string& text) const { throw FormatError(where_, offset(), text); }
  bool emit(JsonEvent::Kind kind, const std::string& text, uint64_t number = 0) {
    receive_(JsonEvent{kind, path_, in_array(), text, number, offset()});
    return true;
  }
  bool emit(JsonEvent::Kind kind) { return emit(kind, empty_); }
  void open(bool array) {
    if (int(frames_.size()) >= max_depth_) fail("nested more than " + std::to_string(max_depth_) + " deep");
    frames_.emplace_back();
    frames_.back().array = array;
  }
  bool close() {
    if (frames_.back().has_key) path_.pop_back();
    frames_.pop_back();
    return emit(JsonEvent::kClose);
  }

  const char* begin_;
  const char** position_;
  const std::string& where_;
  uint64_t base_;
  int max_depth_;
  const std::function<void(const JsonEvent&)>& receive_;
  std::vector<Frame> frames_;
  std::vector<std::string> path_;
  std::string empty_;
};

}  // namespace

void parse_json(std::span<const uint8_t> text, const std::string& where, uint64_t base_offset, int max_depth,
                const std::function<void(const JsonEvent&)>& receive) {
  const char* begin = reinterpret_cast<const char*>(text.data());
  const char* position = begin;
  Handler handler(begin, &position, where, base_offset, max_depth, receive);
  json::sax_parse(CountingIterator(begin, &position), CountingIterator(begin + text.size(), &position), &handler,
                  json::input_format_t::json, /*strict=*/true);
}

std::string json_quoted(const std::string& text, const char* what) {
  try {
    return json(text).dump();
  } catch (const json::exception&) {
    throw std::invalid_argument(detail::concat(what, " is not valid UTF-8"));
  }
}

}  // namespace subbyte
