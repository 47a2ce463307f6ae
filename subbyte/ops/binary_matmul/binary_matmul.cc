#include "subbyte/ops/binary_matmul/binary_matmul.h"

#include <bit>
#include <cstring>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/kernels.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte {

#if defined(__x86_64__)
#define SB_KERNEL(file, isa)                                                                             \
  namespace file {                                                                                       \
  void count_xor(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int32_t*, int64_t) noexcept; \
  }
namespace binary_matmul_x86 {
#include "subbyte/ops/binary_matmul/kernels.inc"
}
#undef SB_KERNEL
#endif

namespace {

void count_xor_reference(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes,
                         int32_t* counts, int64_t counts_stride) noexcept {
  for (int64_t m = 0; m < m_count; ++m)
    for (int64_t n = 0; n < n_count; ++n) {
      int32_t count = 0;
      for (int64_t i = 0; i < row_bytes; ++i) count += std::popcount(unsigned(x[m * row_bytes + i] ^ z[n * row_bytes + i]));
      counts[m * counts_stride + n] = count;
    }
}

constexpr BinaryMatmulKernel kKernels[] = {
#if defined(__x86_64__)
#define SB_KERNEL(file, isa) {"binary_matmul_" #file, isa, binary_matmul_x86::file::count_xor},
#include "subbyte/ops/binary_matmul/kernels.inc"
#undef SB_KERNEL
#endif
    {"binary_matmul_reference", Isa::kScalar, count_xor_reference},
};

constexpr int64_t kTile = 32;  // rows of x and of z in a tile of counts

struct Workspace {
  int64_t row_bytes = 0, x_rows = 0, z_rows = 0;
  int64_t z_begin = 0, x_marks = 0, z_marks = 0, total = 0;
};

Workspace lay_out(const BinaryMatmulParams& p) {
  Workspace w;
  w.row_bytes = round_up(stream_bytes(p.k, 1), kBitRowAlign);
  w.x_rows = (p.x_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.m;
  w.z_rows = (p.z_batch_stride == 0 || p.z_bits != nullptr ? min_i64(p.batch, 1) : p.batch) * p.n;
  w.z_begin = w.x_rows * w.row_bytes;
  w.x_marks = w.z_begin + w.z_rows * w.row_bytes;
  w.z_marks = w.x_marks + round_up(w.x_rows, 64);
  w.total = w.z_marks + round_up(w.z_rows, 64);
  return w;
}

// Signs of one row, zero bits behind them; returns whether it holds a NaN.
template <class Plus>
bool pack_signs(Plus plus, int64_t k, int64_t row_bytes, uint8_t* out) {
  bool nan = false;
  int64_t byte = 0;
  for (; byte * 8 + 8 <= k; ++byte) {
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i) bits |= unsigned(plus(byte * 8 + i, nan)) << i;
    out[byte] = uint8_t(bits);
  }
  if (byte * 8 < k) {
    unsigned bits = 0;
    for (int64_t i = byte * 8; i < k; ++i) bits |= unsigned(plus(i, nan)) << (i - byte * 8);
    out[byte++] = uint8_t(bits);
  }
  std::memset(out + byte, 0, size_t(row_bytes - byte));
  return nan;
}

bool pack_row(const void* data, DType dtype, int64_t begin, int64_t k, int64_t row_bytes, uint8_t* out) {
  if (dtype == DType::kF32) {
    const float* v = static_cast<const float*>(data) + begin;
    return pack_signs(
        [v](int64_t i, bool& nan) {
          nan = nan || v[i] != v[i];
          return v[i] >= 0;
        },
        k, row_bytes, out);
  }
  if (dtype == DType::kBF16 || dtype == DType::kF16) {
    // On the bit patterns: +1 unless the sign is set on something other than zero; NaN lies beyond infinity.
    const uint16_t* v = static_cast<const uint16_t*>(data) + begin;
    const unsigned infinity = dtype == DType::kBF16 ? 0x7f80u : 0x7c00u;
    const auto plus = [v, infinity](int64_t i, bool& nan) {
      const unsigned magnitude = v[i] & 0x7fffu;
      nan = nan || magnitude > infinity;
      return magnitude <= infinity && (v[i] < 0x8000u || magnitude == 0);
    };
    return pack_signs(plus, k, row_bytes, out);
  }
  return pack_signs([&](int64_t i, bool& nan) { return is_plus(data, dtype, begin + i, nan); }, k, row_bytes, out);
}

void copy_bits(const uint8_t* bits, int64_t k, int64_t row_bytes, uint8_t* out) {
  const int64_t bytes = stream_bytes(k, 1);
  std::memcpy(out, bits, size_t(bytes));
  std::memset(out + bytes, 0, size_t(row_bytes - bytes));
  if (k % 8 != 0) out[bytes - 1] &= uint8_t((1u << (k % 8)) - 1u);
}

}  // namespace

std::span<const BinaryMatmulKernel> binary_matmul_kernels() { return kKernels; }

const BinaryMatmulKernel& select_binary_matmul_kernel(Isa isa) {
  for (const BinaryMatmulKernel& kernel : kKernels)
    if (kernel.isa <= isa) return kernel;
  return kKernels[std::size(kKernels) - 1];
}

int64_t binary_matmul_workspace_bytes(const BinaryMatmulParams& p) { return lay_out(p).total; }

bool check_sizes(const BinaryMatmulParams& p) {
  const char* op = "binary_matmul";
  check_arg(p.batch >= 0 && p.m >= 0 && p.n >= 0 && p.k >= 0, op, ": sizes are B = ", p.batch, ", M = ", p.m, ", N = ", p.n,
            ", K = ", p.k, ", expected at least 0");
  check_arg((p.m <= 1 || p.x_stride >= p.k) && (p.z_bits != nullptr || p.n <= 1 || p.z_stride >= p.k) &&
                (p.m <= 1 || p.y_stride >= p.n),
            op, ": a row stride is below its row's length");
  if (p.batch == 0 || p.m == 0 || p.n == 0) return false;
  check_arg(p.y != nullptr && (p.k == 0 || p.x != nullptr), op, ": x or y are missing");
  check_arg(p.k == 0 || (p.z != nullptr) != (p.z_bits != nullptr), op, ": expected either z or z_bits");
  return true;
}

void binary_matmul(const BinaryMatmulParams& p) {
  const char* op = "binary_matmul";
  if (!check_sizes(p)) return;
  const Workspace w = lay_out(p);
  check_arg(w.total == 0 || (p.workspace != nullptr && p.workspace_bytes >= w.total), op, ": the workspace has ",
            p.workspace_bytes, " bytes, expected ", w.total);
  uint8_t* xb = static_cast<uint8_t*>(p.workspace);
  uint8_t* zb = xb + w.z_begin;
  uint8_t* x_nan = xb + w.x_marks;
  uint8_t* z_nan = xb + w.z_marks;
  const int64_t grain = max_i64(1, 32768 / max_i64(1, p.k));
  parallel_for(w.x_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      x_nan[r] =
          pack_row(p.x, p.dtype, r / p.m * p.x_batch_stride + r % p.m * p.x_stride, p.k, w.row_bytes, xb + r * w.row_bytes);
  });
  parallel_for(w.z_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = zb + r * w.row_bytes;
      z_nan[r] = 0;
      if (p.k == 0) std::memset(out, 0, size_t(w.row_bytes));
      else if (p.z_bits != nullptr) copy_bits(p.z_bits + r * stream_bytes(p.k, 1), p.k, w.row_bytes, out);
      else z_nan[r] = pack_row(p.z, p.z_dtype, r / p.n * p.z_batch_stride + r % p.n * p.z_stride, p.k, w.row_bytes, out);
    }
  });
  const XorCountFn count_xor = select_binary_matmul_kernel(active_isa()).fn;
  const int64_t strips = ceil_div(p.n, kTile);
  parallel_for(p.batch * strips, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t counts[kTile * kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / strips, n0 = task % strips * kTile, n_count = min_i64(kTile, p.n - n0);
      const int64_t x_row = p.x_batch_stride == 0 ? 0 : b * p.m;
      const int64_t z_row = (w.z_rows == p.n ? 0 : b * p.n) + n0;
      for (int64_t m0 = 0; m0 < p.m; m0 += kTile) {
        const int64_t m_count = min_i64(kTile, p.m - m0);
        count_xor(xb + (x_row + m0) * w.row_bytes, m_count, zb + z_row * w.row_bytes, n_count, w.row_bytes, counts, kTile);
        for (int64_t m = 0; m < m_count; ++m) {
          const int64_t at = b * p.y_batch_stride + (m0 + m) * p.y_stride + n0;
          for (int64_t n = 0; n < n_count; ++n) {
            const int64_t sum = p.k - 2 * int64_t(counts[m * kTile + n]);
            const bool nan = (x_nan[x_row + m0 + m] | z_nan[z_row + n]) != 0;
            store_scaled_sum(p.y, p.dtype, at + n, sum, nan, p.scale, p.bias, n0 + n);
          }
        }
      }
    }
  });
}

}  // namespace subbyte
