// linear, the kernels that serve everything: `dot` for few rows of x (a warp two weight rows, lanes on runs of eight codes, x
// read once for both, sums in registers, shuffles at the end) and `tile` for many (tile_cuda.h).
// dot is limited by unpacking with run-time shifts, about 8 operations a code; the kernels of cuda_sm80_mma.cu are the quick
// ones for common shapes.
#include "subbyte/ops/linear/linear_cuda.h"
#include "subbyte/ops/linear/linear_cuda_plan.h"
#include "subbyte/ops/linear/rows_mma_cuda.h"
#include "subbyte/ops/linear/tile_cuda.h"

namespace subbyte::cuda {
namespace {

struct DotView {
  LinearParams p;
  int64_t groups;
  bool wide_x;     // runs of eight x lie on 16-byte boundaries
  bool one_group;  // no run crosses a group
};

constexpr int kDotWarps = 4;

template <DType kType, int kM, int kRows>
__global__ void __launch_bounds__(32 * kDotWarps) dot_kernel(const __grid_constant__ DotView v) {
  using Storage = typename Elem<kType>::Storage;
  using Sum = typename Elem<kType>::Sum;
  const PackedMatrix& w = v.p.w;
  const int lane = threadIdx.x % 32;
  const int64_t n0 = (int64_t(blockIdx.x) * kDotWarps + threadIdx.x / 32) * kRows, m0 = int64_t(blockIdx.y) * kM;
  if (n0 >= w.n) return;
  const CodeSpan span{w.codes, w.codes + w.n * w.layout.row_bytes};
  const Storage* x = static_cast<const Storage*>(v.p.x);
  Sum sum[kRows][kM] = {};
  for (int si = 0; si < w.layout.segment_count; ++si) {
    const Segment& s = w.layout.segments[si];
    const int bits = format_bits(s.format);
    const uint32_t mask = (1u << bits) - 1u;
    const float fixed_zero = format_fixed_zero(s.format);
    for (int64_t run = lane; run * 8 < s.k_count; run += 32) {
      const int count = int(min_i64(8, s.k_count - run * 8));
      const int64_t k = s.k_begin + run * 8, group = k / w.group_size;
      Sum xv[kM][8];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const Storage* row = x + (m0 + m) * v.p.x_stride;
        if (m0 + m >= v.p.m) {
#pragma unroll
          for (int j = 0; j < 8; ++j) xv[m][j] = 0;
        } else if (v.wide_x && count == 8) {
          alignas(16) Storage line[8];
#pragma unroll
          for (int j = 0; j < int(sizeof(line) / 16); ++j)
            reinterpret_cast<uint4*>(line)[j] = __ldg(reinterpret_cast<const uint4*>(row + k) + j);
#pragma unroll
          for (int j = 0; j < 8; ++j) xv[m][j] = Elem<kType>::load(line[j]);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            xv[m][j] = 0;
            if (j >= count) continue;
            const int64_t column = w.perm != nullptr ? w.perm[k + j] : k + j;
            xv[m][j] = column >= 0 && column < w.k ? Sum(Elem<kType>::load(row[column])) : Sum(__int_as_float(0x7fffffff));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t n = min_i64(n0 + r, w.n - 1);
        const uint64_t stream = load_bits(w.codes + n * w.layout.row_bytes + s.byte_begin, run * 8 * bits, count * bits, span);
        GroupParams g = load_group(w, fixed_zero, n * v.groups + group);
        Sum part[kM] = {};
        if (v.one_group && count == 8) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const Sum value =
                Sum(affine_value(small_to_float(uint32_t(stream >> (bits * j)) & mask), g.scale, g.zero, w.zero_kind));
#pragma unroll
            for (int m = 0; m < kM; ++m) part[m] = fused(xv[m][j], value, part[m]);
          }
        } else {
          int64_t in_group = group, end = (group + 1) * w.group_size;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (j >= count) continue;
            if (k + j == end) {
              ++in_group;
              end += w.group_size;
              g = load_group(w, fixed_zero, n * v.groups + in_group);
            }
            const Sum value =
                Sum(affine_value(small_to_float(uint32_t(stream >> (bits * j)) & mask), g.scale, g.zero, w.zero_kind));
#pragma unroll
            for (int m = 0; m < kM; ++m) part[m] = fused(xv[m][j], value, part[m]);
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) sum[r][m] += part[m];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      for (int step = 16; step > 0; step /= 2) sum[r][m] += __shfl_xor_sync(~0u, sum[r][m], step);
      if (lane == 0 && n0 + r < w.n && m0 + m < v.p.m) {
        Sum bias = 0;
        if (v.p.bias != nullptr) bias = Sum(Elem<kType>::load(static_cast<const Storage*>(v.p.bias)[n0 + r]));
        static_cast<Storage*>(v.p.y)[(m0 + m) * v.p.y_stride + n0 + r] = Elem<kType>::store(sum[r][m] + bias);
      }
    }
}

void launch_dot(const LinearParams& p, Stream stream) {
  DotView v{};
  v.p = p;
  v.groups = p.w.groups();
  const int64_t element = dtype_bytes(p.dtype);
  v.wide_x = p.w.perm == nullptr && aligned_to(p.x, 16) && (p.m == 1 || p.x_stride * element % 16 == 0);
  for (int i = 0; i < p.w.layout.segment_count; ++i) v.wide_x = v.wide_x && p.w.layout.segments[i].k_begin * element % 16 == 0;
  v.one_group = p.w.group_size % 8 == 0 || p.w.group_size >= p.w.k;
  dispatch_dtype(p.dtype, [&](auto tag) {
    constexpr DType kType = decltype(tag)::value;
    const dim3 block{32 * kDotWarps};
    if (p.m == 1) {
      const dim3 grid{unsigned(ceil_div(p.w.n, kDotWarps * 2)), 1};
      dot_kernel<kType, 1, 2><<<grid, block, 0, stream_of(stream)>>>(v);
    } else {
      const dim3 grid{unsigned(ceil_div(p.w.n, kDotWarps * 2)), unsigned(ceil_div(p.m, 4))};
      dot_kernel<kType, 4, 2><<<grid, block, 0, stream_of(stream)>>>(v);
    }
  });
  check_launch("linear");
}

// x in stored order, rows on 16-byte boundaries; a perm entry outside makes the value NaN.
__global__ void __launch_bounds__(256) stage_x_kernel(const unsigned short* x, int64_t x_stride, const int32_t* perm, int64_t k,
                                                      unsigned short* out, int64_t out_stride) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= k) return;
  const int64_t column = perm != nullptr ? perm[i] : i;
  const int64_t m = blockIdx.y;
  out[m * out_stride + i] = column >= 0 && column < k ? x[m * x_stride + column] : (unsigned short)(0x7fff);
}

void launch_rows(const LinearParams& params, Stream stream) {
  LinearParams p = params;
  if (rows_need_staged_x(p)) {
    const dim3 grid{unsigned(ceil_div(p.w.k, 256)), unsigned(p.m)};
    p.x_stride = round_up(p.w.k, 8);
    p.x = p.workspace;
    stage_x_kernel<<<grid, 256, 0, stream_of(stream)>>>(static_cast<const unsigned short*>(params.x), params.x_stride, p.w.perm,
                                                        p.w.k, static_cast<unsigned short*>(p.workspace), p.x_stride);
    check_launch("linear");
    p.w.perm = nullptr;
  }
  switch (format_bits(p.w.layout.segments[0].format)) {
    case 1: launch_rows_1(p, stream); break;
    case 2: launch_rows_2(p, stream); break;
    case 3: launch_rows_3(p, stream); break;
    case 4: launch_rows_4(p, stream); break;
    case 5: launch_rows_5(p, stream); break;
    case 6: launch_rows_6(p, stream); break;
    case 7: launch_rows_7(p, stream); break;
    default: launch_rows_8(p, stream); break;
  }
}

void launch_tile_kernel(const LinearParams& p, Stream stream) {
  TileView v{};
  v.a = p.x;
  v.a_stride = p.x_stride;
  v.w = p.w;
  v.groups = p.w.groups();
  v.bias = p.bias;
  v.c = p.y;
  v.c_stride = p.y_stride;
  v.m = p.m;
  launch_tile<false>(v, p.dtype, stream, "linear");
}

}  // namespace

int64_t linear_workspace_bytes(const LinearParams& p) {
  if (select_linear_cuda_kernel(p) != LinearCudaKernel::kRows || !rows_need_staged_x(p)) return 0;
  return p.m * round_up(p.w.k, 8) * dtype_bytes(p.dtype);
}

void linear(const LinearParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  const int64_t needed = cuda::linear_workspace_bytes(p);
  check_arg(needed == 0 || (p.workspace != nullptr && p.workspace_bytes >= needed), "linear: workspace has ",
            p.workspace == nullptr ? 0 : p.workspace_bytes, " bytes, expected ", needed);
  switch (select_linear_cuda_kernel(p)) {
    case LinearCudaKernel::kRows: launch_rows(p, stream); break;
    case LinearCudaKernel::kDot: launch_dot(p, stream); break;
    case LinearCudaKernel::kTile: launch_tile_kernel(p, stream); break;
  }
}

}  // namespace subbyte::cuda
