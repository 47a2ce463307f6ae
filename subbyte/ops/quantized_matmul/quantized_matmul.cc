#include "subbyte/ops/quantized_matmul/quantized_matmul.h"

#include <cmath>
#include <cstring>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/quantized_matmul/kernels.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte {

#if defined(__x86_64__)
#define SB_KERNEL(file, function, isa, max_magnitude)                                                                        \
  namespace file {                                                                                                           \
  void function(const int8_t*, int64_t, int64_t, const int8_t*, int64_t, int64_t, int64_t, int, int32_t*, int64_t) noexcept; \
  }
#define SB_ROW_KERNEL(file, isa)                                                         \
  namespace file {                                                                       \
  bool quantize_row(const void*, DType, int64_t, int64_t, float, int, int8_t*) noexcept; \
  void unpack_row(const uint8_t*, int64_t, int, int8_t*) noexcept;                       \
  }
namespace quantized_matmul_x86 {
#include "subbyte/ops/quantized_matmul/kernels.inc"
}
#undef SB_KERNEL
#undef SB_ROW_KERNEL
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

bool quantize_row_reference(const void* v, DType dtype, int64_t begin, int64_t k, float step, int bits, int8_t* out) noexcept {
  bool nan = false;
  for (int64_t i = 0; i < k; ++i) {
    const float t = load_float(v, dtype, begin + i);
    nan = nan || t != t;
    out[i] = int8_t(step_code(t, step, bits));
  }
  return nan;
}

void unpack_row_reference(const uint8_t* codes, int64_t k, int bits, int8_t* out) noexcept {
  for (int64_t i = 0; i < k; ++i) out[i] = int8_t(int(get_code(codes, i, bits)) - (1 << (bits - 1)));
}

#if defined(__x86_64__)
#define SB_ROW_KERNEL(file, isa)
#define SB_KERNEL(file, function, isa, max_magnitude) \
  {"quantized_matmul_" #function "_" #file, isa, max_magnitude, quantized_matmul_x86::file::function},
#endif
constexpr QuantizedMatmulKernel kKernels[] = {
#if defined(__x86_64__)
#include "subbyte/ops/quantized_matmul/kernels.inc"
#endif
    {"quantized_matmul_reference", Isa::kScalar, 128, dot_reference},
};
#if defined(__x86_64__)
#undef SB_KERNEL
#undef SB_ROW_KERNEL
#define SB_KERNEL(file, function, isa, max_magnitude)
#define SB_ROW_KERNEL(file, isa) \
  {"int8_rows_" #file, isa, quantized_matmul_x86::file::quantize_row, quantized_matmul_x86::file::unpack_row},
#endif
constexpr Int8RowKernel kRowKernels[] = {
#if defined(__x86_64__)
#include "subbyte/ops/quantized_matmul/kernels.inc"
#endif
    {"int8_rows_reference", Isa::kScalar, quantize_row_reference, unpack_row_reference},
};

constexpr int64_t kMaxColumns = 131072;  // 128 * 128 * 131071 < 2^31
constexpr int64_t kTileRows = 32;        // rows of z a task takes, and columns of its tile of sums
constexpr int64_t kTileColumns = 32;

}  // namespace

std::span<const QuantizedMatmulKernel> quantized_matmul_kernels() { return kKernels; }

const QuantizedMatmulKernel& select_quantized_matmul_kernel(int bits, Isa isa) {
  for (const QuantizedMatmulKernel& kernel : kKernels)
    if (kernel.isa <= isa && (1 << (bits - 1)) <= kernel.max_magnitude) return kernel;
  return kKernels[std::size(kKernels) - 1];
}

std::span<const Int8RowKernel> int8_row_kernels() { return kRowKernels; }

const Int8RowKernel& select_int8_row_kernel(Isa isa) {
  for (const Int8RowKernel& kernel : kRowKernels)
    if (kernel.isa <= isa) return kernel;
  return kRowKernels[std::size(kRowKernels) - 1];
}

int64_t quantized_matmul_workspace_bytes(const QuantizedMatmulParams& p) { return int8_operands(p).total_bytes; }

bool check_sizes(const QuantizedMatmulParams& p) {
  const char* op = "quantized_matmul";
  check_arg(p.batch >= 0 && p.m >= 0 && p.n >= 0 && p.k >= 0, op, ": sizes are B = ", p.batch, ", M = ", p.m, ", N = ", p.n,
            ", K = ", p.k, ", expected at least 0");
  check_arg(p.k <= kMaxColumns, op, ": K is ", p.k, ", expected at most ", int64_t(kMaxColumns));
  check_arg(p.bits >= 2 && p.bits <= 8, op, ": bits is ", p.bits, ", expected 2 to 8");
  check_arg(std::isfinite(p.eps) && p.eps > 0, op, ": eps is ", p.eps, ", expected a positive number");
  check_arg((p.m <= 1 || p.x_stride >= p.k) && (p.n <= 1 || p.z_codes != nullptr || p.z_stride >= p.k) &&
                (p.m <= 1 || p.y_stride >= p.n),
            op, ": a row stride is below its row's length");
  if (p.batch == 0 || p.m == 0 || p.n == 0) return false;
  check_arg(p.x_step != nullptr && p.z_step != nullptr, op, ": the steps are missing");
  check_arg(p.y != nullptr && (p.k == 0 || p.x != nullptr), op, ": x or y are missing");
  check_arg(p.k == 0 || (p.z == nullptr) != (p.z_codes == nullptr), op, ": exactly one of z and z_codes is expected");
  const int64_t bytes = int8_operands(p).total_bytes;
  check_arg(bytes == 0 || (p.workspace != nullptr && p.workspace_bytes >= bytes), op, ": the workspace has ", p.workspace_bytes,
            " bytes, expected ", bytes);
  return true;
}

void quantized_matmul(const QuantizedMatmulParams& p) {
  const char* op = "quantized_matmul";
  if (p.x_step != nullptr && p.z_step != nullptr)
    check_arg(std::isfinite(*p.x_step) && std::isfinite(*p.z_step), op, ": the steps are ", *p.x_step, " and ", *p.z_step,
              ", expected finite numbers");
  if (!check_sizes(p)) return;
  const Int8Operands w = int8_operands(p);
  const float sx = std::fmax(*p.x_step, p.eps), sz = std::fmax(*p.z_step, p.eps);
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  int8_t* xq = reinterpret_cast<int8_t*>(base);
  int8_t* zq = reinterpret_cast<int8_t*>(base + w.z_begin);
  uint8_t* x_nan = base + w.x_marks;
  uint8_t* z_nan = base + w.z_marks;
  const Int8RowKernel& rows = select_int8_row_kernel(active_isa());
  const int64_t code_bytes = stream_bytes(p.k, p.bits);
  const auto clear_behind = [&](int8_t* row) { std::memset(row + p.k, 0, size_t(w.row_bytes - p.k)); };
  const auto make_z_row = [&](int64_t r) {
    int8_t* out = zq + r * w.row_bytes;
    z_nan[r] = 0;
    if (p.z_codes != nullptr) rows.unpack(p.z_codes + r * code_bytes, p.k, p.bits, out);
    else z_nan[r] = rows.quantize(p.z, p.z_dtype, r / p.n * p.z_batch_stride + r % p.n * p.z_stride, p.k, sz, p.bits, out);
    clear_behind(out);
  };
  const int64_t grain = max_i64(1, 16384 / max_i64(1, p.k));
  parallel_for(w.x_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int8_t* out = xq + r * w.row_bytes;
      x_nan[r] = rows.quantize(p.x, p.dtype, r / p.m * p.x_batch_stride + r % p.m * p.x_stride, p.k, sx, p.bits, out);
      clear_behind(out);
    }
  });
  // When no two tasks share a row of z, a task makes its rows itself, and they are still in its cache for the product.
  const bool own_rows = w.z_rows == p.batch * p.n;
  if (!own_rows)
    parallel_for(w.z_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) make_z_row(r);
    });

  const Int8DotFn dot = select_quantized_matmul_kernel(p.bits, active_isa()).fn;
  const int64_t strips = ceil_div(p.n, kTileRows);
  parallel_for(p.batch * strips, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kTileColumns * kTileRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / strips, n0 = task % strips * kTileRows, n_count = min_i64(kTileRows, p.n - n0);
      const int64_t x_row = w.x_rows == p.m ? 0 : b * p.m, z_row = (w.z_rows == p.n ? 0 : b * p.n) + n0;
      if (own_rows)
        for (int64_t n = 0; n < n_count; ++n) make_z_row(z_row + n);
      uint8_t strip_nan = 0;
      for (int64_t n = 0; n < n_count; ++n) strip_nan |= z_nan[z_row + n];
      for (int64_t m0 = 0; m0 < p.m; m0 += kTileColumns) {
        const int64_t m_count = min_i64(kTileColumns, p.m - m0);
        dot(xq + (x_row + m0) * w.row_bytes, w.row_bytes, m_count, zq + z_row * w.row_bytes, w.row_bytes, n_count, w.row_bytes,
            1 << (p.bits - 1), sums, kTileRows);
        for (int64_t m = 0; m < m_count; ++m) {
          const int64_t at = b * p.y_batch_stride + (m0 + m) * p.y_stride + n0;
          const int32_t* row = sums + m * kTileRows;
          if (p.dtype == DType::kF32 && p.bias == nullptr && x_nan[x_row + m0 + m] == 0 && strip_nan == 0) {
            float* out = static_cast<float*>(p.y) + at;  // store_scaled, in a loop that compilers vectorize
            for (int64_t n = 0; n < n_count; ++n) out[n] = float(row[n]) * sx * sz;
            continue;
          }
          for (int64_t n = 0; n < n_count; ++n) {
            const bool nan = (x_nan[x_row + m0 + m] | z_nan[z_row + n]) != 0;
            store_scaled(p, at + n, n0 + n, row[n], sx, sz, nan);
          }
        }
      }
    }
  });
}

}  // namespace subbyte
