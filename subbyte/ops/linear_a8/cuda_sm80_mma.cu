// linear_a8 on the matrix units: mma.m16n8k32 of unsigned codes (A, 16 rows of W) with signed xq (B), exact in int32. The shape
// of ops/linear/rows_mma_cuda.h: a lane loads 32 codes of a row in one piece, and since the k order is free, one shift and one
// AND give four codes (those 8 bits apart); x is brought into that order by byte permutes once for two tiles. The middle code
// leaves through the group sums of xq; scales enter once a group in float32. Warps take interleaved chunks of 128 columns and
// meet in shared memory in a fixed order. Limited by the bytes of W for few rows; many rows pass over W once for every 16.
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/linear/rows_mma_cuda.h"
#include "subbyte/ops/linear_a8/a8_workspace_cuda.h"

namespace subbyte::cuda {
namespace {

struct A8RowsView {
  LinearA8Params p;
  A8Workspace ws;
  int chunks, tail, middle;  // tail: columns of the last chunk of 128
};

__device__ __forceinline__ void mma_u8s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Codes i, i + 8 / kBits, i + 16 / kBits, i + 24 / kBits of a word, one a byte.
template <int kBits>
__device__ __forceinline__ uint32_t four_codes(uint32_t w, int i) {
  return (w >> (i * kBits)) & (((1u << kBits) - 1u) * 0x01010101u);
}
// The values of x (32 / kBits bytes in order) that four_codes(., i) multiplies.
template <int kBits>
__device__ __forceinline__ uint32_t four_values(const uint32_t* x, int i) {
  if constexpr (kBits == 8) {
    return x[0];
  } else if constexpr (kBits == 4) {
    return __byte_perm(x[0], x[1], i == 0 ? 0x6420 : 0x7531);
  } else {  // byte i % 4 of four words, 8 / kBits bytes apart
    constexpr int kStep = 2 / kBits;
    const int from = i / 4, select = i % 4 | (4 + i % 4) << 4;
    const uint32_t low = __byte_perm(x[from], x[from + kStep], select);
    const uint32_t high = __byte_perm(x[from + 2 * kStep], x[from + 3 * kStep], select);
    return __byte_perm(low, high, 0x5410);
  }
}

__device__ __forceinline__ float value_at_middle(const A8RowsView& v, float scale, int64_t i) {
  const PackedMatrix& w = v.p.w;
  const float zero =
      w.zero_kind == ZeroKind::kFixed ? format_fixed_zero(w.layout.segments[0].format) : load_param(w.zeros, w.zero_dtype, i);
  return affine_value(float(v.middle), scale, zero, w.zero_kind);
}

// kOneGroup: a scale a row of W; integers run through all of K and across the warps. Otherwise a group lies within a chunk
// (kPieces of them), so that its integer sum is complete before it is scaled.
template <int kBits, int kPieces, int kHalves, bool kOneGroup>
__global__ void __launch_bounds__(32 * kRowsMaxWarps, 1) a8_rows_kernel(const __grid_constant__ A8RowsView v) {
  constexpr int kWords = kBits, kPieceWords = kWords / kPieces, kPieceBytes = 4 * kPieceWords, kPieceColumns = 128 / kPieces;
  constexpr int kWordFours = 8 / kBits, kSlots = rows_slots<kBits>();
  extern __shared__ __align__(16) float red[];
  const PackedMatrix& w = v.p.w;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int64_t n0 = int64_t(blockIdx.x) * kRowsTiles * 16, m0 = int64_t(blockIdx.y) * kHalves * 8;
  const uint8_t* base = static_cast<const uint8_t*>(v.p.workspace);
  const float* x_scales = reinterpret_cast<const float*>(base + v.ws.scales_at);
  const int* x_sums = reinterpret_cast<const int*>(base + v.ws.sums_at);

  const uint8_t* codes[kRowsTiles][2];
  const uint8_t* scales[kRowsTiles][2];
  int64_t group_row[kRowsTiles][2];
  const int scale_bytes = int(dtype_bytes(w.scale_dtype));
#pragma unroll
  for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = min_i64(n0 + t * 16 + h * 8 + row, w.n - 1);
      codes[t][h] = w.codes + n * w.layout.row_bytes + quad * kPieceBytes;
      group_row[t][h] = n * v.ws.groups;
      scales[t][h] = static_cast<const uint8_t*>(w.scales) + n * v.ws.groups * scale_bytes;
    }
  const uint8_t* x[kHalves];
  int64_t x_groups[kHalves][2];  // of the two rows of x whose results this lane holds
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    x[h] = base + min_i64(m0 + h * 8 + row, v.p.m - 1) * v.ws.row_pitch + quad * (kPieceColumns / 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) x_groups[h][i] = min_i64(m0 + h * 8 + quad * 2 + i, v.p.m - 1) * v.ws.groups;
  }

  uint32_t word[kSlots][kRowsTiles][2][kWords];
  uint32_t scale[kSlots][kRowsTiles][2][kPieces];
  auto group_of = [&](int chunk, int piece) { return kOneGroup ? 0 : min(chunk * kPieces + piece, int(v.ws.groups) - 1); };
  // True when this lane's share of a piece lies inside K.
  auto inside = [&](int chunk, int piece) {
    return chunk + 1 < v.chunks || piece * kPieceColumns + (quad + 1) * (kPieceColumns / 4) <= v.tail;
  };
  auto fetch = [&](int slot, int chunk) {
    if (chunk >= v.chunks) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = chunk * (16 * kBits) + i * (4 * kPieceBytes);
      if (inside(chunk, i)) {
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) load_piece<kPieceBytes>(&word[slot][t][h][i * kPieceWords], codes[t][h] + at);
      } else {
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < kPieceWords; ++j) word[slot][t][h][i * kPieceWords + j] = 0;
      }
      if constexpr (kOneGroup) continue;
      const int group = group_of(chunk, i) * scale_bytes;
      if (scale_bytes == 4) {
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) scale[slot][t][h][i] = __ldg(reinterpret_cast<const uint32_t*>(scales[t][h] + group));
      } else {
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            scale[slot][t][h][i] = __ldg(reinterpret_cast<const unsigned short*>(scales[t][h] + group));
      }
    }
  };

  uint32_t next_x[kHalves][8];  // requested a chunk ahead
  auto fetch_x = [&](int h, int chunk) {
    if (chunk >= v.chunks) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint2* from = reinterpret_cast<const uint2*>(x[h] + (chunk * 128 + i * kPieceColumns));
      const bool read = inside(chunk, i);
#pragma unroll
      for (int j = 0; j < kPieceColumns / 32; ++j) {
        uint2 two = make_uint2(0, 0);
        if (read) two = from[j];
        next_x[h][i * (kPieceColumns / 16) + j * 2] = two.x;
        next_x[h][i * (kPieceColumns / 16) + j * 2 + 1] = two.y;
      }
    }
  };

#pragma unroll
  for (int h = 0; h < kHalves; ++h) fetch_x(h, warp);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) fetch(slot, warp + slot * warps);

  float y[kRowsTiles][kHalves][4] = {};
  int total[kRowsTiles][kHalves][4] = {};
  for (int c0 = warp; c0 < v.chunks; c0 += kSlots * warps) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int chunk = c0 + slot * warps;
      if (chunk >= v.chunks) continue;
      uint32_t b[kHalves][8];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int f = 0; f < 8; ++f) b[h][f] = four_values<kBits>(&next_x[h][f / kWordFours * kWordFours], f % kWordFours);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) fetch_x(h, chunk + warps);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        constexpr int kFours = 8 / kPieces;
        if (chunk + 1 == v.chunks && i * kPieceColumns >= v.tail) continue;  // a short last chunk has fewer groups
        const int group = group_of(chunk, i);
        float x_scale[kHalves][2];
        int x_sum[kHalves][2];
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            x_scale[h][j] = x_scales[x_groups[h][j] + group];
            x_sum[h][j] = x_sums[x_groups[h][j] + group];
          }
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t) {
          int acc[kHalves][4] = {};
#pragma unroll
          for (int f = i * kFours; f < (i + 1) * kFours; f += 2) {
            const int w0 = f / kWordFours, p0 = f % kWordFours, w1 = (f + 1) / kWordFours, p1 = (f + 1) % kWordFours;
            const uint32_t a0 = four_codes<kBits>(word[slot][t][0][w0], p0), a1 = four_codes<kBits>(word[slot][t][1][w0], p0);
            const uint32_t a2 = four_codes<kBits>(word[slot][t][0][w1], p1), a3 = four_codes<kBits>(word[slot][t][1][w1], p1);
#pragma unroll
            for (int h = 0; h < kHalves; ++h) mma_u8s8(kOneGroup ? total[t][h] : acc[h], a0, a1, a2, a3, b[h][f], b[h][f + 1]);
          }
          if constexpr (!kOneGroup) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float s = raw_value(scale[slot][t][r][i], w.scale_dtype);
              const float at_middle = value_at_middle(v, s, group_row[t][r] + group);
#pragma unroll
              for (int h = 0; h < kHalves; ++h)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  const float d = float(acc[h][r * 2 + j] - v.middle * x_sum[h][j]);
                  const float inner = __fmaf_rn(s, d, at_middle * float(x_sum[h][j]));
                  y[t][h][r * 2 + j] = __fmaf_rn(x_scale[h][j], inner, y[t][h][r * 2 + j]);
                }
            }
          }
        }
      }
      fetch(slot, chunk + kSlots * warps);
    }
  }

  constexpr int kColumns = kHalves * 8, kOut = kRowsTiles * 16 * kColumns;
#pragma unroll
  for (int t = 0; t < kRowsTiles; ++t)
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        red[warp * kOut + (h * 8 + quad * 2 + i % 2) * (kRowsTiles * 16) + t * 16 + row + i / 2 * 8] =
            kOneGroup ? __int_as_float(total[t][h][i]) : y[t][h][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kOut; i += blockDim.x) {
    const int64_t n = n0 + i % (kRowsTiles * 16), m = m0 + i / (kRowsTiles * 16);
    if (n >= w.n || m >= v.p.m) continue;
    float sum = 0;
    if constexpr (kOneGroup) {
      int d = 0;
      for (int j = 0; j < warps; ++j) d += __float_as_int(red[j * kOut + i]);
      const int e = x_sums[m];
      const float s = load_param(w.scales, w.scale_dtype, n);
      sum = x_scales[m] * __fmaf_rn(s, float(d - v.middle * e), value_at_middle(v, s, n) * float(e));
    } else {
      for (int j = 0; j < warps; ++j) sum += red[j * kOut + i];
    }
    if (v.p.bias != nullptr) sum += load_float(v.p.bias, v.p.dtype, n);
    store_float(v.p.y, v.p.dtype, m * v.p.y_stride + n, sum);
  }
}

template <int kBits, int kPieces, bool kOneGroup = false>
void launch_as(const A8RowsView& v, Stream stream) {
  const int64_t blocks = ceil_div(v.p.w.n, 16 * kRowsTiles);
  const int warps = rows_warps(blocks, v.chunks, device_info().multiprocessors);
  const int halves = v.p.m <= 8 ? 1 : 2;
  const dim3 grid{unsigned(blocks), unsigned(ceil_div(v.p.m, 8 * halves))};
  const size_t shared = size_t(warps) * kRowsTiles * 16 * size_t(halves) * 8 * sizeof(float);
  if (halves == 1) a8_rows_kernel<kBits, kPieces, 1, kOneGroup><<<grid, 32 * warps, shared, stream_of(stream)>>>(v);
  else a8_rows_kernel<kBits, kPieces, 2, kOneGroup><<<grid, 32 * warps, shared, stream_of(stream)>>>(v);
  check_launch("linear_a8");
}

}  // namespace

void launch_a8_rows(const LinearA8Params& p, const A8Workspace& ws, Stream stream) {
  const Format f = p.w.layout.segments[0].format;
  const A8RowsView v{p, ws, int(ceil_div(p.w.k, 128)), int((p.w.k - 1) % 128 + 1), format_levels(f) / 2};
  const int pieces = ws.groups == 1 ? 0 : rows_pieces(p.w);
  const auto launch = [&]<int kBits>() {
    if (pieces == 0) return launch_as<kBits, 1, true>(v, stream);
    if (pieces == 1) return launch_as<kBits, 1>(v, stream);
    if constexpr (kBits >= 2) {
      if (pieces == 2) return launch_as<kBits, 2>(v, stream);
    }
    if constexpr (kBits >= 4) launch_as<kBits, 4>(v, stream);
  };
  switch (format_bits(f)) {
    case 1: launch.operator()<1>(); break;
    case 2: launch.operator()<2>(); break;
    case 4: launch.operator()<4>(); break;
    default: launch.operator()<8>(); break;
  }
}

}  // namespace subbyte::cuda
