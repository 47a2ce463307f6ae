// dequantize and embedding: a thread decodes eight codes of one column run and steps through rows, so that group and permuted
// columns are found once; sixteen (float16, bfloat16) or thirty-two bytes (float32) leave it at a time, neighbours adjacent.
// One launch a segment, width and output type template arguments. Limited by the bytes written: 2 to 4 a value against b/8
// read. A run that crosses a group (group_size no multiple of 8) or a permuted or unaligned output takes the element-wise
// branch.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/dequantize/decode_rows_cuda.h"
#include "subbyte/ops/dequantize/dequantize_cuda.h"

namespace subbyte::cuda {
namespace {

struct DecodeView {
  PackedMatrix w;
  Segment segment;
  float fixed_zero;
  int64_t groups;
  const void* indices;
  bool indices_are_int64;
  int64_t count;
  void* out;
  int64_t out_stride;
  bool wide;       // out takes 16-byte stores at every run
  bool one_group;  // no run crosses a group
};

// Value of a code by affine_value.
__device__ __forceinline__ float value_of(uint32_t code, GroupParams g, ZeroKind kind) {
  return affine_value(small_to_float(code), g.scale, g.zero, kind);
}

template <DType kOut>
__device__ __forceinline__ typename Elem<kOut>::Storage out_of(float v) {
  if constexpr (kOut == DType::kF64) return double(v);
  else return Elem<kOut>::store(v);
}

template <int kBits, DType kOut>
__global__ void __launch_bounds__(256) decode_kernel(const __grid_constant__ DecodeView v) {
  using Storage = typename Elem<kOut>::Storage;
  constexpr uint32_t kMask = (1u << kBits) - 1u;
  const int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = int(min_i64(8, v.segment.k_count - run * 8));
  if (count <= 0) return;
  const int64_t k = v.segment.k_begin + run * 8, group = k / v.w.group_size, group_end = (group + 1) * v.w.group_size;
  const CodeSpan span{v.w.codes, v.w.codes + v.w.n * v.w.layout.row_bytes};
  const uint8_t* column = v.w.codes + v.segment.byte_begin + run * kBits;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; i < v.count; i += int64_t(gridDim.y) * blockDim.y) {
    int64_t n = i;
    if (v.indices != nullptr)
      n = v.indices_are_int64 ? static_cast<const int64_t*>(v.indices)[i] : static_cast<const int32_t*>(v.indices)[i];
    const bool inside = n >= 0 && n < v.w.n;
    Storage* out = static_cast<Storage*>(v.out) + i * v.out_stride;
    const uint64_t stream = inside ? load_bits(column + n * v.w.layout.row_bytes, 0, count * kBits, span) : 0;
    GroupParams g{__int_as_float(0x7fffffff), 0.0f};
    if (inside) g = load_group(v.w, v.fixed_zero, n * v.groups + group);
    if (count == 8 && v.wide && v.one_group) {
      alignas(16) Storage line[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) line[j] = out_of<kOut>(value_of(uint32_t(stream >> (kBits * j)) & kMask, g, v.w.zero_kind));
      uint4* to = reinterpret_cast<uint4*>(out + k);
#pragma unroll
      for (int j = 0; j < int(sizeof(line) / 16); ++j) to[j] = reinterpret_cast<const uint4*>(line)[j];
    } else {
      int64_t in_group = group, end = group_end;
      for (int j = 0; j < count; ++j) {
        if (k + j == end) {
          ++in_group;
          end += v.w.group_size;
          if (inside) g = load_group(v.w, v.fixed_zero, n * v.groups + in_group);
        }
        const int64_t to = v.w.perm != nullptr ? v.w.perm[k + j] : k + j;
        if (to < 0 || to >= v.w.k) continue;
        out[to] = out_of<kOut>(value_of(uint32_t(stream >> (kBits * j)) & kMask, g, v.w.zero_kind));
      }
    }
  }
}

// The common case: eight codes are one aligned load, one group, sixteen-byte stores; kBatch rows are requested before the first
// is decoded, so that the read hides behind the write.
template <int kBits, DType kOut>
__global__ void __launch_bounds__(256) decode_wide_kernel(const __grid_constant__ DecodeView v) {
  using Storage = typename Elem<kOut>::Storage;
  constexpr uint32_t kMask = (1u << kBits) - 1u;
  constexpr int kBatch = 4;
  const int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (run * 8 >= v.segment.k_count) return;
  const int64_t k = v.segment.k_begin + run * 8, group = k / v.w.group_size;
  const uint8_t* column = v.w.codes + v.segment.byte_begin + run * kBits;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; first < v.count; first += kBatch * step) {
    uint2 codes[kBatch];
    GroupParams g[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * step;
      codes[j] = make_uint2(0, 0);
      g[j] = GroupParams{__int_as_float(0x7fffffff), 0.0f};
      if (i >= v.count) continue;
      int64_t n = i;
      if (v.indices != nullptr)
        n = v.indices_are_int64 ? static_cast<const int64_t*>(v.indices)[i] : static_cast<const int32_t*>(v.indices)[i];
      if (n < 0 || n >= v.w.n) continue;
      const uint8_t* from = column + n * v.w.layout.row_bytes;
      if constexpr (kBits == 8) codes[j] = __ldg(reinterpret_cast<const uint2*>(from));
      if constexpr (kBits == 4) codes[j].x = __ldg(reinterpret_cast<const uint32_t*>(from));
      if constexpr (kBits == 2) codes[j].x = __ldg(reinterpret_cast<const unsigned short*>(from));
      if constexpr (kBits == 1) codes[j].x = __ldg(from);
      g[j] = load_group(v.w, v.fixed_zero, n * v.groups + group);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * step;
      if (i >= v.count) continue;
      alignas(16) Storage line[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const uint32_t word = kBits == 8 && c >= 4 ? codes[j].y : codes[j].x;
        line[c] = out_of<kOut>(value_of((word >> (kBits == 8 ? c % 4 * 8 : c * kBits)) & kMask, g[j], v.w.zero_kind));
      }
      uint4* to = reinterpret_cast<uint4*>(static_cast<Storage*>(v.out) + i * v.out_stride + k);
#pragma unroll
      for (int c = 0; c < int(sizeof(line) / 16); ++c) to[c] = reinterpret_cast<const uint4*>(line)[c];
    }
  }
}

template <int kBits>
void launch(const DecodeView& v, DType out_dtype, Stream stream) {
  const RowGrid g = row_grid(v.count, ceil_div(v.segment.k_count, 8), 8);
  dispatch_dtype(out_dtype,
                 [&](auto tag) { decode_kernel<kBits, decltype(tag)::value><<<g.grid, g.block, 0, stream_of(stream)>>>(v); });
}

}  // namespace

void decode_rows(const PackedMatrix& w, const void* indices, bool indices_are_int64, int64_t count, void* out, DType out_dtype,
                 int64_t out_stride, Stream stream, const char* op) {
  for (int i = 0; i < w.layout.segment_count; ++i) {
    DecodeView v{};
    v.w = w;
    v.segment = w.layout.segments[i];
    if (v.segment.k_count == 0) continue;
    v.fixed_zero = format_fixed_zero(v.segment.format);
    v.groups = w.groups();
    v.indices = indices;
    v.indices_are_int64 = indices_are_int64;
    v.count = count;
    v.out = out;
    v.out_stride = out_stride;
    const int64_t element = dtype_bytes(out_dtype);
    v.wide = w.perm == nullptr && aligned_to(out, 16) && v.segment.k_begin * element % 16 == 0 &&
             (count == 1 || out_stride * element % 16 == 0);
    v.one_group = w.group_size % 8 == 0 || w.group_size >= w.k;
    switch (format_bits(v.segment.format)) {
      case 1: launch<1>(v, out_dtype, stream); break;
      case 2: launch<2>(v, out_dtype, stream); break;
      case 3: launch<3>(v, out_dtype, stream); break;
      case 4: launch<4>(v, out_dtype, stream); break;
      case 5: launch<5>(v, out_dtype, stream); break;
      case 6: launch<6>(v, out_dtype, stream); break;
      case 7: launch<7>(v, out_dtype, stream); break;
      default: launch<8>(v, out_dtype, stream); break;
    }
    check_launch(op);
  }
}

void dequantize(const DequantizeParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  decode_rows(p.w, nullptr, false, p.w.n, p.out, p.out_dtype, p.out_stride, stream, "dequantize");
}

}  // namespace subbyte::cuda
