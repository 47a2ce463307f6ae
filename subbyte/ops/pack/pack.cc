#include "subbyte/ops/pack/pack.h"

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte {
namespace {

bool check_sizes(const char* op, const RowLayout& layout, int64_t n, int64_t k, int64_t stride, bool pointers) {
  check_arg(n >= 0 && k >= 0, op, ": codes are [", n, ", ", k, "], expected sizes of at least 0");
  check_arg(layout.k == k, op, ": the format describes ", layout.k, " columns, the codes have K = ", k);
  check_arg(n <= 1 || stride >= k, op, ": row stride ", stride, " is below K = ", k);
  check_arg(n == 0 || k == 0 || pointers, op, ": codes or packed bytes are missing");
  return n != 0 && k != 0;
}

int64_t rows_grain(int64_t k) { return max_i64(1, 65536 / k); }

void check_codes(const PackParams& p) {
  for (int i = 0; i < p.layout.segment_count; ++i) {
    const Segment& s = p.layout.segments[i];
    const unsigned levels = unsigned(format_levels(s.format));
    if (levels == 256) continue;
    for (int64_t n = 0; n < p.n; ++n) {
      const uint8_t* row = p.unpacked + n * p.unpacked_stride + s.k_begin;
      unsigned worst = 0;  // branch-free so that it vectorises; the position is only looked for on failure
      for (int64_t k = 0; k < s.k_count; ++k) worst = row[k] > worst ? row[k] : worst;
      if (worst < levels) continue;
      for (int64_t k = 0; k < s.k_count; ++k)
        check_arg(row[k] < levels, "pack: code ", int(row[k]), " at [", n, ", ", s.k_begin + k, "] is outside ",
                  format_name(s.format), ", expected below ", levels);
    }
  }
}

}  // namespace

bool check_sizes(const PackParams& p) {
  return check_sizes("pack", p.layout, p.n, p.k, p.unpacked_stride, p.unpacked != nullptr && p.packed != nullptr);
}

bool check_sizes(const UnpackParams& p) {
  return check_sizes("unpack", p.layout, p.n, p.k, p.unpacked_stride, p.unpacked != nullptr && p.packed != nullptr);
}

std::span<const PackKernel> pack_kernels() {
  static constexpr PackKernel kKernels[] = {
#define SB_PACK_KERNEL(name, isa, pack, unpack) {name, Isa::isa, pack, unpack},
#include "subbyte/ops/pack/kernels.inc"
#undef SB_PACK_KERNEL
  };
  return kKernels;
}

const PackKernel& select_pack_kernel(Isa isa) {
  for (const PackKernel& kernel : pack_kernels())
    if (kernel.isa <= isa) return kernel;
  return pack_kernels().back();
}

void pack(const PackParams& p) {
  if (!check_sizes(p)) return;
  check_codes(p);
  const PackCodes run = select_pack_kernel(active_isa()).pack;
  parallel_for(p.n, rows_grain(p.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int i = 0; i < p.layout.segment_count; ++i) {
        const Segment& s = p.layout.segments[i];
        run(p.unpacked + n * p.unpacked_stride + s.k_begin, s.k_count, format_bits(s.format),
            p.packed + n * p.layout.row_bytes + s.byte_begin);
      }
  });
}

void unpack(const UnpackParams& p) {
  if (!check_sizes(p)) return;
  const UnpackCodes run = select_pack_kernel(active_isa()).unpack;
  parallel_for(p.n, rows_grain(p.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int i = 0; i < p.layout.segment_count; ++i) {
        const Segment& s = p.layout.segments[i];
        run(p.packed + n * p.layout.row_bytes + s.byte_begin, s.k_count, format_bits(s.format),
            p.unpacked + n * p.unpacked_stride + s.k_begin);
      }
  });
}

}  // namespace subbyte
