// linear_a8. First kernel: a block a row of x finds the largest magnitude, quantizes to int8 in stored order, each group padded
// with zeros to a multiple of 16, and sums each group. Second: a warp a weight row, a part of the warp a group, so that a
// group's integer sum is complete before it is scaled; products by dp4a of unsigned codes with signed x, the middle code leaves
// through the group sums of x. Padding makes any code next to a group's end harmless: its x is zero.
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/linear_a8/a8_workspace_cuda.h"
#include "subbyte/ops/linear_a8/linear_a8_cuda_plan.h"

namespace subbyte::cuda {
namespace {

struct A8View {
  LinearA8Params p;
  A8Workspace ws;
  int lanes;  // of a warp that share a group: a power of two
};

template <DType kType>
__device__ __forceinline__ float x_at(const LinearA8Params& p, int64_t m, int64_t k) {
  if (p.w.perm != nullptr) {
    k = p.w.perm[k];
    if (k < 0 || k >= p.w.k) return __int_as_float(0x7fffffff);
  }
  return float(Elem<kType>::load(static_cast<const typename Elem<kType>::Storage*>(p.x)[m * p.x_stride + k]));
}

__device__ __forceinline__ float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

template <DType kType>
__global__ void __launch_bounds__(512) quantize_x_kernel(const __grid_constant__ A8View v) {
  __shared__ float warp_a[16];
  __shared__ int warp_finite[16];
  const int64_t m = blockIdx.x, k_end = v.p.w.k;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float a = 0;
  bool finite = true;
  for (int64_t k = threadIdx.x; k < k_end; k += blockDim.x) {
    const float x = x_at<kType>(v.p, m, k);
    finite = finite && isfinite(x);
    a = fmaxf(a, fabsf(x));
  }
  a = warp_max(a);
  finite = __all_sync(~0u, finite);
  if (lane == 0) {
    warp_a[warp] = a;
    warp_finite[warp] = finite;
  }
  __syncthreads();
  for (int i = 0; i < 16; ++i) {
    a = fmaxf(a, warp_a[i]);
    finite = finite && warp_finite[i] != 0;
  }
  uint8_t* base = static_cast<uint8_t*>(v.p.workspace);
  float* scales = reinterpret_cast<float*>(base + v.ws.scales_at) + m * v.ws.groups;
  int* sums = reinterpret_cast<int*>(base + v.ws.sums_at) + m * v.ws.groups;
  for (int64_t g = warp; g < v.ws.groups; g += 16) {
    const int64_t begin = g * v.p.w.group_size, end = min_i64(begin + v.p.w.group_size, k_end);
    float group_a = a;
    if (v.p.x_scale == ActivationScale::kRowGroup) {
      group_a = 0;
      for (int64_t k = begin + lane; k < end; k += 32) group_a = fmaxf(group_a, fabsf(x_at<kType>(v.p, m, k)));
      group_a = warp_max(group_a);
    }
    if (group_a < kLinearA8SmallestX) group_a = 0;
    const float inverse = group_a > 0 ? __fdiv_rn(127.0f, group_a) : 0.0f;
    int sum = 0;
    uint8_t* out = base + m * v.ws.row_pitch + g * v.ws.group_pitch;
    for (int64_t i = lane; i < v.ws.group_pitch; i += 32) {
      int q = 0;
      if (finite && begin + i < end)
        q = int(fminf(fmaxf(rintf(__fmul_rn(x_at<kType>(v.p, m, begin + i), inverse)), -127.0f), 127.0f));
      sum += q;
      out[i] = uint8_t(q);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
      scales[g] = finite ? __fdiv_rn(group_a, 127.0f) : __int_as_float(0x7fffffff);
      sums[g] = sum;
    }
  }
}

// acc + four unsigned codes times four signed values.
__device__ __forceinline__ int dot4(uint32_t codes, uint32_t x, int acc) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(codes), "r"(x), "r"(acc));
  return d;
}

// Eight codes of the stream, one a byte.
__device__ __forceinline__ uint2 spread_codes(uint64_t stream, int bits) {
  const uint32_t mask = (1u << bits) - 1u;
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low |= (uint32_t(stream >> (bits * i)) & mask) << (8 * i);
    high |= (uint32_t(stream >> (bits * (i + 4))) & mask) << (8 * i);
  }
  return make_uint2(low, high);
}

constexpr int kA8Warps = 4;

template <DType kType, int kM>
__global__ void __launch_bounds__(32 * kA8Warps) a8_dot_kernel(const __grid_constant__ A8View v) {
  using Storage = typename Elem<kType>::Storage;
  const PackedMatrix& w = v.p.w;
  const int lane = threadIdx.x % 32, part = lane % v.lanes;
  const int64_t n = int64_t(blockIdx.x) * kA8Warps + threadIdx.x / 32;
  if (n >= w.n) return;
  const CodeSpan span{w.codes, w.codes + w.n * w.layout.row_bytes};
  const uint8_t* base = static_cast<const uint8_t*>(v.p.workspace);
  const float* scales = reinterpret_cast<const float*>(base + v.ws.scales_at);
  const int* sums = reinterpret_cast<const int*>(base + v.ws.sums_at);
  for (int64_t m0 = int64_t(blockIdx.y) * kM; m0 < v.p.m; m0 += int64_t(gridDim.y) * kM) {
    float acc[kM] = {};
    for (int64_t g0 = 0; g0 < v.ws.groups; g0 += 32 / v.lanes) {
      const int64_t g = g0 + lane / v.lanes;
      const bool inside = g < v.ws.groups;
      const int64_t begin = g * w.group_size, length = inside ? min_i64(w.group_size, w.k - begin) : 0;
      const Segment& s = segment_of(w.layout, inside ? begin : 0);
      const int bits = format_bits(s.format);
      const uint8_t* row = w.codes + n * w.layout.row_bytes + s.byte_begin;
      int d[kM] = {};
      for (int64_t i = int64_t(part) * 8; i < length; i += int64_t(v.lanes) * 8) {
        const int count = int(min_i64(8, length - i));
        const uint2 codes = spread_codes(load_bits(row, (begin - s.k_begin + i) * bits, count * bits, span), bits);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int64_t row_m = min_i64(m0 + m, v.p.m - 1);
          const uint2 x = *reinterpret_cast<const uint2*>(base + row_m * v.ws.row_pitch + g * v.ws.group_pitch + i);
          d[m] = dot4(codes.x, x.x, dot4(codes.y, x.y, d[m]));
        }
      }
      const int middle = format_levels(s.format) / 2;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        // A lane's own sum fits int32 for any K below two million; the sum of 32 lanes may not.
        int64_t total = d[m];
        if (w.group_size > 65536) {
          for (int step = v.lanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        } else {
          for (int step = v.lanes / 2; step > 0; step /= 2) d[m] += __shfl_xor_sync(~0u, d[m], step);
          total = d[m];
        }
        if (inside && part == 0 && m0 + m < v.p.m) {
          const int64_t at = (m0 + m) * v.ws.groups + g;
          const GroupParams gp = load_group(w, format_fixed_zero(s.format), n * v.ws.groups + g);
          const float at_middle = affine_value(float(middle), gp.scale, gp.zero, w.zero_kind);
          const int e = sums[at];
          acc[m] += scales[at] * __fmaf_rn(gp.scale, float(total - int64_t(middle) * e), at_middle * float(e));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      for (int step = 16; step > 0; step /= 2) acc[m] += __shfl_xor_sync(~0u, acc[m], step);
      if (lane == 0 && m0 + m < v.p.m) {
        float bias = 0;
        if (v.p.bias != nullptr) bias = float(Elem<kType>::load(static_cast<const Storage*>(v.p.bias)[n]));
        static_cast<Storage*>(v.p.y)[(m0 + m) * v.p.y_stride + n] = Elem<kType>::store(acc[m] + bias);
      }
    }
  }
}

}  // namespace

int64_t linear_a8_workspace_bytes(const LinearA8Params& p) { return a8_workspace(p).bytes; }

void linear_a8(const LinearA8Params& p, Stream stream) {
  if (!check_sizes(p)) return;
  A8View v{p, a8_workspace(p), 1};
  check_arg(v.ws.bytes == 0 || (p.workspace != nullptr && p.workspace_bytes >= v.ws.bytes), "linear_a8: workspace has ",
            p.workspace_bytes, " bytes, expected ", v.ws.bytes);
  while (v.lanes < 32 && v.lanes * 16 < p.w.group_size) v.lanes *= 2;
  const auto run = [&](auto tag) {
    constexpr DType kType = decltype(tag)::value;
    if (p.w.k > 0) {
      quantize_x_kernel<kType><<<unsigned(p.m), 512, 0, stream_of(stream)>>>(v);
      check_launch("linear_a8");
    }
    if (select_linear_a8_cuda_kernel(p) == LinearA8CudaKernel::kRows) {
      launch_a8_rows(p, v.ws, stream);
      return;
    }
    const dim3 grid{unsigned(ceil_div(p.w.n, kA8Warps)), unsigned(min_i64(ceil_div(p.m, 4), 65535))};
    if (p.m == 1) a8_dot_kernel<kType, 1><<<grid, 32 * kA8Warps, 0, stream_of(stream)>>>(v);
    else a8_dot_kernel<kType, 4><<<grid, 32 * kA8Warps, 0, stream_of(stream)>>>(v);
    check_launch("linear_a8");
  };
  switch (p.dtype) {
    case DType::kF32: run(TypeTag<DType::kF32>{}); break;
    case DType::kF16: run(TypeTag<DType::kF16>{}); break;
    default: run(TypeTag<DType::kBF16>{}); break;
  }
}

}  // namespace subbyte::cuda
