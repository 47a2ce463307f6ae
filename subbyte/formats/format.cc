#include "subbyte/formats/format.h"

#include <algorithm>
#include <charconv>

#include "subbyte/base/error.h"

namespace subbyte {

const char* format_name(Format f) { return kFormats[int(f)].name; }

Format format_from_name(std::string_view name) {
  for (int i = 0; i < kFormatCount; ++i)
    if (name == kFormats[i].name) return Format(i);
  std::string known;
  for (const FormatInfo& f : kFormats) known += std::string(known.empty() ? "" : ", ") + f.name;
  throw std::invalid_argument(detail::concat("format '", name, "' is unknown, expected one of ", known));
}

Format format_from_bits(int bits) {
  check_arg(bits >= 1 && bits <= 8, "bits is ", bits, ", expected 1 to 8");
  return bits == 1 ? Format::kSign : Format(int(Format::kUint2) + bits - 2);
}

int RowLayout::min_bits() const {
  int b = 8;
  for (int i = 0; i < segment_count; ++i) b = std::min(b, format_bits(segments[i].format));
  return b;
}

int RowLayout::max_bits() const {
  int b = 1;
  for (int i = 0; i < segment_count; ++i) b = std::max(b, format_bits(segments[i].format));
  return b;
}

std::string RowLayout::name() const {
  if (segment_count == 0) return "";
  if (uniform()) return format_name(segments[0].format);
  std::string out;
  for (int i = 0; i < segment_count; ++i) {
    if (i != 0) out += '+';
    out += format_name(segments[i].format);
    out += '*';
    out += std::to_string(segments[i].k_count);
  }
  return out;
}

RowLayout row_layout(Format format, int64_t k) {
  check_arg(k >= 0, "row layout: K is ", k, ", expected at least 0");
  RowLayout out;
  out.k = k;
  out.segment_count = 1;
  out.row_bytes = stream_bytes(k, format_bits(format));
  out.segments[0] = Segment{0, k, 0, format};
  return out;
}

RowLayout row_layout(std::string_view name, int64_t k) {
  if (name.find('*') == std::string_view::npos) return row_layout(format_from_name(name), k);
  check_arg(k >= 0, "row layout: K is ", k, ", expected at least 0");
  RowLayout out;
  out.k = k;
  int64_t begin = 0;
  std::string_view rest = name;
  while (true) {
    const size_t plus = rest.find('+');
    const std::string_view part = rest.substr(0, plus);
    const size_t star = part.find('*');
    check_arg(star != std::string_view::npos, "format '", name, "': segment '", part,
              "' has no column count, expected NAME*COUNT");
    const std::string_view digits = part.substr(star + 1);
    int64_t count = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), count);
    check_arg(parsed.ec == std::errc() && parsed.ptr == digits.data() + digits.size() && count > 0, "format '", name,
              "': column count '", digits, "' is not a positive number");
    check_arg(out.segment_count < RowLayout::kMaxSegments, "format '", name, "' has more than ", int(RowLayout::kMaxSegments),
              " segments");
    check_arg(count <= k - begin, "format '", name, "' describes more than K = ", k, " columns");
    const Format f = format_from_name(part.substr(0, star));
    out.segments[out.segment_count++] = Segment{begin, count, out.row_bytes, f};
    out.row_bytes += stream_bytes(count, format_bits(f));
    begin += count;
    if (plus == std::string_view::npos) break;
    rest = rest.substr(plus + 1);
  }
  check_arg(begin == k, "format '", name, "' describes ", begin, " columns, expected K = ", k);
  return out;
}

}  // namespace subbyte
