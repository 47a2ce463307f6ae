// linear for few rows of x on the matrix units, straight from the canonical codes, for 16-bit x and groups of 32, 64 or a
// multiple of 128. Included by the cuda_sm80_mma_*.cu files, one a code width, which share the compile time.
//
// Idea: weights are the A operand of mma.m16n8k16 (16 rows of W, no padding waste in M up to 8), x is B. The k order inside an
// mma is free as long as A and B agree, so the lane that loads 32 codes of a row in one piece also feeds them: pairs of codes
// that stand 16 bits apart go into the mantissas of two 16-bit floats with one AND-OR, and one fused multiply-add (exact)
// leaves q - centre. Products and the sum of a group are float32; its scale, and zero or offset times the sum of x (an mma
// with ones), enter once a group. A block holds kTiles tiles of 16 rows; its warps take interleaved chunks of 128 columns, each
// with kSlots chunks requested ahead; partial sums meet in shared memory in a fixed order: one launch, no atomics.
// Limits: bytes of W at 8 and 4 bits; at 2 and 1 bits the half-rate AND-OR and shift unit. docs/performance.md has figures.
// Lost elsewhere: permuting x in shared memory first, splitting K over a cluster, shifts as multiplications.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/linear/linear_cuda_plan.h"

namespace subbyte::cuda {
namespace {

struct RowsView {
  LinearParams p;  // p.x is aligned, in stored column order
  int64_t groups;
  int chunks;              // of 128 columns, the last may be short
  int tail;                // columns of the last chunk
  int chunk_groups;        // kPieces == 1: chunks a group (0: one group holds all)
  uint32_t chunk_inverse;  // 2^32 / chunk_groups rounded up: chunk / chunk_groups without a division
  float centre;            // the format's fixed zero
};

__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t base) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(base));
  return d;
}

template <DType kX>
struct Half;
template <>
struct Half<DType::kF16> {
  static constexpr uint32_t kBase = 0x64006400u;  // 1024 in both halves: the mantissa's lowest bit is worth 1
  static constexpr float kBaseValue = 1024.0f;
  static constexpr int kMantissa = 10;
  static constexpr uint32_t kOnes = 0x3C003C00u;
  __device__ static uint32_t pair(float v) {
    const __half2 h = __float2half2_rn(v);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
  __device__ static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  __device__ static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};
template <>
struct Half<DType::kBF16> {
  static constexpr uint32_t kBase = 0x43004300u;  // 128
  static constexpr float kBaseValue = 128.0f;
  static constexpr int kMantissa = 7;
  static constexpr uint32_t kOnes = 0x3F803F80u;
  __device__ static uint32_t pair(float v) {
    const __nv_bfloat162 h = __float2bfloat162_rn(v);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
  __device__ static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  __device__ static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// Widths 1, 2 and 4: pair p of a word are its codes p and p + 16 / kBits, 16 bits apart. The word is shifted right by shift(p)
// (left when negative), so that the low code starts at mantissa bit bit(p). A shifted word serves as many pairs as the mantissa
// has room for; one bit stays free below 1-bit codes, whose centre is one half. The other widths: pair p are values 2p, 2p + 1.
template <int kBits>
constexpr bool kHalvesOfAWord = kBits == 1 || kBits == 2 || kBits == 4;

template <int kBits, DType kX>
struct PairPlace {
  static constexpr int kFirst = kBits == 1 ? 1 : 0;
  static constexpr int kPairs = 16 / kBits;  // of a word
  static constexpr int kRoom = (Half<kX>::kMantissa - kFirst) / kBits;
  static constexpr int kPerShift = !kHalvesOfAWord<kBits> ? 1 : kRoom < kPairs ? kRoom : kPairs;
  static constexpr int bit(int p) { return kHalvesOfAWord<kBits> ? kFirst + p % kPerShift * kBits : 0; }
  static constexpr int shift(int p) { return p / kPerShift * kPerShift * kBits - kFirst; }
};

// Constants of a lane: 2^-bit and -(base * 2^-bit + centre), for each mantissa place.
template <int kBits, DType kX>
struct Centring {
  static constexpr int kPlaces = PairPlace<kBits, kX>::kPerShift;
  uint32_t scale[kPlaces], offset[kPlaces];
  __device__ explicit Centring(float centre) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const float power = 1.0f / float(1 << PairPlace<kBits, kX>::bit(i));
      scale[i] = Half<kX>::pair(power);
      offset[i] = Half<kX>::pair(-(Half<kX>::kBaseValue * power + centre));
    }
  }
};

// Pair `pair` (0..15) of a lane's 32 codes, minus the centre, as two 16-bit floats: exact.
template <int kBits, DType kX>
__device__ __forceinline__ uint32_t decode_pair(const uint32_t* words, int pair, const Centring<kBits, kX>& c, float centre) {
  constexpr uint32_t kMask = (1u << kBits) - 1u;
  if constexpr (kHalvesOfAWord<kBits>) {
    using Place = PairPlace<kBits, kX>;
    const int p = pair % Place::kPairs, shift = Place::shift(p), bit = Place::bit(p);
    const uint32_t w = words[pair / Place::kPairs], s = shift < 0 ? w << -shift : w >> shift;
    return Half<kX>::fma2(and_or(s, (kMask * 0x00010001u) << bit, Half<kX>::kBase), c.scale[p % Place::kPerShift],
                          c.offset[p % Place::kPerShift]);
  } else if constexpr (kBits == 8 && kX == DType::kF16) {
    const uint32_t v = __byte_perm(words[pair / 2], 0x64646464u, pair % 2 == 0 ? 0x4140 : 0x4342);
    return Half<kX>::fma2(v, c.scale[0], c.offset[0]);
  } else if constexpr (kBits == 8) {  // eight bits have no room in the mantissa: through float32, whose upper half is exact
    const uint32_t w = words[pair / 2];
    const uint32_t low = __byte_perm(w, 0x4B000000u, pair % 2 == 0 ? 0x7440 : 0x7442);
    const uint32_t high = __byte_perm(w, 0x4B000000u, pair % 2 == 0 ? 0x7441 : 0x7443);
    return __byte_perm(__float_as_uint(__fsub_rn(__uint_as_float(low), 8388608.0f + centre)),
                       __float_as_uint(__fsub_rn(__uint_as_float(high), 8388608.0f + centre)), 0x7632);
  } else {  // 3, 5, 6, 7 bits
    const int at = pair * 2 * kBits, word = at / 32, shift = at % 32;
    const uint32_t two = shift + 2 * kBits <= 32 ? words[word] >> shift : __funnelshift_r(words[word], words[word + 1], shift);
    const uint32_t v = and_or(two << (16 - kBits), kMask << 16, and_or(two, kMask, Half<kX>::kBase));
    return Half<kX>::fma2(v, c.scale[0], c.offset[0]);
  }
}

// Which of a lane's 32 values the low and the high half of pair `pair` multiply.
template <int kBits>
__device__ constexpr int pair_low(int pair) {
  return kHalvesOfAWord<kBits> ? pair / (16 / kBits) * (32 / kBits) + pair % (16 / kBits) : 2 * pair;
}
template <int kBits>
__device__ constexpr int pair_high(int pair) {
  return kHalvesOfAWord<kBits> ? pair_low<kBits>(pair) + 16 / kBits : 2 * pair + 1;
}

// A lane's piece of one row: kBytes bytes into words.
template <int kBytes>
__device__ __forceinline__ void load_piece(uint32_t* w, const uint8_t* p) {
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 16)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
                   : "=r"(w[i / 4]), "=r"(w[i / 4 + 1]), "=r"(w[i / 4 + 2]), "=r"(w[i / 4 + 3])
                   : "l"(p + i));
  } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 8)
      asm volatile("ld.global.nc.v2.u32 {%0,%1},[%2];" : "=r"(w[i / 4]), "=r"(w[i / 4 + 1]) : "l"(p + i));
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; i += 4) asm volatile("ld.global.nc.u32 %0,[%1];" : "=r"(w[i / 4]) : "l"(p + i));
  }
}

// Value of a scale from its bits.
__device__ __forceinline__ float raw_value(uint32_t raw, DType t) {
  return t == DType::kF32    ? __uint_as_float(raw)
         : t == DType::kBF16 ? __uint_as_float(raw << 16)
                             : __half2float(__ushort_as_half((unsigned short)raw));
}

constexpr int kRowsTiles = 2;  // tiles of 16 rows of W a block
constexpr int kRowsMaxWarps = 16;

template <int kBits>
constexpr int rows_slots() {
  return kBits > 4 ? 1 : kBits > 2 ? 2 : 4;
}

// kPieces: groups in a chunk of 128 columns. kHalves: blocks of 8 rows of x. kAffine: zeros or offsets are present.
template <int kBits, int kPieces, int kHalves, DType kX>
__global__ void __launch_bounds__(32 * kRowsMaxWarps, 1) rows_kernel(const __grid_constant__ RowsView v) {
  constexpr int kWords = kBits, kPieceWords = kWords / kPieces, kPieceBytes = 4 * kPieceWords, kPieceColumns = 128 / kPieces;
  constexpr int kSlots = kHalves == 2 && rows_slots<kBits>() > 1 ? rows_slots<kBits>() / 2 : rows_slots<kBits>();
  extern __shared__ __align__(16) float red[];
  const PackedMatrix& w = v.p.w;
  const bool affine = w.zero_kind != ZeroKind::kFixed;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int64_t n0 = int64_t(blockIdx.x) * kRowsTiles * 16, m0 = int64_t(blockIdx.y) * kHalves * 8;
  const Centring<kBits, kX> centring(v.centre);

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
      group_row[t][h] = n * v.groups;
      scales[t][h] = static_cast<const uint8_t*>(w.scales) + n * v.groups * scale_bytes;
    }
  const unsigned short* x[kHalves];
#pragma unroll
  for (int h = 0; h < kHalves; ++h)
    x[h] = static_cast<const unsigned short*>(v.p.x) + min_i64(m0 + h * 8 + row, v.p.m - 1) * v.p.x_stride +
           quad * (kPieceColumns / 4);

  uint32_t word[kSlots][kRowsTiles][2][kWords];
  uint32_t scale[kSlots][kRowsTiles][2][kPieces];
  auto group_of = [&](int chunk, int piece) -> int {
    if constexpr (kPieces > 1) return min(chunk * kPieces + piece, int(v.groups) - 1);
    else return v.chunk_groups < 2 ? chunk * v.chunk_groups : int(__umulhi(uint32_t(chunk), v.chunk_inverse));
  };
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

  // x is requested a chunk ahead, where registers allow it: one block of 8 rows.
  constexpr bool kAheadX = kHalves == 1;
  uint32_t next_x[kHalves][16];
  auto fetch_x = [&](int h, int chunk) {
    if (chunk >= v.chunks) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4* from = reinterpret_cast<const uint4*>(x[h] + (chunk * 128 + i * kPieceColumns));
      const bool read = inside(chunk, i);
#pragma unroll
      for (int j = 0; j < kPieceColumns / 32; ++j) {
        uint4 four = make_uint4(0, 0, 0, 0);
        if (read) four = __ldg(from + j);
        uint32_t* to = &next_x[h][i * (kPieceColumns / 8) + j * 4];
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
      }
    }
  };

  if constexpr (kAheadX) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) fetch_x(h, warp);
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) fetch(slot, warp + slot * warps);

  float y[kRowsTiles][kHalves][4] = {};
  for (int c0 = warp; c0 < v.chunks; c0 += kSlots * warps) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int chunk = c0 + slot * warps;
      if (chunk >= v.chunks) continue;
      // x of this chunk as B fragments, in the order in which the codes come out.
      uint32_t b[kHalves][16];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if constexpr (!kAheadX) fetch_x(h, chunk);
        const uint32_t* in_order = next_x[h];
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
          const int low = pair_low<kBits>(pair), high = pair_high<kBits>(pair);
          b[h][pair] =
              __byte_perm(in_order[low / 2], in_order[high / 2], (low % 2 ? 0x0032 : 0x0010) | (high % 2 ? 0x7600 : 0x5400));
        }
      }
      if constexpr (kAheadX) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) fetch_x(h, chunk + warps);
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        constexpr int kPairs = 16 / kPieces;
        float sum_x[kHalves][4] = {};
        if (affine) {
#pragma unroll
          for (int pair = i * kPairs; pair < (i + 1) * kPairs; pair += 2)
#pragma unroll
            for (int h = 0; h < kHalves; ++h)
              Half<kX>::mma(sum_x[h], Half<kX>::kOnes, Half<kX>::kOnes, Half<kX>::kOnes, Half<kX>::kOnes, b[h][pair],
                            b[h][pair + 1]);
        }
#pragma unroll
        for (int t = 0; t < kRowsTiles; ++t) {
          float acc[kHalves][4] = {};
#pragma unroll
          for (int pair = i * kPairs; pair < (i + 1) * kPairs; pair += 2) {
            const uint32_t *upper = word[slot][t][0], *lower = word[slot][t][1];
            const uint32_t a0 = decode_pair<kBits, kX>(upper, pair, centring, v.centre);
            const uint32_t a1 = decode_pair<kBits, kX>(lower, pair, centring, v.centre);
            const uint32_t a2 = decode_pair<kBits, kX>(upper, pair + 1, centring, v.centre);
            const uint32_t a3 = decode_pair<kBits, kX>(lower, pair + 1, centring, v.centre);
#pragma unroll
            for (int h = 0; h < kHalves; ++h) Half<kX>::mma(acc[h], a0, a1, a2, a3, b[h][pair], b[h][pair + 1]);
          }
          const float s0 = raw_value(scale[slot][t][0][i], w.scale_dtype), s1 = raw_value(scale[slot][t][1][i], w.scale_dtype);
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            y[t][h][0] = __fmaf_rn(s0, acc[h][0], y[t][h][0]);
            y[t][h][1] = __fmaf_rn(s0, acc[h][1], y[t][h][1]);
            y[t][h][2] = __fmaf_rn(s1, acc[h][2], y[t][h][2]);
            y[t][h][3] = __fmaf_rn(s1, acc[h][3], y[t][h][3]);
          }
          if (affine) {
            const int group = group_of(chunk, i);
            const float o0 =
                affine_value(v.centre, s0, load_param(w.zeros, w.zero_dtype, group_row[t][0] + group), w.zero_kind);
            const float o1 =
                affine_value(v.centre, s1, load_param(w.zeros, w.zero_dtype, group_row[t][1] + group), w.zero_kind);
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
              y[t][h][0] = __fmaf_rn(o0, sum_x[h][0], y[t][h][0]);
              y[t][h][1] = __fmaf_rn(o0, sum_x[h][1], y[t][h][1]);
              y[t][h][2] = __fmaf_rn(o1, sum_x[h][2], y[t][h][2]);
              y[t][h][3] = __fmaf_rn(o1, sum_x[h][3], y[t][h][3]);
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
        red[warp * kOut + (h * 8 + quad * 2 + i % 2) * (kRowsTiles * 16) + t * 16 + row + i / 2 * 8] = y[t][h][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kOut; i += blockDim.x) {
    const int64_t n = n0 + i % (kRowsTiles * 16), m = m0 + i / (kRowsTiles * 16);
    if (n >= w.n || m >= v.p.m) continue;
    float sum = 0;
    for (int j = 0; j < warps; ++j) sum += red[j * kOut + i];
    if (v.p.bias != nullptr) sum += Elem<kX>::load(static_cast<const unsigned short*>(v.p.bias)[n]);
    static_cast<unsigned short*>(v.p.y)[m * v.p.y_stride + n] = Elem<kX>::store(sum);
  }
}

template <int kBits, int kPieces, int kHalves, DType kX>
void launch_rows_as(const RowsView& v, Stream stream) {
  const int64_t blocks = ceil_div(v.p.w.n, 16 * kRowsTiles);
  const int warps = rows_warps(blocks, v.chunks, device_info().multiprocessors);
  const dim3 grid{unsigned(blocks), unsigned(ceil_div(v.p.m, 8 * kHalves))};
  const size_t shared = size_t(warps) * kRowsTiles * 16 * kHalves * 8 * sizeof(float);
  rows_kernel<kBits, kPieces, kHalves, kX><<<grid, 32 * warps, shared, stream_of(stream)>>>(v);
  check_launch("linear");
}

template <int kBits, int kPieces>
void launch_rows_pieces(const RowsView& v, Stream stream) {
  const bool half = v.p.dtype == DType::kF16;
  if (v.p.m <= 8) {
    if (half) launch_rows_as<kBits, kPieces, 1, DType::kF16>(v, stream);
    else launch_rows_as<kBits, kPieces, 1, DType::kBF16>(v, stream);
  } else {
    if (half) launch_rows_as<kBits, kPieces, 2, DType::kF16>(v, stream);
    else launch_rows_as<kBits, kPieces, 2, DType::kBF16>(v, stream);
  }
}

inline RowsView rows_view(const LinearParams& p) {
  RowsView v{};
  v.p = p;
  v.groups = p.w.groups();
  v.chunks = int(ceil_div(p.w.k, 128));
  v.tail = int(p.w.k - int64_t(v.chunks - 1) * 128);
  v.chunk_groups = v.groups == 1 ? 0 : int(p.w.group_size / 128);
  v.chunk_inverse = v.chunk_groups < 2 ? 0 : uint32_t((uint64_t(1) << 32) / uint64_t(v.chunk_groups)) + 1;
  v.centre = format_fixed_zero(p.w.layout.segments[0].format);
  return v;
}

}  // namespace

// One a code width; p satisfies select_linear_cuda_kernel(p) == kRows, x aligned and in stored order.
void launch_rows_1(const LinearParams& p, Stream stream);
void launch_rows_2(const LinearParams& p, Stream stream);
void launch_rows_3(const LinearParams& p, Stream stream);
void launch_rows_4(const LinearParams& p, Stream stream);
void launch_rows_5(const LinearParams& p, Stream stream);
void launch_rows_6(const LinearParams& p, Stream stream);
void launch_rows_7(const LinearParams& p, Stream stream);
void launch_rows_8(const LinearParams& p, Stream stream);

}  // namespace subbyte::cuda
