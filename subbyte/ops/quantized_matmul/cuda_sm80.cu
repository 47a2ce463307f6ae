// quantized_matmul: two passes turn the operands into int8 rows in the workspace (a warp a row, four columns a lane and store),
// with the steps read from device memory; then one int8 matrix product, mma.m16n8k32, exact in int32. A block of four warps
// makes 64 x 64 of y from slices of 64 columns: the next slice is in registers while the present one is multiplied out of
// shared memory, whose rows are 80 bytes apart so that the eight rows of a fragment fall into different banks. Limited by
// the matrix units for large matrices, by the bytes of the operands for small ones. A packed z is widened to int8 first, which
// costs few rows of x up to five times its bytes; weight-only and a8 layers have kernels that do without (ops/linear_a8).
#include "subbyte/base/cuda_launch.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/quantized_matmul/int8_operands.h"
#include "subbyte/ops/quantized_matmul/quantized_matmul_cuda.h"
#include "subbyte/ops/quantized_matmul/step_rule.h"

namespace subbyte::cuda {
namespace {

constexpr int kTile = 64, kSlice = 64, kPitch = kSlice + 16, kThreads = 128, kRowWarps = 8;

// max(*step, eps); NaN when the step is NaN or infinite.
__device__ __forceinline__ float step_of(const float* step, float eps) {
  const float s = __ldg(step);
  return isfinite(s) ? fmaxf(s, eps) : __int_as_float(0x7fffffff);
}

template <DType kType>
__global__ void __launch_bounds__(32 * kRowWarps)
    quantize_rows_kernel(const void* v, int64_t rows, int64_t rows_a_batch, int64_t row_stride, int64_t batch_stride, int64_t k,
                         int64_t row_bytes, const float* step, float eps, int bits, int8_t* out, uint8_t* marks) {
  const int64_t r = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (r >= rows) return;
  const int lane = threadIdx.x % 32;
  const float s = step_of(step, eps);
  const auto* from =
      static_cast<const typename Elem<kType>::Storage*>(v) + r / rows_a_batch * batch_stride + r % rows_a_batch * row_stride;
  bool nan = false;
  for (int64_t i = lane * 4; i < row_bytes; i += 128) {
    uint32_t four = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j >= k) continue;
      const float t = float(Elem<kType>::load(from[i + j]));
      nan = nan || t != t;
      four |= (uint32_t(step_code(t, s, bits)) & 0xffu) << (8 * j);
    }
    *reinterpret_cast<uint32_t*>(out + r * row_bytes + i) = four;
  }
  nan = __any_sync(~0u, nan);
  if (lane == 0) marks[r] = nan;
}

__global__ void __launch_bounds__(32 * kRowWarps) unpack_rows_kernel(const uint8_t* codes, int64_t rows, int64_t k,
                                                                     int64_t row_bytes, int bits, int8_t* out, uint8_t* marks) {
  const int64_t r = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32, code_bytes = stream_bytes(k, bits);
  if (r >= rows) return;
  const int lane = threadIdx.x % 32;
  const CodeSpan span{codes, codes + rows * code_bytes};
  const uint32_t middle = (1u << (bits - 1)) * 0x01010101u, mask = (1u << bits) - 1u;
  for (int64_t i = lane * 8; i < row_bytes; i += 256) {
    uint32_t low = middle, high = middle;  // columns behind the last are 0 after the subtraction
    if (i < k) {
      const int count = int(min_i64(8, k - i));
      const uint64_t stream = load_bits(codes + r * code_bytes, i * bits, count * bits, span);
      low = high = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low |= (j < count ? uint32_t(stream >> (bits * j)) & mask : middle & 0xffu) << (8 * j);
        high |= (j + 4 < count ? uint32_t(stream >> (bits * (j + 4))) & mask : middle & 0xffu) << (8 * j);
      }
    }
    *reinterpret_cast<uint2*>(out + r * row_bytes + i) = make_uint2(__vsub4(low, middle), __vsub4(high, middle));
  }
  if (lane == 0) marks[r] = 0;
}

__device__ __forceinline__ void mma_s8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

struct ProductView {
  QuantizedMatmulParams p;
  Int8Operands w;
  int64_t tiles_n;
};

__global__ void __launch_bounds__(kThreads) int8_product_kernel(const __grid_constant__ ProductView v) {
  __shared__ __align__(16) uint8_t xs[kTile * kPitch];
  __shared__ __align__(16) uint8_t zs[kTile * kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad = lane % 4;
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const int64_t m0 = int64_t(blockIdx.x) / v.tiles_n * kTile, n0 = int64_t(blockIdx.x) % v.tiles_n * kTile;
  const uint8_t* base = static_cast<const uint8_t*>(v.p.workspace);
  const float sx = step_of(v.p.x_step, v.p.eps), sz = step_of(v.p.z_step, v.p.eps);
  for (int64_t b = blockIdx.y; b < v.p.batch; b += gridDim.y) {
    const int64_t x_row = v.w.x_rows == v.p.m ? 0 : b * v.p.m, z_row = v.w.z_rows == v.p.n ? 0 : b * v.p.n;
    // A thread brings 16 bytes of two rows of each operand; rows behind the last repeat it and are not stored.
    const int part = threadIdx.x % 4 * 16, slot = threadIdx.x / 4;
    const uint8_t* x_from[2];
    const uint8_t* z_from[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x_from[i] = base + (x_row + min_i64(m0 + slot + i * 32, v.p.m - 1)) * v.w.row_bytes + part;
      z_from[i] = base + v.w.z_begin + (z_row + min_i64(n0 + slot + i * 32, v.p.n - 1)) * v.w.row_bytes + part;
    }
    uint4 next_x[2], next_z[2];
    const auto fetch = [&](int64_t k) {
      if (k >= v.w.row_bytes) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        next_x[i] = *reinterpret_cast<const uint4*>(x_from[i] + k);
        next_z[i] = *reinterpret_cast<const uint4*>(z_from[i] + k);
      }
    };
    int sums[2][4][4] = {};
    fetch(0);
    for (int64_t k = 0; k < v.w.row_bytes; k += kSlice) {
      __syncthreads();  // the slice before has been read
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint4*>(xs + (slot + i * 32) * kPitch + part) = next_x[i];
        *reinterpret_cast<uint4*>(zs + (slot + i * 32) * kPitch + part) = next_z[i];
      }
      __syncthreads();
      fetch(k + kSlice);
#pragma unroll
      for (int step = 0; step < kSlice; step += 32) {
        uint32_t a[2][4], c[4][2];
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[t][i] = *reinterpret_cast<const uint32_t*>(xs + (warp_m + t * 16 + row + i % 2 * 8) * kPitch + step + quad * 4 +
                                                         i / 2 * 16);
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            c[t][i] = *reinterpret_cast<const uint32_t*>(zs + (warp_n + t * 8 + row) * kPitch + step + quad * 4 + i * 16);
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int u = 0; u < 4; ++u) mma_s8s8(sums[t][u], a[t], c[u]);
      }
    }
    const uint8_t* x_nan = base + v.w.x_marks + x_row;
    const uint8_t* z_nan = base + v.w.z_marks + z_row;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int u = 0; u < 4; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t m = m0 + warp_m + t * 16 + row + i / 2 * 8, n = n0 + warp_n + u * 8 + quad * 2 + i % 2;
          if (m < v.p.m && n < v.p.n)
            store_scaled(v.p, b * v.p.y_batch_stride + m * v.p.y_stride + n, n, sums[t][u][i], sx, sz,
                         (x_nan[m] | z_nan[n]) != 0);
        }
    __syncthreads();
  }
}

}  // namespace

int64_t quantized_matmul_workspace_bytes(const QuantizedMatmulParams& p) { return int8_operands(p).total_bytes; }

void quantized_matmul(const QuantizedMatmulParams& p, Stream stream) {
  const char* op = "quantized_matmul";
  if (!check_sizes(p)) return;
  const ProductView v{p, int8_operands(p), ceil_div(p.n, kTile)};
  const int64_t tiles = v.tiles_n * ceil_div(p.m, kTile), most = int64_t(1) << 31;
  check_arg(tiles < most && v.w.x_rows / kRowWarps < most - 1 && v.w.z_rows / kRowWarps < most - 1, op, ": M = ", p.m,
            ", N = ", p.n, ", B = ", p.batch, " are more than one launch can do");
  watch_scales({p.x_step, DType::kF32, "x_step"}, {p.z_step, DType::kF32, "z_step"}, ScaleRange::kFinite, op, stream);
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  const auto quantize = [&](const void* from, DType dtype, int64_t rows, int64_t rows_a_batch, int64_t row_stride,
                            int64_t batch_stride, const float* step, int64_t at, int64_t marks_at) {
    dispatch_dtype(dtype, [&](auto tag) {
      quantize_rows_kernel<decltype(tag)::value><<<unsigned(ceil_div(rows, kRowWarps)), 32 * kRowWarps, 0, stream_of(stream)>>>(
          from, rows, rows_a_batch, row_stride, batch_stride, p.k, v.w.row_bytes, step, p.eps, p.bits,
          reinterpret_cast<int8_t*>(base + at), base + marks_at);
    });
    check_launch(op);
  };
  quantize(p.x, p.dtype, v.w.x_rows, p.m, p.x_stride, p.x_batch_stride, p.x_step, 0, v.w.x_marks);
  if (p.z_codes != nullptr) {
    unpack_rows_kernel<<<unsigned(ceil_div(v.w.z_rows, kRowWarps)), 32 * kRowWarps, 0, stream_of(stream)>>>(
        p.z_codes, v.w.z_rows, p.k, v.w.row_bytes, p.bits, reinterpret_cast<int8_t*>(base + v.w.z_begin), base + v.w.z_marks);
    check_launch(op);
  } else {
    quantize(p.z, p.z_dtype, v.w.z_rows, p.n, p.z_stride, p.z_batch_stride, p.z_step, v.w.z_begin, v.w.z_marks);
  }
  int8_product_kernel<<<dim3(unsigned(tiles), unsigned(min_i64(p.batch, 65535))), kThreads, 0, stream_of(stream)>>>(v);
  check_launch(op);
}

}  // namespace subbyte::cuda
