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
#define SB_KERNEL(file, isa)                                                                                      \
  namespace file {                                                                                                \
  void count_xor(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int32_t*, int64_t) noexcept; \
  int64_t pack_signs(const void*, DType, int64_t, uint8_t*, bool&) noexcept;                                      \
  }
namespace binary_matmul_x86 {
#include "subbyte/ops/binary_matmul/kernels.inc"
}
#undef SB_KERNEL
#endif

namespace {

void count_xor_reference(const uint8_t* x, int64_t m_count, const uint8_t* z, int64_t n_count, int64_t row_bytes,
                         int64_t used_bytes, int32_t* counts, int64_t counts_stride) noexcept {
  for (int64_t m = 0; m < m_count; ++m)
    for (int64_t n = 0; n < n_count; ++n) {
      int32_t count = 0;
      for (int64_t i = 0; i < used_bytes; ++i) count += std::popcount(unsigned(x[m * row_bytes + i] ^ z[n * row_bytes + i]));
      counts[m * counts_stride + n] = count;
    }
}

int64_t pack_signs_reference(const void*, DType, int64_t, uint8_t*, bool&) noexcept { return 0; }

constexpr BinaryMatmulKernel kKernels[] = {
#if defined(__x86_64__)
#define SB_KERNEL(file, isa) \
  {"binary_matmul_" #file, isa, binary_matmul_x86::file::count_xor, binary_matmul_x86::file::pack_signs},
#include "subbyte/ops/binary_matmul/kernels.inc"
#undef SB_KERNEL
#endif
    {"binary_matmul_reference", Isa::kScalar, count_xor_reference, pack_signs_reference},
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

bool pack_row(const void* data, DType dtype, int64_t begin, int64_t k, int64_t row_bytes, uint8_t* out, PackSignsFn pack) {
  const int64_t bytes = stream_bytes(k, 1);
  std::memset(out + bytes, 0, size_t(row_bytes - bytes));
  return pack_sign_row(data, dtype, begin, k, out, pack);
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

bool pack_sign_row(const void* v, DType dtype, int64_t begin, int64_t k, uint8_t* out, PackSignsFn pack) noexcept {
  bool nan = false;
  int64_t i = pack(static_cast<const uint8_t*>(v) + begin * dtype_bytes(dtype), dtype, k, out, nan);
  while (i < k) {
    unsigned bits = 0;
    const int64_t end = min_i64(i + 8, k);
    uint8_t& byte = out[i / 8];
    for (int bit = 0; i < end; ++i, ++bit) bits |= unsigned(is_plus(v, dtype, begin + i, nan)) << bit;
    byte = uint8_t(bits);
  }
  return nan;
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
  const BinaryMatmulKernel& kernel = select_binary_matmul_kernel(active_isa());
  const int64_t grain = max_i64(1, 32768 / max_i64(1, p.k));
  parallel_for(w.x_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      x_nan[r] = pack_row(p.x, p.dtype, r / p.m * p.x_batch_stride + r % p.m * p.x_stride, p.k, w.row_bytes,
                          xb + r * w.row_bytes, kernel.pack);
  });
  parallel_for(w.z_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = zb + r * w.row_bytes;
      z_nan[r] = 0;
      if (p.k == 0) std::memset(out, 0, size_t(w.row_bytes));
      else if (p.z_bits != nullptr) copy_bits(p.z_bits + r * stream_bytes(p.k, 1), p.k, w.row_bytes, out);
      else
        z_nan[r] =
            pack_row(p.z, p.z_dtype, r / p.n * p.z_batch_stride + r % p.n * p.z_stride, p.k, w.row_bytes, out, kernel.pack);
    }
  });
  const int64_t used_bytes = stream_bytes(p.k, 1);
  const int64_t strips = ceil_div(p.n, kTile);
  parallel_for(p.batch * strips, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t counts[kTile * kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / strips, n0 = task % strips * kTile, n_count = min_i64(kTile, p.n - n0);
      const int64_t x_row = p.x_batch_stride == 0 ? 0 : b * p.m;
      const int64_t z_row = (w.z_rows == p.n ? 0 : b * p.n) + n0;
      for (int64_t m0 = 0; m0 < p.m; m0 += kTile) {
        const int64_t m_count = min_i64(kTile, p.m - m0);
        kernel.fn(xb + (x_row + m0) * w.row_bytes, m_count, zb + z_row * w.row_bytes, n_count, w.row_bytes, used_bytes, counts,
                  kTile);
        for (int64_t m = 0; m < m_count; ++m) {
          if (p.dtype == DType::kF32) {
            float* y = static_cast<float*>(p.y) + b * p.y_batch_stride + (m0 + m) * p.y_stride + n0;
            const ScaledSum sum(p.scale, p.second_scale, p.bias);
            for (int64_t n = 0; n < n_count; ++n)
              y[n] = sum.of(p.k - 2 * int64_t(counts[m * kTile + n]), (x_nan[x_row + m0 + m] | z_nan[z_row + n]) != 0, n0 + n);
            continue;
          }
          const int64_t at = b * p.y_batch_stride + (m0 + m) * p.y_stride + n0;
          for (int64_t n = 0; n < n_count; ++n) {
            const int64_t sum = p.k - 2 * int64_t(counts[m * kTile + n]);
            const bool nan = (x_nan[x_row + m0 + m] | z_nan[z_row + n]) != 0;
            store_scaled_sum(p.y, p.dtype, at + n, sum, nan, p.scale, p.second_scale, p.bias, n0 + n);
          }
        }
      }
    }
  });
}

}  // namespace subbyte
