// packed_update on CUDA. A warp takes one moment block, 256 columns of a row, a lane eight neighbouring columns: eight codes
// are whole bytes, everything stays in registers between the loads and the stores, and absmax is a shuffle. Eight columns whose
// parts are aligned are loaded 8 or 16 bytes at a time. One Philox word an element serves code and both moments: a word each
// would cost more integer instructions than the memory leaves time for. A row whose segments do not start on multiples of eight
// columns shares bytes between lanes: such a layout is walked by one thread a row, by the text of the reference.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/packed_update/cuda_exact.h"
#include "subbyte/ops/packed_update/packed_update_cuda.h"
#include "subbyte/ops/packed_update/update_rule.h"

namespace subbyte::cuda {
namespace {

constexpr int kRun = 8;  // columns of a lane

// Which rows may be read and written in whole vectors: base and row stride are aligned.
struct Aligned {
  bool grad, codes, residual, m, v;
};

// out[j] = p[j] for j < count, 0 after. `wide`: p is aligned to min(16, 8 elements).
template <class T>
__device__ __forceinline__ void load_run(const T* p, int count, bool wide, T (&out)[kRun]) {
  if (wide && count == kRun) {
    constexpr int kBytes = sizeof(T) * kRun;
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(p);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(p)[i];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) out[j] = j < count ? p[j] : T(0);
}

template <class T>
__device__ __forceinline__ void store_run(T* p, int count, bool wide, const T (&in)[kRun]) {
  if (wide && count == kRun) {
    constexpr int kBytes = sizeof(T) * kRun;
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(in);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(in)[i];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (j < count) p[j] = in[j];
}

// `count` codes of `bits` bits as one word. `wide`: p is aligned to the largest power of two in `bits`.
__device__ __forceinline__ uint64_t load_stream(const uint8_t* p, int bits, int count, bool wide) {
  if (wide && count == kRun) {
    if (bits == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      return uint64_t(v.y) << 32 | v.x;
    }
    if (bits == 4) return *reinterpret_cast<const uint32_t*>(p);
    if (bits == 2) return *reinterpret_cast<const uint16_t*>(p);
  }
  uint64_t v = 0;
  const int bytes = (count * bits + 7) / 8;
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (j < bytes) v |= uint64_t(p[j]) << (8 * j);
  return v;
}

__device__ __forceinline__ void store_stream(uint8_t* p, uint64_t v, int bits, int count, bool wide) {
  if (wide && count == kRun) {
    if (bits == 8) {
      *reinterpret_cast<uint2*>(p) = make_uint2(uint32_t(v), uint32_t(v >> 32));
      return;
    }
    if (bits == 4) {
      *reinterpret_cast<uint32_t*>(p) = uint32_t(v);
      return;
    }
    if (bits == 2) {
      *reinterpret_cast<uint16_t*>(p) = uint16_t(v);
      return;
    }
  }
  const int bytes = (count * bits + 7) / 8;
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (j < bytes) p[j] = uint8_t(v >> (8 * j));
}

// Eight codes of a stream, one a register, and back. Widths known to the compiler cost one instruction a code.
template <int kBits>
__device__ __forceinline__ void spread_as(uint64_t stream, uint32_t (&codes)[kRun]) {
#pragma unroll
  for (int j = 0; j < kRun; ++j) codes[j] = uint32_t(stream >> (kBits * j)) & ((1u << kBits) - 1u);
}
template <int kBits>
__device__ __forceinline__ uint64_t gathered_as(const uint32_t (&codes)[kRun]) {
  uint64_t stream = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) stream |= uint64_t(codes[j]) << (kBits * j);
  return stream;
}
__device__ __forceinline__ void spread(uint64_t stream, int bits, uint32_t (&codes)[kRun]) {
  switch (bits) {
    case 1: return spread_as<1>(stream, codes);
    case 2: return spread_as<2>(stream, codes);
    case 4: return spread_as<4>(stream, codes);
    case 8: return spread_as<8>(stream, codes);
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) codes[j] = uint32_t(stream >> (bits * j)) & ((1u << bits) - 1u);
}
__device__ __forceinline__ uint64_t gathered(const uint32_t (&codes)[kRun], int bits) {
  switch (bits) {
    case 1: return gathered_as<1>(codes);
    case 2: return gathered_as<2>(codes);
    case 4: return gathered_as<4>(codes);
    case 8: return gathered_as<8>(codes);
  }
  uint64_t stream = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) stream |= uint64_t(codes[j]) << (bits * j);
  return stream;
}

template <DType kType>
__device__ __forceinline__ void load_gradient(const PackedUpdateParams& p, int64_t n, int64_t k, int count, bool wide,
                                              float (&out)[kRun]) {
  using Storage = typename Elem<kType>::Storage;
  const Storage* const row = static_cast<const Storage*>(p.grad) + n * p.grad_stride;
  if (p.w.perm != nullptr) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      out[j] = 0;
      if (j >= count) continue;
      const int64_t from = p.w.perm[k + j];
      out[j] = from >= 0 && from < p.w.k ? float(Elem<kType>::load(row[from])) : __int_as_float(0x7fffffff);
    }
    return;
  }
  alignas(16) Storage raw[kRun];
  load_run(row + k, count, wide, raw);
#pragma unroll
  for (int j = 0; j < kRun; ++j) out[j] = float(Elem<kType>::load(raw[j]));
}

template <MomentType kType, bool kSigned>
__device__ __forceinline__ float value_of_code(float absmax, uint32_t code) {
  using Code = MomentCode<kType, kSigned>;
  const MomentGrid grid = moment_grid<Code>(absmax);
  if constexpr (kSigned) return signed_value<Code, ScalarLane>(grid, code << (32 - Code::kBits));
  else return unsigned_value<Code, ScalarLane>(grid, code);
}

template <MomentType kType, bool kSigned>
__device__ __forceinline__ uint32_t code_of_value(float absmax, float value, uint32_t word) {
  using Code = MomentCode<kType, kSigned>;
  if constexpr (kSigned) return signed_code<Code>(absmax, value, word);
  else return unsigned_code<Code>(absmax, value, word);
}

template <bool kSigned>
__device__ __forceinline__ void load_moment(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k,
                                            int count, bool wide, float (&out)[kRun]) {
  const uint8_t* const row = static_cast<const uint8_t*>(moment.data) + n * row_bytes;
  if (moment.type == MomentType::kF32) {
    load_run(reinterpret_cast<const float*>(row) + k, count, wide, out);
  } else if (moment.type == MomentType::kBF16) {
    alignas(16) uint16_t raw[kRun];
    load_run(reinterpret_cast<const uint16_t*>(row) + k, count, wide, raw);
#pragma unroll
    for (int j = 0; j < kRun; ++j) out[j] = __uint_as_float(uint32_t(raw[j]) << 16);
  } else if (moment.type == MomentType::kNone || count <= 0) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) out[j] = 0;
  } else {
    const int bits = moment.type == MomentType::kQ8 ? 8 : 4;
    const uint64_t stream = load_stream(row + k / 8 * bits, bits, count, wide);
    const float absmax = moment.absmax[n * blocks + k / kMomentBlock];
    uint32_t codes[kRun];
    spread(stream, bits, codes);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      out[j] = j >= count  ? 0.0f
               : bits == 8 ? value_of_code<MomentType::kQ8, kSigned>(absmax, codes[j])
                           : value_of_code<MomentType::kQ4, kSigned>(absmax, codes[j]);
  }
}

// The largest of `size` neighbouring lanes, a power of two.
template <int kSize>
__device__ __forceinline__ float largest_of_lanes(float value) {
#pragma unroll
  for (int step = kSize / 2; step > 0; step /= 2) value = largest(__shfl_xor_sync(~0u, value, step), value);
  return value;
}

template <bool kSigned>
__device__ __forceinline__ void store_moment_run(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n,
                                                 int64_t k, int count, bool wide, const float (&values)[kRun],
                                                 const uint32_t (&words)[kRun]) {
  uint8_t* const row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  if (moment.type == MomentType::kNone) return;
  if (moment.type == MomentType::kF32) {
    store_run(reinterpret_cast<float*>(row) + k, count, wide, values);
    return;
  }
  if (moment.type == MomentType::kBF16) {
    alignas(16) uint16_t raw[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) raw[j] = uint16_t(noisy_bf16<ScalarLane>(kSigned, values[j], words[j]) >> 16);
    store_run(reinterpret_cast<uint16_t*>(row) + k, count, wide, raw);
    return;
  }
  float absmax = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (j < count) absmax = largest(fabsf(values[j]), absmax);
  absmax = stored_absmax(largest_of_lanes<32>(absmax));
  if (count <= 0) return;
  if (k % kMomentBlock == 0) moment.absmax[n * blocks + k / kMomentBlock] = absmax;
  const int bits = moment.type == MomentType::kQ8 ? 8 : 4;
  uint32_t codes[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    codes[j] = bits == 8 ? code_of_value<MomentType::kQ8, kSigned>(absmax, values[j], words[j])
                         : code_of_value<MomentType::kQ4, kSigned>(absmax, values[j], words[j]);
    if (j >= count) codes[j] = 0;
  }
  store_stream(row + k / 8 * bits, gathered(codes, bits), bits, count, wide);
}

template <UpdateRule kRule, DType kGrad>
__global__ void __launch_bounds__(256)
    update_kernel(const __grid_constant__ PackedUpdateParams p, const __grid_constant__ UpdateNumbers host_values,
                  const __grid_constant__ Aligned aligned) {
  const PackedMatrix& w = p.w;
  const int64_t k = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kRun;  // a warp's lanes are one moment block
  const int count = int(max_i64(0, min_i64(kRun, w.k - k)));                  // 0: a lane past the row's end, for the shuffles
  if (k - k % kMomentBlock >= w.k) return;                                    // the whole warp is past it
  const UpdateNumbers c = update_numbers(p, host_values);
  const uint64_t key = step_key(p.seed, c.offset);
  const int64_t blocks = ceil_div(w.k, kMomentBlock), groups = w.groups(), residual_bytes = stream_bytes(w.k, p.residual_bits);
  const int64_t m_bytes = moment_row_bytes(p.m.type, w.k), v_bytes = moment_row_bytes(p.v.type, w.k);
  const Segment& s = segment_of(w.layout, min_i64(k, w.k - 1));
  const int bits = format_bits(s.format);
  const float fixed_zero = format_fixed_zero(s.format);
  const uint32_t top = uint32_t(format_levels(s.format) << p.residual_bits) - 1u;
  const int64_t first_group = k / w.group_size, code_at = s.byte_begin + (k - s.k_begin) / 8 * bits;
  for (int64_t n = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; n < w.n; n += int64_t(gridDim.y) * blockDim.y) {
    alignas(16) float grad[kRun], m[kRun], v[kRun];
    uint32_t words[kRun];
    uint8_t* const codes = p.codes + n * w.layout.row_bytes + code_at;
    uint8_t* const residual = p.residual + n * residual_bytes + k / 8 * p.residual_bits;
    uint64_t stream = 0, low = 0;
    if (count > 0) {
      load_gradient<kGrad>(p, n, k, count, aligned.grad, grad);
      stream = load_stream(codes, bits, count, aligned.codes);
      if (p.residual_bits > 0) low = load_stream(residual, p.residual_bits, count, aligned.residual);
    }
    load_moment<true>(p.m, m_bytes, blocks, n, k, count, aligned.m, m);
    if constexpr (kRule == UpdateRule::kAdamW) load_moment<false>(p.v, v_bytes, blocks, n, k, count, aligned.v, v);
    const BlockKey block = block_key(key, (p.first_row + uint64_t(n)) * uint64_t(blocks) + uint64_t(k / kMomentBlock));
#pragma unroll
    for (int j = 0; j < kRun; ++j) words[j] = random_word(block, uint32_t(k % kMomentBlock) + uint32_t(j));
    uint32_t codes_now[kRun], low_now[kRun];
    spread(stream, bits, codes_now);
    if (p.residual_bits > 0) spread(low, p.residual_bits, low_now);
    int64_t group_index = first_group, group_end = (first_group + 1) * w.group_size;
    GroupStep<ScalarLane> group{};
    auto enter_group = [&] {
      const GroupParams g = load_group(w, fixed_zero, n * groups + group_index);
      group = group_step<ScalarLane>(g.scale, g.zero, w.zero_kind, p.residual_bits, c);
    };
    if (count > 0) enter_group();
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j >= count) {
        m[j] = v[j] = 0.0f;
        codes_now[j] = low_now[j] = 0;
        continue;
      }
      if (k + j == group_end) {
        ++group_index;
        group_end += w.group_size;
        enter_group();
      }
      uint32_t code = codes_now[j];
      if (p.residual_bits > 0) code = code << p.residual_bits | low_now[j];
      const Element<ScalarLane> before{m[j], kRule == UpdateRule::kAdamW ? v[j] : 0.0f, code};
      const float g = ScalarLane::mul(grad[j], c.factor);
      const Element<ScalarLane> e = kept_unless<ScalarLane>(
          usable<ScalarLane>(g), stepped<kRule, ScalarLane>(c, group, top, g, before, words[j]), before);
      code = e.q;
      codes_now[j] = code >> p.residual_bits;
      low_now[j] = code & ((1u << p.residual_bits) - 1u);
      m[j] = e.m;
      v[j] = e.v;
    }
    if (count > 0) {
      store_stream(codes, gathered(codes_now, bits), bits, count, aligned.codes);
      if (p.residual_bits > 0)
        store_stream(residual, gathered(low_now, p.residual_bits), p.residual_bits, count, aligned.residual);
    }
    store_moment_run<true>(p.m, m_bytes, blocks, n, k, count, aligned.m, m, words);
    if constexpr (kRule == UpdateRule::kAdamW) store_moment_run<false>(p.v, v_bytes, blocks, n, k, count, aligned.v, v, words);
  }
}

// ---- one format, plain columns, whole runs: what training usually has

constexpr int kLong = 16;  // columns of a lane

// kBytes at p, aligned to them or to 16.
template <int kBytes>
__device__ __forceinline__ void load_raw(const uint8_t* p, uint32_t (&out)[kBytes / 4]) {
  static_assert(kBytes == 8 || kBytes % 16 == 0);
  if constexpr (kBytes == 8) {
    const uint2 a = *reinterpret_cast<const uint2*>(p);
    out[0] = a.x;
    out[1] = a.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 a = reinterpret_cast<const uint4*>(p)[i];
      out[4 * i] = a.x;
      out[4 * i + 1] = a.y;
      out[4 * i + 2] = a.z;
      out[4 * i + 3] = a.w;
    }
  }
}
template <int kBytes>
__device__ __forceinline__ void store_raw(uint8_t* p, const uint32_t (&in)[kBytes / 4]) {
  if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(in[0], in[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      reinterpret_cast<uint4*>(p)[i] = make_uint4(in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]);
  }
}

template <DType kType>
__device__ __forceinline__ float gradient_of(const uint32_t* raw, int j) {
  if constexpr (kType == DType::kF32) return __uint_as_float(raw[j]);
  else return __uint_as_float(j % 2 == 0 ? raw[j / 2] << 16 : raw[j / 2] & 0xffff0000u);
}

// A lane's part of a moment: its bytes, its values after the step.
template <MomentType kType, bool kSigned>
struct MomentRun {
  static constexpr bool kBlockwise = is_blockwise(kType);
  using Code = MomentCode<kBlockwise ? kType : MomentType::kQ8, kSigned>;
  static constexpr int kBytes = kType == MomentType::kF32    ? 64
                                : kType == MomentType::kBF16 ? 32
                                : kType == MomentType::kQ8   ? 16
                                                             : 8;
  uint32_t raw[kBytes / 4];
  MomentGrid grid;

  __device__ __forceinline__ void load(const MomentView& moment, int64_t first, int64_t block) {
    if constexpr (kType != MomentType::kNone)
      load_raw<kBytes>(static_cast<const uint8_t*>(moment.data) + first * kBytes / kLong, raw);
    if constexpr (kBlockwise) grid = moment_grid<Code>(moment.absmax[block]);
  }
  __device__ __forceinline__ float before(int j) const {
    if constexpr (kType == MomentType::kNone) return 0.0f;
    else if constexpr (kType == MomentType::kF32) return __uint_as_float(raw[j]);
    else if constexpr (kType == MomentType::kBF16)
      return __uint_as_float(j % 2 == 0 ? raw[j / 2] << 16 : raw[j / 2] & 0xffff0000u);
    else if constexpr (kType == MomentType::kQ8 && kSigned)
      return signed_value<Code, ScalarLane>(grid, __byte_perm(raw[j / 4], 0, unsigned(j % 4) << 12 | 0x0444));
    else if constexpr (kType == MomentType::kQ8)
      return unsigned_value<Code, ScalarLane>(grid, __byte_perm(raw[j / 4], 0, unsigned(j % 4) | 0x4440));
    else if constexpr (kSigned) return signed_value<Code, ScalarLane>(grid, (raw[j / 8] >> (4 * (j % 8))) << 28);
    else return unsigned_value<Code, ScalarLane>(grid, (raw[j / 8] >> (4 * (j % 8))) & 15u);
  }
  // The block's largest value, of `top` of 16 lanes; one of them writes it.
  __device__ __forceinline__ void find_grid(const MomentView& moment, float top, bool writes, int64_t block) {
    if constexpr (kBlockwise) {
      const float absmax = stored_absmax(largest_of_lanes<kMomentBlock / kLong>(top));
      if (writes) moment.absmax[block] = absmax;
      grid = moment_grid<Code>(absmax);
    }
  }
  // Values after the step take the place of the bytes, in order.
  uint32_t part[4];
  __device__ __forceinline__ void put(int j, float value, uint32_t word) {
    if constexpr (kType == MomentType::kF32) {
      raw[j] = __float_as_uint(value);
    } else if constexpr (kType == MomentType::kBF16) {
      part[j % 2] = noisy_bf16<ScalarLane>(kSigned, value, word);
      if (j % 2 == 1) raw[j / 2] = __byte_perm(part[0], part[1], 0x7632);
    } else if constexpr (kBlockwise) {
      uint32_t code;
      if constexpr (kSigned) {
        const uint32_t magnitude = noisy_magnitude<Code, ScalarLane>(grid, value, word) >> Code::kShift;
        code = (magnitude & Code::kMask) | ((__float_as_uint(value) >> (31 - Code::kMagnitudeBits)) & (Code::kMask + 1u));
      } else {
        code = noisy_square<Code, ScalarLane>(grid, value, word) >> Code::kShift;
      }
      if constexpr (kType == MomentType::kQ8) {
        part[j % 4] = code;
        if (j % 4 == 3)
          raw[j / 4] = __byte_perm(__byte_perm(part[0], part[1], 0x0040), __byte_perm(part[2], part[3], 0x0040), 0x5410);
      } else {
        code &= 15u;
        part[0] = j % 8 == 0 ? code : part[0] | code << (4 * (j % 8));
        if (j % 8 == 7) raw[j / 8] = part[0];
      }
    }
  }
  __device__ __forceinline__ void store(const MomentView& moment, int64_t first) const {
    if constexpr (kType != MomentType::kNone)
      store_raw<kBytes>(static_cast<uint8_t*>(moment.data) + first * kBytes / kLong, raw);
  }
};

// A lane takes 16 neighbouring columns of one group, 16 lanes a moment block. As in the kernels for CPUs the averages come
// first, then absmax, then the words, the codes and the moments as they are stored.
template <UpdateRule kRule, MomentType kM, MomentType kV, DType kGrad, bool kResidual>
__global__ void __launch_bounds__(256)
    step_runs_kernel(const __grid_constant__ PackedUpdateParams p, const __grid_constant__ UpdateNumbers host_values) {
  constexpr bool kSecond = kRule == UpdateRule::kAdamW;
  constexpr int kGradBytes = kGrad == DType::kF32 ? 64 : 32;
  const PackedMatrix& w = p.w;
  const int k = int(blockIdx.x * blockDim.x + threadIdx.x) * kLong, columns = int(w.k);
  const bool active = k < columns;  // the others of a warp are there for the shuffles
  const UpdateNumbers c = update_numbers(p, host_values);
  __shared__ uint64_t shared_key;
  const bool first_thread = threadIdx.x == 0 && threadIdx.y == 0;
  if (first_thread) shared_key = step_key(p.seed, c.offset);
  __syncthreads();
  const uint64_t key = shared_key;
  if (k - k % (32 * kLong) >= columns) return;  // the whole warp is past the row's end
  const int blocks = int(ceil_div(w.k, kMomentBlock)), groups = int(w.groups()), block_column = k / int(kMomentBlock);
  const int group_column = active ? k / int(min_i64(w.group_size, w.k)) : 0;
  const Segment& s = w.layout.segments[0];
  const int bits = format_bits(s.format), residual_bits = kResidual ? p.residual_bits : 0;
  const float fixed_zero = format_fixed_zero(s.format);
  const uint32_t top = uint32_t(format_levels(s.format) << residual_bits) - 1u, low_mask = (1u << residual_bits) - 1u;
  for (int64_t n = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; n < w.n; n += int64_t(gridDim.y) * blockDim.y) {
    const int64_t first = n * w.k + k, block = n * blocks + block_column;
    uint32_t gradient[kGradBytes / 4];
    MomentRun<kM, true> m_run;
    MomentRun<kV, false> v_run;
    uint64_t stream[2] = {}, low_stream[2] = {};
    uint8_t* const codes = p.codes + n * w.layout.row_bytes + k / 8 * bits;
    uint8_t* const residual = p.residual + n * (w.k / 8 * residual_bits) + k / 8 * residual_bits;
    GroupStep<ScalarLane> group{};
    float m[kLong], r[kLong], m_top = 0, v_top = 0;
    uint32_t skipped = 0;
    if (active) {
      load_raw<kGradBytes>(static_cast<const uint8_t*>(p.grad) + (n * p.grad_stride + k) * (kGradBytes / kLong), gradient);
      m_run.load(p.m, first, block);
      v_run.load(p.v, first, block);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        stream[half] = load_stream(codes + half * bits, bits, kRun, true);
        if constexpr (kResidual) low_stream[half] = load_stream(residual + half * residual_bits, residual_bits, kRun, true);
      }
      const GroupParams g = load_group(w, fixed_zero, n * groups + group_column);
      group = group_step<ScalarLane>(g.scale, g.zero, w.zero_kind, residual_bits, c);
      bool all_usable = true;
      uint32_t q[kLong] = {};
      if constexpr (kRule == UpdateRule::kSgd) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t high[kRun], low[kRun] = {};
          spread(stream[half], bits, high);
          if constexpr (kResidual) spread(low_stream[half], residual_bits, low);
#pragma unroll
          for (int j = 0; j < kRun; ++j) q[half * kRun + j] = kResidual ? high[j] << residual_bits | low[j] : high[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kLong; ++j) {
        const float g_value = ScalarLane::mul(gradient_of<kGrad>(gradient, j), c.factor);
        all_usable = all_usable && usable<ScalarLane>(g_value);
        const Averages<ScalarLane> a =
            averaged<kRule, ScalarLane>(c, group, g_value, Element<ScalarLane>{m_run.before(j), v_run.before(j), q[j]});
        m[j] = a.m;
        r[j] = a.r;
      }
      if (!all_usable) {
#pragma unroll
        for (int j = 0; j < kLong; ++j) {
          if (usable<ScalarLane>(ScalarLane::mul(gradient_of<kGrad>(gradient, j), c.factor))) continue;
          skipped |= 1u << j;
          m[j] = m_run.before(j);
          if constexpr (kSecond) r[j] = v_run.before(j);
        }
      }
#pragma unroll
      for (int j = 0; j < kLong; ++j) {
        m_top = largest(fabsf(m[j]), m_top);
        if constexpr (kSecond) v_top = largest(r[j], v_top);
      }
    }
    const bool writes = active && k % int(kMomentBlock) == 0;
    m_run.find_grid(p.m, m_top, writes, block);
    v_run.find_grid(p.v, v_top, writes, block);
    if (!active) continue;
    const BlockKey words = block_key(key, (p.first_row + uint64_t(n)) * uint64_t(blocks) + uint64_t(block_column));
    const uint32_t counter = words.first + uint32_t(k % int(kMomentBlock)) * kColumnStep;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t high[kRun], low[kRun] = {};
      spread(stream[half], bits, high);
      if constexpr (kResidual) spread(low_stream[half], residual_bits, low);
      float step[kRun];
      if constexpr (kSecond) {
        // Divisors grow with v.
        bool in_range = divisor<ScalarLane>(c, exact_sqrt(root_argument<ScalarLane>(v_top))) <= kLargestExactDivisor;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = half * kRun + i;
          const float by = divisor<ScalarLane>(c, exact_sqrt(root_argument<ScalarLane>(r[j])));
          step[i] = exact_quotient(m[j], by);
          in_range = in_range & ((fabsf(m[j]) >= kSmallestDividend) | (m[j] == 0.0f));
        }
        if (!in_range) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const int j = half * kRun + i;
            step[i] = __fdiv_rn(m[j], divisor<ScalarLane>(c, exact_sqrt(root_argument<ScalarLane>(r[j]))));
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) step[i] = r[half * kRun + i];
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int j = half * kRun + i;
        const uint32_t word = random_words<ScalarLane>(counter + uint32_t(j) * kColumnStep, words.second);
        const uint32_t q = kResidual ? high[i] << residual_bits | low[i] : high[i];
        const uint32_t now = inside<ScalarLane>(moved_by<ScalarLane>(group, step[i], q, word), top);
        high[i] = kResidual ? now >> residual_bits : now;
        if constexpr (kResidual) low[i] = now & low_mask;
        m_run.put(j, m[j], word);
        v_run.put(j, r[j], word);
      }
      if (skipped != 0) {  // these keep their codes
        uint32_t kept[kRun], kept_low[kRun] = {};
        spread(stream[half], bits, kept);
        if constexpr (kResidual) spread(low_stream[half], residual_bits, kept_low);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const bool keep = skipped >> (half * kRun + i) & 1u;
          high[i] = keep ? kept[i] : high[i];
          low[i] = keep ? kept_low[i] : low[i];
        }
      }
      store_stream(codes + half * bits, gathered(high, bits), bits, kRun, true);
      if constexpr (kResidual)
        store_stream(residual + half * residual_bits, gathered(low, residual_bits), residual_bits, kRun, true);
    }
    m_run.store(p.m, first);
    v_run.store(p.v, first);
  }
}

__global__ void __launch_bounds__(64)
    update_rows_kernel(const __grid_constant__ PackedUpdateParams p, const __grid_constant__ UpdateNumbers host_values) {
  const UpdateNumbers c = update_numbers(p, host_values);
  const uint64_t key = step_key(p.seed, c.offset);
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < p.w.n; n += int64_t(gridDim.x) * blockDim.x)
    update_row(p, c, key, n);
}

bool rows_aligned(const void* base, int64_t row_bytes, int64_t bytes) {
  return aligned_to(base, bytes) && row_bytes % bytes == 0;
}

// The alignment that a run of eight elements of `bits` bits asks for.
int64_t run_alignment(int64_t bits) { return bits >= 16 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }

int64_t moment_bits(MomentType t) {
  return t == MomentType::kF32 ? 32 : t == MomentType::kBF16 ? 16 : t == MomentType::kQ8 ? 8 : 4;
}

template <UpdateRule kRule, MomentType kM, MomentType kV>
void launch_runs_as(const PackedUpdateParams& p, const UpdateNumbers& numbers, Stream stream) {
  // A warp's lanes are two moment blocks of a row; four rows a thread share what depends on the column.
  const int64_t lanes = ceil_div(p.w.k, 32 * kLong) * 32;
  unsigned along = 32;
  while (along < 256 && along < lanes) along *= 2;
  const dim3 block(along, 256 / along);
  const dim3 grid(unsigned(ceil_div(lanes, along)), unsigned(max_i64(1, min_i64(ceil_div(p.w.n, block.y * 4), 65535))));
  const auto launch = [&]<bool kResidual>() {
    if (p.grad_dtype == DType::kF32)
      step_runs_kernel<kRule, kM, kV, DType::kF32, kResidual><<<grid, block, 0, stream_of(stream)>>>(p, numbers);
    else step_runs_kernel<kRule, kM, kV, DType::kBF16, kResidual><<<grid, block, 0, stream_of(stream)>>>(p, numbers);
  };
  if constexpr (kRule == UpdateRule::kAdamW) {
    if (p.residual_bits > 0) return launch.template operator()<true>();
  }
  launch.template operator()<false>();
}

// Launches step_runs_kernel where it serves: one segment, plain columns, groups and rows of whole runs, aligned parts, moments
// of one type (or 8 and 4 bits), a residual for adamw alone.
bool launch_runs(const PackedUpdateParams& p, const UpdateNumbers& numbers, Stream stream) {
  using enum MomentType;
  const PackedMatrix& w = p.w;
  const int bits = format_bits(w.layout.segments[0].format);
  const bool whole_groups = w.group_size >= w.k || w.group_size % kLong == 0;
  if (w.layout.segment_count != 1 || w.perm != nullptr || w.k % kLong != 0 || w.k > int64_t(1) << 30 || !whole_groups)
    return false;
  if (p.grad_dtype != DType::kBF16 && p.grad_dtype != DType::kF32) return false;
  // Alignment of the runs; a stream's runs start on multiples of 2 bits bytes.
  const auto fits = [&](MomentType t, const void* data) { return t == kNone || aligned_to(data, t == kQ4 ? 8 : 16); };
  if (!rows_aligned(p.grad, p.grad_stride * dtype_bytes(p.grad_dtype), 16) || !fits(p.m.type, p.m.data) ||
      !fits(p.v.type, p.v.data) || !rows_aligned(p.codes, w.layout.row_bytes, run_alignment(bits)))
    return false;
  if (p.residual_bits > 0 &&
      (p.rule != UpdateRule::kAdamW || !rows_aligned(p.residual, w.k / 8 * p.residual_bits, run_alignment(p.residual_bits))))
    return false;
  if (p.rule == UpdateRule::kAdamW) {
    constexpr UpdateRule kRule = UpdateRule::kAdamW;
    if (p.m.type == kQ8 && p.v.type == kQ4) return launch_runs_as<kRule, kQ8, kQ4>(p, numbers, stream), true;
    if (p.m.type != p.v.type) return false;
    switch (p.m.type) {
      case kF32: return launch_runs_as<kRule, kF32, kF32>(p, numbers, stream), true;
      case kBF16: return launch_runs_as<kRule, kBF16, kBF16>(p, numbers, stream), true;
      case kQ8: return launch_runs_as<kRule, kQ8, kQ8>(p, numbers, stream), true;
      case kQ4: return launch_runs_as<kRule, kQ4, kQ4>(p, numbers, stream), true;
      default: return false;
    }
  }
  const auto launch = [&]<UpdateRule kRule>() {
    switch (p.m.type) {
      case kNone: return launch_runs_as<kRule, kNone, kNone>(p, numbers, stream);
      case kF32: return launch_runs_as<kRule, kF32, kNone>(p, numbers, stream);
      case kBF16: return launch_runs_as<kRule, kBF16, kNone>(p, numbers, stream);
      case kQ8: return launch_runs_as<kRule, kQ8, kNone>(p, numbers, stream);
      case kQ4: return launch_runs_as<kRule, kQ4, kNone>(p, numbers, stream);
    }
  };
  if (p.rule == UpdateRule::kSign) launch.template operator()<UpdateRule::kSign>();
  else launch.template operator()<UpdateRule::kSgd>();
  return true;
}

}  // namespace

void packed_update(const PackedUpdateParams& p, Stream stream) {
  if (!check_packed_update(p)) return;
  const PackedMatrix& w = p.w;
  const char* op = update_rule_name(p.rule);
  const UpdateNumbers numbers = host_numbers(p);
  bool on_bytes = true, codes_aligned = true;
  for (int i = 0; i < w.layout.segment_count; ++i) {
    const Segment& s = w.layout.segments[i];
    on_bytes = on_bytes && s.k_begin % kRun == 0;
    codes_aligned = codes_aligned && s.byte_begin % run_alignment(format_bits(s.format)) == 0 &&
                    rows_aligned(p.codes, w.layout.row_bytes, run_alignment(format_bits(s.format)));
  }
  if (!on_bytes) {
    update_rows_kernel<<<unsigned(min_i64(ceil_div(w.n, 64), 65535)), 64, 0, stream_of(stream)>>>(p, numbers);
    return check_launch(op);
  }
  if (launch_runs(p, numbers, stream)) return check_launch(op);
  Aligned aligned;
  aligned.codes = codes_aligned;
  aligned.residual =
      p.residual_bits > 0 && rows_aligned(p.residual, stream_bytes(w.k, p.residual_bits), run_alignment(p.residual_bits));
  aligned.grad = rows_aligned(p.grad, p.grad_stride * dtype_bytes(p.grad_dtype), 16);
  aligned.m = rows_aligned(p.m.data, moment_row_bytes(p.m.type, w.k), run_alignment(moment_bits(p.m.type)));
  aligned.v = rows_aligned(p.v.data, moment_row_bytes(p.v.type, w.k), run_alignment(moment_bits(p.v.type)));
  // 8 warps a block, along the row where it is long; four rows a thread share what depends on the column.
  const int64_t blocks = ceil_div(w.k, kMomentBlock);
  unsigned along = 1;
  while (along < 8 && along < blocks) along *= 2;
  const dim3 block(32 * along, 8 / along);
  const dim3 grid(unsigned(ceil_div(blocks, along)), unsigned(max_i64(1, min_i64(ceil_div(w.n, block.y * 4), 65535))));
  dispatch_dtype(p.grad_dtype, [&](auto tag) {
    constexpr DType kGrad = decltype(tag)::value;
    switch (p.rule) {
      case UpdateRule::kAdamW:
        update_kernel<UpdateRule::kAdamW, kGrad><<<grid, block, 0, stream_of(stream)>>>(p, numbers, aligned);
        break;
      case UpdateRule::kSign:
        update_kernel<UpdateRule::kSign, kGrad><<<grid, block, 0, stream_of(stream)>>>(p, numbers, aligned);
        break;
      case UpdateRule::kSgd:
        update_kernel<UpdateRule::kSgd, kGrad><<<grid, block, 0, stream_of(stream)>>>(p, numbers, aligned);
        break;
    }
  });
  check_launch(op);
}

}  // namespace subbyte::cuda
