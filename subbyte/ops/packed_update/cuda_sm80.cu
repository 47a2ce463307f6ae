// packed_update on CUDA. A warp takes one moment block, 256 columns of a row, a lane eight neighbouring columns: eight codes
// are whole bytes, everything stays in registers between the loads and the stores, and absmax is a shuffle. Eight columns whose
// parts are aligned are loaded 8 or 16 bytes at a time. One Philox word an element serves code and both moments: a word each
// would cost more integer instructions than the memory leaves time for. A row whose segments do not start on multiples of eight
// columns shares bytes between lanes: such a layout is walked by one thread a row, by the text of the reference.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"
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
    const MomentGrid grid{kSigned ? signed_levels(moment.type) : unsigned_levels(moment.type),
                          moment.absmax[n * blocks + k / kMomentBlock], 0.0f};
    uint32_t codes[kRun];
    spread(stream, bits, codes);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float code = small_to_float(codes[j]);
      out[j] = j >= count ? 0.0f : kSigned ? signed_value<ScalarLane>(grid, code) : unsigned_value<ScalarLane>(grid, code);
    }
  }
}

template <bool kSigned>
__device__ __forceinline__ void store_moment(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k,
                                             int count, bool wide, const float (&values)[kRun], const uint32_t (&words)[kRun]) {
  constexpr uint32_t kMix = kSigned ? kMixM : kMixV;
  uint8_t* const row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  if (moment.type == MomentType::kNone) return;
  if (moment.type == MomentType::kF32) {
    store_run(reinterpret_cast<float*>(row) + k, count, wide, values);
    return;
  }
  if (moment.type == MomentType::kBF16) {
    alignas(16) uint16_t raw[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) raw[j] = stochastic_bf16(values[j], words[j] * kMix);
    store_run(reinterpret_cast<uint16_t*>(row) + k, count, wide, raw);
    return;
  }
  float absmax = 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (j < count) absmax = largest(fabsf(values[j]), absmax);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) absmax = largest(__shfl_xor_sync(~0u, absmax, step), absmax);
  absmax = stored_absmax(absmax);
  if (count <= 0) return;
  if (k % kMomentBlock == 0) moment.absmax[n * blocks + k / kMomentBlock] = absmax;
  const MomentGrid grid = moment_grid(kSigned ? signed_levels(moment.type) : unsigned_levels(moment.type), absmax);
  const int bits = moment.type == MomentType::kQ8 ? 8 : 4;
  uint32_t codes[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float u = uniform24(words[j] * kMix);
    const float code = kSigned ? signed_code<ScalarLane>(grid, values[j], u) : unsigned_code<ScalarLane>(grid, values[j], u);
    codes[j] = absmax != 0.0f && j < count ? uint32_t(code) : 0u;
  }
  const uint64_t stream = gathered(codes, bits);
  store_stream(row + k / 8 * bits, stream, bits, count, wide);
}

__device__ __forceinline__ void random_words(uint64_t seed, uint64_t offset, uint64_t element, uint32_t (&words)[kRun]) {
  if (element % 4 == 0) {
    const Philox4 a = philox4x32(seed, offset, element / 4), b = philox4x32(seed, offset, element / 4 + 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = a.v[j];
      words[4 + j] = b.v[j];
    }
    return;
  }
  Philox4 block = philox4x32(seed, offset, element / 4);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const uint64_t e = element + uint64_t(j);
    if (j > 0 && e % 4 == 0) block = philox4x32(seed, offset, e / 4);
    const uint32_t lane = uint32_t(e % 4);
    words[j] = lane == 0 ? block.v[0] : lane == 1 ? block.v[1] : lane == 2 ? block.v[2] : block.v[3];
  }
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
  const int64_t blocks = ceil_div(w.k, kMomentBlock), groups = w.groups(), residual_bytes = stream_bytes(w.k, p.residual_bits);
  const int64_t m_bytes = moment_row_bytes(p.m.type, w.k), v_bytes = moment_row_bytes(p.v.type, w.k);
  const Segment& s = segment_of(w.layout, min_i64(k, w.k - 1));
  const int bits = format_bits(s.format);
  const float fixed_zero = format_fixed_zero(s.format), top = float((format_levels(s.format) << p.residual_bits) - 1);
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
    random_words(p.seed, c.offset, (p.first_row + uint64_t(n)) * uint64_t(w.k) + uint64_t(k), words);
    uint32_t codes_now[kRun], low_now[kRun];
    spread(stream, bits, codes_now);
    if (p.residual_bits > 0) spread(low, p.residual_bits, low_now);
    int64_t group_index = first_group, group_end = (first_group + 1) * w.group_size;
    GroupStep group{true, 0.0f, 0.0f, 0.0f};
    auto enter_group = [&] {
      const GroupParams g = load_group(w, fixed_zero, n * groups + group_index);
      group = group_step(g.scale, g.zero, w.zero_kind, p.residual_bits, c);
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
      Element<ScalarLane> e;
      e.m = m[j];
      e.v = kRule == UpdateRule::kAdamW ? v[j] : 0.0f;
      e.q = small_to_float(code);
      e = stepped<kRule, ScalarLane>(c, group, top, grad[j], e, uniform24(words[j]));
      code = uint32_t(e.q);
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
    store_moment<true>(p.m, m_bytes, blocks, n, k, count, aligned.m, m, words);
    if constexpr (kRule == UpdateRule::kAdamW) store_moment<false>(p.v, v_bytes, blocks, n, k, count, aligned.v, v, words);
  }
}

__global__ void __launch_bounds__(64)
    update_rows_kernel(const __grid_constant__ PackedUpdateParams p, const __grid_constant__ UpdateNumbers host_values) {
  const UpdateNumbers c = update_numbers(p, host_values);
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < p.w.n; n += int64_t(gridDim.x) * blockDim.x)
    update_row(p, c, n);
}

bool rows_aligned(const void* base, int64_t row_bytes, int64_t bytes) {
  return aligned_to(base, bytes) && row_bytes % bytes == 0;
}

// The alignment that a run of eight elements of `bits` bits asks for.
int64_t run_alignment(int64_t bits) { return bits >= 16 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }

int64_t moment_bits(MomentType t) {
  return t == MomentType::kF32 ? 32 : t == MomentType::kBF16 ? 16 : t == MomentType::kQ8 ? 8 : 4;
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
