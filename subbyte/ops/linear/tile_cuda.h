// The exact tile product that linear and linear_grad_input share: weights decoded to shared memory in float32 (exact by
// affine_value), products fused in float32, or in double for float64 operands; sums of at most 16 products are added to the
// running sum, which keeps the chain inside the bound of linear.h for every K. Serves every format, group size, permutation,
// stride and type; the kernels before it in the selection serve the common cases faster. Included by .cu files only.
#pragma once
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"

namespace subbyte::cuda {
namespace {

// c[m, col] = sum_r a[m, r] * w(r, col) + bias[col].
//   linear:      r = stored column k, col = row n of W, a column is perm[k]
//   grad_input:  r = row n of W, col = stored column k, written to column perm[k] of c
struct TileView {
  const void* a;
  int64_t a_stride;
  PackedMatrix w;
  int64_t groups;
  const void* bias;
  void* c;
  int64_t c_stride;
  int64_t m;
};

constexpr int kTileRows = 64, kTileColumns = 64, kTileDepth = 32, kTilePitch = 65;

// Eight (or `count`) weights of row n from stored column k on, all in segment s, as float32.
__device__ __forceinline__ void decode_eight(const PackedMatrix& w, const Segment& s, int64_t groups, int64_t n, int64_t k,
                                             int count, float (&out)[8]) {
  const int bits = format_bits(s.format);
  const uint32_t mask = (1u << bits) - 1u;
  const float fixed_zero = format_fixed_zero(s.format);
  const CodeSpan span{w.codes, w.codes + w.n * w.layout.row_bytes};
  const uint64_t stream =
      load_bits(w.codes + n * w.layout.row_bytes + s.byte_begin, (k - s.k_begin) * bits, count * bits, span);
  int64_t group = k / w.group_size, end = (group + 1) * w.group_size;
  GroupParams g = load_group(w, fixed_zero, n * groups + group);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    out[j] = 0;
    if (j >= count) continue;
    if (k + j == end) {
      ++group;
      end += w.group_size;
      g = load_group(w, fixed_zero, n * groups + group);
    }
    out[j] = affine_value(small_to_float(uint32_t(stream >> (bits * j)) & mask), g.scale, g.zero, w.zero_kind);
  }
}

template <DType kType, bool kGradInput>
__global__ void __launch_bounds__(256) tile_kernel(const __grid_constant__ TileView v) {
  using Storage = typename Elem<kType>::Storage;
  using Sum = typename Elem<kType>::Sum;
  __shared__ Sum a[kTileDepth][kTilePitch];
  __shared__ Sum b[kTileDepth][kTilePitch];
  const int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;
  const PackedMatrix& w = v.w;
  // The columns of this block: of one segment under grad_input.
  int first_segment = 0, last_segment = w.layout.segment_count - 1;
  int64_t column0 = int64_t(blockIdx.x) * kTileColumns, columns = w.n;
  if constexpr (kGradInput) {
    int64_t tile = blockIdx.x;
    int s = 0;
    while (tile >= ceil_div(w.layout.segments[s].k_count, kTileColumns)) {
      tile -= ceil_div(w.layout.segments[s].k_count, kTileColumns);
      ++s;
    }
    first_segment = last_segment = s;
    column0 = w.layout.segments[s].k_begin + tile * kTileColumns;
    columns = w.layout.segments[s].k_begin + w.layout.segments[s].k_count;
  }
  for (int64_t m0 = int64_t(blockIdx.y) * kTileRows; m0 < v.m; m0 += int64_t(gridDim.y) * kTileRows) {
    Sum sum[4][4] = {};
    for (int si = first_segment; si <= last_segment; ++si) {
      const Segment& s = w.layout.segments[si];
      const int64_t r_begin = kGradInput ? 0 : s.k_begin, r_end = kGradInput ? w.n : s.k_begin + s.k_count;
      for (int64_t r0 = r_begin; r0 < r_end; r0 += kTileDepth) {
        __syncthreads();
        {
          const int depth = tid % kTileDepth;
          const int64_t r = r0 + depth;
          int64_t column = r;
          bool inside = r < r_end;
          if (!kGradInput && inside && w.perm != nullptr) column = w.perm[r];
          const bool lost = inside && (column < 0 || (!kGradInput && column >= w.k));
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int row = tid / kTileDepth + 8 * e;
            Sum value = 0;
            if (inside && m0 + row < v.m) {
              value = lost ? Sum(__int_as_float(0x7fffffff))
                           : Sum(Elem<kType>::load(static_cast<const Storage*>(v.a)[(m0 + row) * v.a_stride + column]));
            }
            a[depth][row] = value;
          }
        }
        {
          float eight[8] = {};
          const int row = kGradInput ? tid / 8 : tid / 4, octet = kGradInput ? tid % 8 : tid % 4;
          const int64_t n = kGradInput ? r0 + row : column0 + row, k = (kGradInput ? column0 : r0) + octet * 8;
          const int64_t k_end = s.k_begin + s.k_count;
          if (n < w.n && k < k_end) decode_eight(w, s, v.groups, n, k, int(min_i64(8, k_end - k)), eight);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if constexpr (kGradInput) b[row][octet * 8 + j] = Sum(eight[j]);
            else b[octet * 8 + j][row] = Sum(eight[j]);
          }
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < kTileDepth; half += 16) {
          Sum part[4][4] = {};
#pragma unroll 4
          for (int d = half; d < half + 16; ++d) {
            Sum av[4], bv[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              av[i] = a[d][ty + 16 * i];
              bv[i] = b[d][tx + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) part[i][j] = fused(av[i], bv[j], part[i][j]);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t column = column0 + tx + 16 * j;
      if (column >= columns) continue;
      int64_t to = column;
      if (kGradInput && w.perm != nullptr) to = w.perm[column];
      if (to < 0 || (kGradInput && to >= w.k)) continue;
      Sum bias = 0;
      if (v.bias != nullptr) bias = Sum(Elem<kType>::load(static_cast<const Storage*>(v.bias)[column]));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = m0 + ty + 16 * i;
        if (m < v.m) static_cast<Storage*>(v.c)[m * v.c_stride + to] = Elem<kType>::store(sum[i][j] + bias);
      }
    }
  }
}

template <bool kGradInput>
void launch_tile(const TileView& v, DType dtype, Stream stream, const char* op) {
  int64_t tiles = 0;
  if (kGradInput) {
    for (int i = 0; i < v.w.layout.segment_count; ++i) tiles += ceil_div(v.w.layout.segments[i].k_count, kTileColumns);
  } else {
    tiles = ceil_div(v.w.n, kTileColumns);
  }
  const dim3 grid{unsigned(tiles), unsigned(min_i64(ceil_div(v.m, kTileRows), 65535))};
  dispatch_dtype(dtype,
                 [&](auto tag) { tile_kernel<decltype(tag)::value, kGradInput><<<grid, 256, 0, stream_of(stream)>>>(v); });
  check_launch(op);
}

}  // namespace
}  // namespace subbyte::cuda
