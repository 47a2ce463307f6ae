// Sums: the row decoder of dequantize and an addition, so every format and instruction set is served. Majority: the votes are
// counted for 64 columns at a time in bit planes, a ripple-carry add of one-bit words (two operations a row and 64 columns on
// average), and compared with ceil(L / 2) plane by plane; a decoded row would cost 256 bytes for the same 8.
#include "subbyte/ops/embedding_bag/embedding_bag.h"

#include <cstring>
#include <vector>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/dequantize/kernels.h"

namespace subbyte {
namespace {

// Look-ups are counted in 64 bits, so 63 planes hold any number of votes.
constexpr int kPlanes = 63;

uint64_t load_columns(const uint8_t* row, int64_t byte, int64_t row_bytes) {
  uint64_t v = 0;
  std::memcpy(&v, row + byte, size_t(min_i64(8, row_bytes - byte)));
  return v;
}

void majority(const EmbeddingBagParams& p, int64_t b, void* out) {
  const int64_t row_bytes = p.table.layout.row_bytes;
  for (int64_t byte = 0; byte < row_bytes; byte += 8) {
    uint64_t planes[kPlanes] = {};
    int used = 0;
    int64_t voters = 0;
    for (int64_t j = p.begin(b); j < p.end(b); ++j) {
      const int64_t index = p.index(j);
      if (index == p.padding_idx) continue;
      ++voters;
      uint64_t carry = load_columns(p.table.codes + index * row_bytes, byte, row_bytes);
      for (int i = 0; carry != 0; ++i) {
        const uint64_t both = planes[i] & carry;
        planes[i] ^= carry;
        carry = both;
        if (i >= used) used = i + 1;
      }
    }
    // votes >= need, column by column, from the highest plane down: equal so far, or decided.
    const uint64_t need = uint64_t(voters) - uint64_t(voters) / 2;
    uint64_t equal = ~uint64_t(0), above = 0;
    for (int i = kPlanes - 1; i >= 0; --i) {
      if (i >= used && (need >> i) == 0) continue;
      const uint64_t wanted = (need >> i & 1) != 0 ? ~uint64_t(0) : 0;
      above |= equal & planes[i] & ~wanted;
      equal &= ~(planes[i] ^ wanted);
    }
    const uint64_t won = above | equal;
    for (int64_t k = byte * 8; k < min_i64(p.table.k, byte * 8 + 64); ++k)
      store_float(out, p.out_dtype, p.table.perm != nullptr ? p.table.perm[k] : k,
                  voters == 0                        ? 0.0f
                  : (won >> (k - byte * 8) & 1) != 0 ? 1.0f
                                                     : -1.0f);
  }
}

void sum(const EmbeddingBagParams& p, int64_t b, DecodeRow decode_row, float* row, float* total, void* out) {
  const int64_t k_count = p.table.k;
  std::memset(total, 0, size_t(k_count) * sizeof(float));
  int64_t counted = 0;
  for (int64_t j = p.begin(b); j < p.end(b); ++j) {
    const int64_t index = p.index(j);
    if (index == p.padding_idx) continue;
    ++counted;
    decode_row(p.table, index, row, DType::kF32);
    if (p.weights != nullptr) {
      const float weight = p.weights[j];
      for (int64_t k = 0; k < k_count; ++k) {
        const float product = weight * row[k];
        total[k] += product;
      }
    } else {
      for (int64_t k = 0; k < k_count; ++k) total[k] += row[k];
    }
  }
  const float divisor = p.mode == BagMode::kMean && counted > 0 ? float(counted) : 1.0f;
  for (int64_t k = 0; k < k_count; ++k) store_float(out, p.out_dtype, k, total[k] / divisor);
}

}  // namespace

bool check_sizes(const EmbeddingBagParams& p) {
  validate(p.table, "embedding_bag");
  check_arg(p.bags >= 0 && p.count >= 0, "embedding_bag: ", p.bags, " bags, ", p.count, " indices, expected at least 0");
  check_arg(p.offsets != nullptr || (p.bag_size >= 0 && p.count == p.bags * p.bag_size), "embedding_bag: ", p.count,
            " indices, expected ", p.bags, " bags of ", p.bag_size);
  check_arg(p.bags <= 1 || p.out_stride >= p.table.k, "embedding_bag: row stride ", p.out_stride, " is below K = ", p.table.k);
  check_arg(p.weights == nullptr || p.mode == BagMode::kSum, "embedding_bag: weights of look-ups go with the sum alone");
  if (p.mode == BagMode::kMajority)
    for (int s = 0; s < p.table.layout.segment_count; ++s)
      check_arg(p.table.layout.segment_count == 1 && p.table.layout.segments[s].format == Format::kSign,
                "embedding_bag: a majority needs one-bit codes, the table is ", p.table.layout.name());
  if (p.bags == 0) return false;
  check_arg(p.count == 0 || p.indices != nullptr, "embedding_bag: indices are missing");
  check_arg(p.table.k == 0 || p.out != nullptr, "embedding_bag: out is missing");
  return true;
}

void embedding_bag(const EmbeddingBagParams& p) {
  if (!check_sizes(p)) return;
  if (p.offsets != nullptr) {
    check_arg(p.offsets[0] == 0, "embedding_bag: offsets start at ", p.offsets[0], ", expected 0");
    for (int64_t b = 0; b < p.bags; ++b)
      check_arg(p.begin(b) <= p.end(b), "embedding_bag: bag ", b, " is [", p.begin(b), ", ", p.end(b),
                "), expected offsets that do not decrease and end at or before ", p.count);
  }
  for (int64_t j = 0; j < p.count; ++j)
    if (p.index(j) < 0 || p.index(j) >= p.table.n)
      throw std::out_of_range(detail::concat("embedding_bag: index ", p.index(j), " at position ", j,
                                             " is outside the table, expected 0 <= index < ", p.table.n));
  const int64_t k = p.table.k;
  if (k == 0) return;
  validate_perm(p.table, "embedding_bag");
  const DecodeRow decode_row = select_decode_kernel(active_isa()).decode_row;
  const int64_t stride_bytes = p.out_stride * dtype_bytes(p.out_dtype), shares = min_i64(p.bags, 64);
  std::vector<float> scratch(p.mode == BagMode::kMajority ? 0 : size_t(shares * 2 * k));
  parallel_for(shares, max_i64(1, shares * 8192 / max_i64(1, p.count * k)), [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share)
      for (int64_t b = share * p.bags / shares; b < (share + 1) * p.bags / shares; ++b) {
        void* out = static_cast<uint8_t*>(p.out) + b * stride_bytes;
        if (p.mode == BagMode::kMajority) majority(p, b, out);
        else sum(p, b, decode_row, scratch.data() + share * 2 * k, scratch.data() + share * 2 * k + k, out);
      }
  });
}

}  // namespace subbyte
