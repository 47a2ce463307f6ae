#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

#include <cmath>
#include <limits>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/quantized_matmul/kernels.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte {

#if defined(__x86_64__)
#define SB_KERNEL(file, function, isa, max_magnitude)                                                                        \
  namespace file {                                                                                                           \
  void function(const int8_t*, int64_t, int64_t, const int8_t*, int64_t, int64_t, int64_t, int, int32_t*, int64_t) noexcept; \
  }
namespace quantized_matmul_x86 {
#include "subbyte/ops/quantized_matmul/kernels.inc"
}
#undef SB_KERNEL
#endif

namespace {

void dot_reference(const int8_t* x, int64_t x_stride, int64_t m_count, const int8_t* z, int64_t z_stride, int64_t n_count,
                   int64_t k_padded, int, int32_t* sums, int64_t sums_stride) noexcept {
  for (int64_t m = 0; m < m_count; ++m)
    for (int64_t n = 0; n < n_count; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < k_padded; ++k) sum += int32_t(x[m * x_stride + k]) * z[n * z_stride + k];
      sums[m * sums_stride + n] = sum;
    }
}

constexpr QuantizedMatmulKernel kKernels[] = {
#if defined(__x86_64__)
#define SB_KERNEL(file, function, isa, max_magnitude) \
  {"quantized_matmul_" #function "_" #file, isa, max_magnitude, quantized_matmul_x86::file::function},
#include "subbyte/ops/quantized_matmul/kernels.inc"
#undef SB_KERNEL
#endif
    {"quantized_matmul_reference", Isa::kScalar, 128, dot_reference},
};

constexpr int64_t kMaxColumns = 131072;  // 128 * 128 * 131071 < 2^31
constexpr int64_t kTileRows = 32;        // rows of z a task takes, and columns of its tile of sums
constexpr int64_t kTileColumns = 32;

struct Workspace {
  int64_t row_bytes = 0, x_rows = 0, z_rows = 0;
  int64_t z_begin = 0, x_marks = 0, z_marks = 0, total = 0;
};

// Operands that repeat over the batch are quantized once.
Workspace lay_out(const QuantizedMatmulParams& p) {
  Workspace w;
  w.row_bytes = round_up(p.k, kInt8RowAlign);
  w.x_rows = (p.x_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.m;
  w.z_rows = (p.z_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.n;
  w.z_begin = w.x_rows * w.row_bytes;
  w.x_marks = w.z_begin + w.z_rows * w.row_bytes;
  w.z_marks = w.x_marks + round_up(w.x_rows, 64);
  w.total = w.z_marks + round_up(w.z_rows, 64);
  return w;
}

// One row to int8, zeros behind it; returns whether it holds a NaN.
bool quantize_row(const void* data, DType dtype, int64_t begin, int64_t k, int64_t padded, float step, int bits, int8_t* out) {
  bool nan = false;
  if (dtype == DType::kF32) {
    const float* v = static_cast<const float*>(data) + begin;
    for (int64_t i = 0; i < k; ++i) {
      nan = nan || v[i] != v[i];
      out[i] = int8_t(step_code(v[i], step, bits));
    }
  } else {
    for (int64_t i = 0; i < k; ++i) {
      const float v = load_float(data, dtype, begin + i);
      nan = nan || v != v;
      out[i] = int8_t(step_code(v, step, bits));
    }
  }
  for (int64_t i = k; i < padded; ++i) out[i] = 0;
  return nan;
}

}  // namespace

std::span<const QuantizedMatmulKernel> quantized_matmul_kernels() { return kKernels; }

const QuantizedMatmulKernel& select_quantized_matmul_kernel(int bits, Isa isa) {
  for (const QuantizedMatmulKernel& kernel : kKernels)
    if (kernel.isa <= isa && (1 << (bits - 1)) <= kernel.max_magnitude) return kernel;
  return kKernels[std::size(kKernels) - 1];
}

int64_t quantized_matmul_workspace_bytes(const QuantizedMatmulParams& p) { return lay_out(p).total; }

void quantized_matmul(const QuantizedMatmulParams& p) {
  const char* op = "quantized_matmul";
  check_arg(p.batch >= 0 && p.m >= 0 && p.n >= 0 && p.k >= 0, op, ": sizes are B = ", p.batch, ", M = ", p.m, ", N = ", p.n,
            ", K = ", p.k, ", expected at least 0");
  check_arg(p.k <= kMaxColumns, op, ": K is ", p.k, ", expected at most ", int64_t(kMaxColumns));
  check_arg(p.bits >= 2 && p.bits <= 8, op, ": bits is ", p.bits, ", expected 2 to 8");
  check_arg(std::isfinite(p.eps) && p.eps > 0, op, ": eps is ", p.eps, ", expected a positive number");
  check_arg(std::isfinite(p.x_step) && std::isfinite(p.z_step), op, ": the steps are ", p.x_step, " and ", p.z_step,
            ", expected finite numbers");
  check_arg((p.m <= 1 || p.x_stride >= p.k) && (p.n <= 1 || p.z_stride >= p.k) && (p.m <= 1 || p.y_stride >= p.n), op,
            ": a row stride is below its row's length");
  if (p.batch == 0 || p.m == 0 || p.n == 0) return;
  check_arg(p.y != nullptr && (p.k == 0 || (p.x != nullptr && p.z != nullptr)), op, ": x, z or y are missing");
  const Workspace w = lay_out(p);
  check_arg(w.total == 0 || (p.workspace != nullptr && p.workspace_bytes >= w.total), op, ": the workspace has ",
            p.workspace_bytes, " bytes, expected ", w.total);
  const float sx = std::fmax(p.x_step, p.eps), sz = std::fmax(p.z_step, p.eps);
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  int8_t* xq = reinterpret_cast<int8_t*>(base);
  int8_t* zq = reinterpret_cast<int8_t*>(base + w.z_begin);
  uint8_t* x_nan = base + w.x_marks;
  uint8_t* z_nan = base + w.z_marks;
  const int64_t grain = max_i64(1, 16384 / max_i64(1, p.k));
  parallel_for(w.x_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      x_nan[r] = quantize_row(p.x, p.dtype, r / p.m * p.x_batch_stride + r % p.m * p.x_stride, p.k, w.row_bytes, sx, p.bits,
                              xq + r * w.row_bytes);
  });
  parallel_for(w.z_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      z_nan[r] = quantize_row(p.z, p.dtype, r / p.n * p.z_batch_stride + r % p.n * p.z_stride, p.k, w.row_bytes, sz, p.bits,
                              zq + r * w.row_bytes);
  });

  const Int8DotFn dot = select_quantized_matmul_kernel(p.bits, active_isa()).fn;
  const int64_t strips = ceil_div(p.n, kTileRows);
  parallel_for(p.batch * strips, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kTileColumns * kTileRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / strips, n0 = task % strips * kTileRows, n_count = min_i64(kTileRows, p.n - n0);
      const int64_t x_row = p.x_batch_stride == 0 ? 0 : b * p.m, z_row = (p.z_batch_stride == 0 ? 0 : b * p.n) + n0;
      for (int64_t m0 = 0; m0 < p.m; m0 += kTileColumns) {
        const int64_t m_count = min_i64(kTileColumns, p.m - m0);
        dot(xq + (x_row + m0) * w.row_bytes, w.row_bytes, m_count, zq + z_row * w.row_bytes, w.row_bytes, n_count, w.row_bytes,
            1 << (p.bits - 1), sums, kTileRows);
        for (int64_t m = 0; m < m_count; ++m) {
          const int64_t at = b * p.y_batch_stride + (m0 + m) * p.y_stride + n0;
          for (int64_t n = 0; n < n_count; ++n) {
            const int32_t sum = sums[m * kTileRows + n];
            const bool nan = (x_nan[x_row + m0 + m] | z_nan[z_row + n]) != 0;
            if (p.dtype == DType::kF64)
              store_double(p.y, p.dtype, at + n,
                           nan ? std::numeric_limits<double>::quiet_NaN() : double(sum) * double(sx) * double(sz));
            else store_float(p.y, p.dtype, at + n, nan ? std::numeric_limits<float>::quiet_NaN() : float(sum) * sx * sz);
          }
        }
      }
    }
  });
}

}  // namespace subbyte
