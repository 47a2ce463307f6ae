// quantize and encode. choose: a warp a group, lanes on neighbouring values; smallest and largest by shuffles, the sum of
// magnitudes in stored order (lane after lane, in double), because the mean must have the reference's bits.
// encode: a thread eight codes, stepping through rows; one Philox block serves four neighbouring elements when their indices
// allow it. Limited by the bytes of w read (twice by quantize: choose, then encode).
#include "subbyte/base/cuda_launch.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/quantize/choose_rule.h"
#include "subbyte/ops/quantize/code_rule.h"
#include "subbyte/ops/quantize/quantize_cuda.h"

namespace subbyte::cuda {
namespace {

// Value of stored column k of row n as float32; NaN when perm points outside.
template <DType kType>
__device__ __forceinline__ float value_at(const QuantizeParams& p, int64_t n, int64_t k) {
  if (p.out.perm != nullptr) {
    k = p.out.perm[k];
    if (k < 0 || k >= p.out.k) return __int_as_float(0x7fffffff);
  }
  return float(Elem<kType>::load(static_cast<const typename Elem<kType>::Storage*>(p.w)[n * p.w_stride + k]));
}

template <DType kType>
__global__ void __launch_bounds__(256) choose_kernel(const __grid_constant__ QuantizeParams p, int64_t groups) {
  const unsigned lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < p.out.n * groups; i += warps) {
    const int64_t n = i / groups, g = i % groups;
    const int64_t begin = g * p.out.group_size, end = min_i64(begin + p.out.group_size, p.out.k);
    const Format f = segment_of(p.out.layout, begin).format;
    float lo = value_at<kType>(p, n, begin), hi = lo;
    bool finite = isfinite(lo);
    double magnitude = 0;
    for (int64_t k0 = begin; k0 < end; k0 += 32) {
      const int64_t k = k0 + lane;
      float v = 0;
      if (k < end) {
        v = value_at<kType>(p, n, k);
        finite = finite && isfinite(v);
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
      }
      if (wants_magnitude(p.scheme)) {
        const double own = fabs(double(v));
        const int count = int(min_i64(32, end - k0));
        for (int j = 0; j < count; ++j) magnitude += __shfl_sync(~0u, own, j);
      }
    }
    for (int step = 16; step > 0; step /= 2) {
      const float other_lo = __shfl_xor_sync(~0u, lo, step), other_hi = __shfl_xor_sync(~0u, hi, step);
      lo = other_lo < lo ? other_lo : lo;
      hi = other_hi > hi ? other_hi : hi;
    }
    finite = __all_sync(~0u, finite);
    if (lane != 0) continue;
    float scale = choose_scale(p.scheme, p.out.zero_kind, f, lo, hi, magnitude, end - begin, p.out.k);
    if (!finite) scale = __int_as_float(0x7fffffff);
    store_float(p.scales, p.out.scale_dtype, i, scale);
    const float stored = load_float(p.scales, p.out.scale_dtype, i);
    if (p.zeros != nullptr) store_float(p.zeros, p.out.zero_dtype, i, choose_zero(p.scheme, p.out.zero_kind, f, lo, stored));
  }
}

template <DType kType>
__global__ void __launch_bounds__(256)
    encode_kernel(const __grid_constant__ QuantizeParams p, const __grid_constant__ Segment s, int64_t groups) {
  const int bits = format_bits(s.format);
  const int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = int(min_i64(8, s.k_count - run * 8));
  if (count <= 0) return;
  const float fixed_zero = format_fixed_zero(s.format);
  const int64_t k = s.k_begin + run * 8, first_group = k / p.out.group_size;
  for (int64_t n = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; n < p.out.n; n += int64_t(gridDim.y) * blockDim.y) {
    uint64_t stream = 0;
    int64_t group = first_group, group_end = (group + 1) * p.out.group_size;
    GroupParams g = load_group(p.out, fixed_zero, n * groups + group);
    const uint64_t first_element = (p.first_row + uint64_t(n)) * uint64_t(p.out.k) + uint64_t(k);
    Philox4 words{};
    for (int j = 0; j < count; ++j) {
      if (k + j == group_end) {
        ++group;
        group_end += p.out.group_size;
        g = load_group(p.out, fixed_zero, n * groups + group);
      }
      const uint64_t element = first_element + uint64_t(j);
      uint32_t word = 0;
      if (p.rounding == Rounding::kStochastic) {
        if (j == 0 || element % 4 == 0) words = philox4x32(p.seed, p.offset, element / 4);
        const uint32_t lane = uint32_t(element % 4);
        word = lane == 0 ? words.v[0] : lane == 1 ? words.v[1] : lane == 2 ? words.v[2] : words.v[3];
      }
      const uint32_t code =
          code_of_word(value_at<kType>(p, n, k + j), g.scale, g.zero, p.out.zero_kind, s.format, p.rounding, word);
      stream |= uint64_t(code) << (bits * j);
    }
    uint8_t* to = p.codes + n * p.out.layout.row_bytes + s.byte_begin + run * bits;
    const int bytes = (count * bits + 7) / 8;
    for (int j = 0; j < bytes; ++j) to[j] = uint8_t(stream >> (8 * j));
  }
}

void launch_encode(const QuantizeParams& p, Stream stream, const char* op) {
  for (int i = 0; i < p.out.layout.segment_count; ++i) {
    const Segment& s = p.out.layout.segments[i];
    if (s.k_count == 0) continue;
    const RowGrid g = row_grid(p.out.n, ceil_div(s.k_count, 8), 4);
    dispatch_dtype(p.w_dtype, [&](auto tag) {
      encode_kernel<decltype(tag)::value><<<g.grid, g.block, 0, stream_of(stream)>>>(p, s, p.out.groups());
    });
    check_launch(op);
  }
}

}  // namespace

void quantize(const QuantizeParams& params, Stream stream) {
  if (!check_quantize_sizes(params)) return;
  QuantizeParams p = params;
  p.out.codes = p.codes;
  p.out.scales = p.scales;
  p.out.zeros = p.zeros;
  watch_finite(p.w, p.w_dtype, p.out.n, p.out.k, p.w_stride, "quantize", "w", stream);
  const int64_t groups = p.out.groups(), blocks = min_i64(ceil_div(p.out.n * groups, 8), 1 << 20);
  dispatch_dtype(p.w_dtype, [&](auto tag) {
    choose_kernel<decltype(tag)::value><<<unsigned(blocks), 256, 0, stream_of(stream)>>>(p, groups);
  });
  check_launch("quantize");
  launch_encode(p, stream, "quantize");
}

void encode(const QuantizeParams& p, Stream stream) {
  if (!check_encode_sizes(p)) return;
  watch_finite(p.w, p.w_dtype, p.out.n, p.out.k, p.w_stride, "encode", "w", stream);
  launch_encode(p, stream, "encode");
}

}  // namespace subbyte::cuda
