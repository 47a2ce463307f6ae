// Idea: a warp packs a row of signs with one ballot for 32 of them; a block of 256 threads then counts a tile of 64 x 64 sums,
// 4 x 4 a thread, from words staged in shared memory. Bound by __popc (16 a cycle and multiprocessor): one for 32 products, so
// 1/16 of the int8 tensor rate, but no operand is ever wider than a bit. One-bit tensor instructions are emulated on Hopper.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_matmul/binary_matmul_cuda.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte::cuda {
namespace {

constexpr int kTile = 64, kStep = 16, kThreads = 256, kEach = 4;

struct Rows {
  const void* data;
  DType dtype;
  int64_t rows, rows_a_batch, stride, batch_stride, k, row_words;
  uint32_t* words;
  uint8_t* nan;
};

__global__ void __launch_bounds__(kThreads) pack_rows(Rows v) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t step = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t r = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; r < v.rows; r += step) {
    const int64_t begin = r / v.rows_a_batch * v.batch_stride + r % v.rows_a_batch * v.stride;
    bool nan = false;
    for (int64_t w = 0; w < v.row_words; ++w) {
      const int64_t i = w * 32 + lane;
      const bool plus = i < v.k && is_plus(v.data, v.dtype, begin + i, nan);
      const uint32_t bits = __ballot_sync(0xffffffffu, plus);
      if (lane == 0) v.words[r * v.row_words + w] = bits;
    }
    const bool any = __any_sync(0xffffffffu, nan);
    if (lane == 0) v.nan[r] = any;
  }
}

__global__ void __launch_bounds__(kThreads) copy_rows(const uint8_t* bits, Rows v) {
  const int64_t total = v.rows * v.row_words, row_bytes = stream_bytes(v.k, 1);
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < total; at += int64_t(gridDim.x) * kThreads) {
    const int64_t r = at / v.row_words, w = at % v.row_words;
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i)
      if (w * 4 + i < row_bytes) word |= uint32_t(bits[r * row_bytes + w * 4 + i]) << (8 * i);
    if (v.k - w * 32 < 32) word &= v.k > w * 32 ? (1u << (v.k - w * 32)) - 1u : 0u;
    v.words[at] = word;
    if (w == 0) v.nan[r] = 0;
  }
}

struct Product {
  const uint32_t *x, *z;
  const uint8_t *x_nan, *z_nan;
  int64_t x_batch_rows, z_batch_rows;  // 0 repeats
  int64_t m, n, k, row_words, m_tiles, n_tiles;
  void* y;
  DType dtype;
  int64_t y_stride, y_batch_stride;
  const void *scale, *second_scale, *bias;
};

__global__ void __launch_bounds__(kThreads) count_tiles(Product p) {
  __shared__ uint32_t xs[kTile][kStep + 1], zs[kTile][kStep + 1];  // the odd width keeps columns in different banks
  const int64_t tile = blockIdx.x, b = tile / (p.m_tiles * p.n_tiles);
  const int64_t m0 = tile / p.n_tiles % p.m_tiles * kTile, n0 = tile % p.n_tiles * kTile;
  const int64_t x_row = b * p.x_batch_rows + m0, z_row = b * p.z_batch_rows + n0;
  const int tx = int(threadIdx.x) % 16, ty = int(threadIdx.x) / 16;
  int count[kEach][kEach] = {};
  for (int64_t w0 = 0; w0 < p.row_words; w0 += kStep) {
    for (int i = int(threadIdx.x); i < kTile * kStep; i += kThreads) {
      const int r = i / kStep, w = i % kStep;
      const bool inside = w0 + w < p.row_words;
      xs[r][w] = inside && m0 + r < p.m ? p.x[(x_row + r) * p.row_words + w0 + w] : 0u;
      zs[r][w] = inside && n0 + r < p.n ? p.z[(z_row + r) * p.row_words + w0 + w] : 0u;
    }
    __syncthreads();
#pragma unroll 4
    for (int w = 0; w < kStep; ++w) {
      uint32_t a[kEach], c[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) a[i] = xs[ty + 16 * i][w];
#pragma unroll
      for (int j = 0; j < kEach; ++j) c[j] = zs[tx + 16 * j][w];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) count[i][j] += __popc(a[i] ^ c[j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t r = ty + 16 * i, c = tx + 16 * j;
      if (m0 + r >= p.m || n0 + c >= p.n) continue;
      store_scaled_sum(p.y, p.dtype, b * p.y_batch_stride + (m0 + r) * p.y_stride + n0 + c, p.k - 2 * int64_t(count[i][j]),
                       (p.x_nan[x_row + r] | p.z_nan[z_row + c]) != 0, p.scale, p.second_scale, p.bias, n0 + c);
    }
}

struct Workspace {
  int64_t row_words, x_rows, z_rows, z_begin, x_nan, z_nan, total;
};

Workspace lay_out(const BinaryMatmulParams& p) {
  Workspace w;
  w.row_words = ceil_div(p.k, 32);
  w.x_rows = (p.x_batch_stride == 0 ? min_i64(p.batch, 1) : p.batch) * p.m;
  w.z_rows = (p.z_batch_stride == 0 || p.z_bits != nullptr ? min_i64(p.batch, 1) : p.batch) * p.n;
  w.z_begin = round_up(w.x_rows * w.row_words * 4, 64);
  w.x_nan = round_up(w.z_begin + w.z_rows * w.row_words * 4, 64);
  w.z_nan = round_up(w.x_nan + w.x_rows, 64);
  w.total = w.z_nan + w.z_rows;
  return w;
}

}  // namespace

int64_t binary_matmul_workspace_bytes(const BinaryMatmulParams& p) { return lay_out(p).total; }

void binary_matmul(const BinaryMatmulParams& p, Stream stream) {
  const char* op = "binary_matmul";
  if (!check_sizes(p)) return;
  const Workspace w = lay_out(p);
  check_arg(p.workspace != nullptr && p.workspace_bytes >= w.total, op, ": the workspace has ", p.workspace_bytes,
            " bytes, expected ", w.total);
  const int64_t m_tiles = ceil_div(p.m, kTile), n_tiles = ceil_div(p.n, kTile), tiles = p.batch * m_tiles * n_tiles;
  check_arg(tiles <= 0x7fffffff, op, ": B * M * N = ", p.batch, " * ", p.m, " * ", p.n, " needs ", tiles,
            " tiles, expected at most 2^31 - 1");
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  auto* x_words = reinterpret_cast<uint32_t*>(base);
  auto* z_words = reinterpret_cast<uint32_t*>(base + w.z_begin);
  const auto grid_of = [](int64_t threads) { return unsigned(max_i64(1, min_i64(ceil_div(threads, kThreads), 1 << 16))); };
  const Rows x{p.x, p.dtype, w.x_rows, p.m, p.x_stride, p.x_batch_stride, p.k, w.row_words, x_words, base + w.x_nan};
  pack_rows<<<grid_of(w.x_rows * 32), kThreads, 0, stream_of(stream)>>>(x);
  check_launch(op);
  const Rows z{p.z, p.z_dtype, w.z_rows, p.n, p.z_stride, p.z_batch_stride, p.k, w.row_words, z_words, base + w.z_nan};
  if (p.z_bits != nullptr && w.row_words > 0)
    copy_rows<<<grid_of(w.z_rows * w.row_words), kThreads, 0, stream_of(stream)>>>(p.z_bits, z);
  else pack_rows<<<grid_of(w.z_rows * 32), kThreads, 0, stream_of(stream)>>>(z);
  check_launch(op);
  Product q;
  q.x = x_words;
  q.z = z_words;
  q.x_nan = x.nan;
  q.z_nan = z.nan;
  q.x_batch_rows = p.x_batch_stride == 0 ? 0 : p.m;
  q.z_batch_rows = p.z_batch_stride == 0 || p.z_bits != nullptr ? 0 : p.n;
  q.m = p.m;
  q.n = p.n;
  q.k = p.k;
  q.row_words = w.row_words;
  q.m_tiles = m_tiles;
  q.n_tiles = n_tiles;
  q.y = p.y;
  q.dtype = p.dtype;
  q.y_stride = p.y_stride;
  q.y_batch_stride = p.y_batch_stride;
  q.scale = p.scale;
  q.second_scale = p.second_scale;
  q.bias = p.bias;
  count_tiles<<<unsigned(tiles), kThreads, 0, stream_of(stream)>>>(q);
  check_launch(op);
}

}  // namespace subbyte::cuda
