#include "subbyte/io/foreign_layout.h"

#include <cstring>

#include "subbyte/base/error.h"

namespace subbyte {
namespace {

constexpr const char* kNames[] = {"sign",     "pack8",        "cpp_col", "bstc", "bstc_truncated", "btc",
                                  "conv_cpp", "conv_cutlass", "uint4",   "q4",   "q4_conv"};

// Canonical 4-bit codes count from -8, the foreign ones are two's complement: the top bit differs.
constexpr unsigned sign_flip(ForeignLayout layout) {
  return layout == ForeignLayout::kQ4 || layout == ForeignLayout::kQ4Conv ? 8u : 0u;
}

void check_layout(ForeignLayout layout, int64_t n, int64_t k, int64_t bytes, const char* what) {
  const char* name = foreign_layout_name(layout);
  if (layout == ForeignLayout::kBtc)
    check_arg(n % 8 == 0 && k % 128 == 0, "relayout: btc holds N = ", n, ", K = ", k,
              " only where N is a multiple of 8 and K of 128");
  check_arg(bytes == foreign_layout_bytes(layout, n, k), "relayout: ", what, " has ", bytes, " bytes, expected ",
            foreign_layout_bytes(layout, n, k), " for ", name, " of N = ", n, ", K = ", k);
}

}  // namespace

ForeignLayout foreign_layout_of(std::string_view name) {
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return ForeignLayout(i);
  check_arg(
      false, "relayout: layout '", name,
      "' is unknown, expected sign, pack8, cpp_col, bstc, bstc_truncated, btc, conv_cpp, conv_cutlass, uint4, q4 or q4_conv");
  return ForeignLayout::kSign;
}

const char* foreign_layout_name(ForeignLayout layout) { return kNames[size_t(layout)]; }

int64_t foreign_layout_missing(ForeignLayout layout, int64_t n, int64_t k) {
  if (layout != ForeignLayout::kBstcTruncated) return 0;
  const int64_t bytes = foreign_layout_bytes(layout, n, k);
  if (bytes == foreign_layout_bytes(ForeignLayout::kBstc, n, k)) return 0;
  int64_t missing = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t byte = 0; byte < ceil_div(k, 8); ++byte)
      if (foreign_layout_place(layout, n, k, row, byte * 8).byte >= bytes) missing += min_i64(8, k - byte * 8);
  return missing;
}

void relayout(const RelayoutParams& p) {
  check_arg(p.n >= 0 && p.k >= 0, "relayout: N = ", p.n, ", K = ", p.k, ", expected at least 0");
  check_arg(p.n == 0 || p.k <= (int64_t(1) << 56) / p.n, "relayout: N = ", p.n, " times K = ", p.k, " is beyond 2^56");
  const int bits = foreign_layout_bits(p.from);
  check_arg(bits == foreign_layout_bits(p.to), "relayout: ", foreign_layout_name(p.from), " has ", bits, " bits an element, ",
            foreign_layout_name(p.to), " has ", foreign_layout_bits(p.to));
  check_layout(p.from, p.n, p.k, p.in_bytes, "the input");
  check_layout(p.to, p.n, p.k, p.out_bytes, "the output");
  check_arg((p.in_bytes == 0 || p.in != nullptr) && (p.out_bytes == 0 || p.out != nullptr), "relayout: an array is missing");
  const int64_t lost = p.missing.has_value() ? 0 : foreign_layout_missing(p.from, p.n, p.k);
  check_arg(lost == 0, "relayout: ", foreign_layout_name(p.from), " of N = ", p.n, ", K = ", p.k, " lacks ", lost,
            " elements, expected a value for them (missing = 0 or 1)");
  check_arg(p.missing.value_or(0) == 0 || *p.missing == 1, "relayout: missing is ", p.missing.value_or(0), ", expected 0 or 1");
  if (p.out_bytes > 0) std::memset(p.out, 0, size_t(p.out_bytes));
  const unsigned mask = (1u << bits) - 1u, flip = sign_flip(p.from) ^ sign_flip(p.to);
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t k = 0; k < p.k; ++k) {
      const CodePlace source = foreign_layout_place(p.from, p.n, p.k, n, k);
      const CodePlace target = foreign_layout_place(p.to, p.n, p.k, n, k);
      if (target.byte >= p.out_bytes) continue;
      const unsigned code =
          source.byte < p.in_bytes ? (unsigned(p.in[source.byte]) >> source.bit) & mask : unsigned(p.missing.value_or(0));
      p.out[target.byte] = uint8_t(p.out[target.byte] | ((code ^ flip) << target.bit));
    }
}

}  // namespace subbyte
