// pack and unpack: a thread moves eight codes (b bytes of the stream, 8 bytes unpacked), keeps its column and steps through
// rows. One launch a segment, the width a template argument, so that shifts are constants.
// Limited by memory bandwidth: 1 + b/8 bytes a code; widths 3, 5, 6, 7 write single bytes, which the L2 cache joins.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/pack/pack_cuda.h"

namespace subbyte::cuda {
namespace {

struct StreamView {
  uint8_t* packed;  // the segment's first byte of row 0
  int64_t row_bytes;
  uint8_t* unpacked;  // the segment's first code of row 0
  int64_t stride;
  int64_t rows, columns;
  CodeSpan span;
  bool wide_unpacked, wide_packed;  // runs of eight codes are 8-byte aligned; a run's bytes are aligned to their number
};

template <int kBits>
__global__ void __launch_bounds__(256) pack_kernel(StreamView v) {
  const int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = int(min_i64(8, v.columns - run * 8));
  if (count <= 0) return;
  for (int64_t n = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; n < v.rows; n += int64_t(gridDim.y) * blockDim.y) {
    const uint8_t* from = v.unpacked + n * v.stride + run * 8;
    uint8_t* to = v.packed + n * v.row_bytes + run * kBits;
    uint64_t codes = 0, stream = 0;
    if (count == 8 && v.wide_unpacked) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      codes = uint64_t(two.y) << 32 | two.x;
    } else {
      for (int i = 0; i < count; ++i) codes |= uint64_t(from[i]) << (8 * i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) stream |= ((codes >> (8 * i)) & ((1u << kBits) - 1u)) << (kBits * i);
    if (count == 8 && v.wide_packed) {
      if constexpr (kBits == 8) *reinterpret_cast<uint2*>(to) = make_uint2(uint32_t(stream), uint32_t(stream >> 32));
      if constexpr (kBits == 4) *reinterpret_cast<uint32_t*>(to) = uint32_t(stream);
      if constexpr (kBits == 2) *reinterpret_cast<uint16_t*>(to) = uint16_t(stream);
      if constexpr (kBits == 1) *to = uint8_t(stream);
    } else {
      const int bytes = (count * kBits + 7) / 8;
#pragma unroll
      for (int i = 0; i < kBits; ++i)
        if (i < bytes) to[i] = uint8_t(stream >> (8 * i));
    }
  }
}

template <int kBits>
__global__ void __launch_bounds__(256) unpack_kernel(StreamView v) {
  const int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = int(min_i64(8, v.columns - run * 8));
  if (count <= 0) return;
#pragma unroll 4
  for (int64_t n = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; n < v.rows; n += int64_t(gridDim.y) * blockDim.y) {
    const uint8_t* from = v.packed + n * v.row_bytes + run * kBits;
    uint8_t* to = v.unpacked + n * v.stride + run * 8;
    const uint64_t stream = load_bits(from, 0, count * kBits, v.span);
    uint32_t low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low |= (uint32_t(stream >> (kBits * i)) & ((1u << kBits) - 1u)) << (8 * i);
      high |= (uint32_t(stream >> (kBits * (i + 4))) & ((1u << kBits) - 1u)) << (8 * i);
    }
    if (count == 8 && v.wide_unpacked) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    } else {
      for (int i = 0; i < count; ++i) to[i] = uint8_t((i < 4 ? low >> (8 * i) : high >> (8 * (i - 4))));
    }
  }
}

StreamView view_of(const RowLayout& layout, const Segment& s, int64_t n, const uint8_t* packed, const uint8_t* unpacked,
                   int64_t stride) {
  const int bits = format_bits(s.format);
  StreamView v;
  v.packed = const_cast<uint8_t*>(packed) + s.byte_begin;
  v.row_bytes = layout.row_bytes;
  v.unpacked = const_cast<uint8_t*>(unpacked) + s.k_begin;
  v.stride = stride;
  v.rows = n;
  v.columns = s.k_count;
  v.span = {packed, packed + n * layout.row_bytes};
  v.wide_unpacked = aligned_to(v.unpacked, 8) && (stride % 8 == 0 || n == 1);
  v.wide_packed = (bits & (bits - 1)) == 0 && aligned_to(v.packed, bits) && (layout.row_bytes % bits == 0 || n == 1);
  return v;
}

}  // namespace

void pack(const PackParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  for (int i = 0; i < p.layout.segment_count; ++i) {
    const Segment& s = p.layout.segments[i];
    if (s.k_count == 0) continue;
    watch_codes(p.unpacked + s.k_begin, p.n, s.k_count, p.unpacked_stride, format_levels(s.format), "pack", "code", stream);
    const StreamView v = view_of(p.layout, s, p.n, p.packed, p.unpacked, p.unpacked_stride);
    const RowGrid g = row_grid(p.n, ceil_div(s.k_count, 8), 8);
    switch (format_bits(s.format)) {
      case 1: pack_kernel<1><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 2: pack_kernel<2><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 3: pack_kernel<3><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 4: pack_kernel<4><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 5: pack_kernel<5><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 6: pack_kernel<6><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 7: pack_kernel<7><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      default: pack_kernel<8><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
    }
    check_launch("pack");
  }
}

void unpack(const UnpackParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  for (int i = 0; i < p.layout.segment_count; ++i) {
    const Segment& s = p.layout.segments[i];
    if (s.k_count == 0) continue;
    const StreamView v = view_of(p.layout, s, p.n, p.packed, p.unpacked, p.unpacked_stride);
    const RowGrid g = row_grid(p.n, ceil_div(s.k_count, 8), 8);
    switch (format_bits(s.format)) {
      case 1: unpack_kernel<1><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 2: unpack_kernel<2><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 3: unpack_kernel<3><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 4: unpack_kernel<4><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 5: unpack_kernel<5><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 6: unpack_kernel<6><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      case 7: unpack_kernel<7><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
      default: unpack_kernel<8><<<g.grid, g.block, 0, stream_of(stream)>>>(v); break;
    }
    check_launch("unpack");
  }
}

}  // namespace subbyte::cuda
