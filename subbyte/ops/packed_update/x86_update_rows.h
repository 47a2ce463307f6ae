// packed_update over a vector type V: V of quantize (x86_<isa>_vector.h) and what UpdateVector of each x86_*.cc adds. Included
// by x86_*.cc files only, which compile it for their instruction set; V is local to the file, so no instance leaves it.
//
// A row is walked in its moment blocks of 256 columns. A whole block whose groups start on multiples of 32 columns is stepped
// in two passes through the first-level cache, from memory and to memory, in whatever order of columns V's loads give cheaply
// (V::pair_columns). The first finds the averages, the random words and absmax, the second moves the codes and stores the
// moments: its roots and divisions wait long for each other, and find independent work there. Any other block (the row's tail,
// odd groups, segments that meet inside it, gradients to skip, unusual pairs of moments) is spread to float arrays first and
// stepped group by group; a whole vector may run over a group's end, as the next group writes the surplus again.
#pragma once
#include <cstring>

#include "subbyte/ops/packed_update/update_rule.h"
#include "subbyte/ops/quantize/x86_quantize_rows.h"

namespace subbyte {
namespace {

constexpr int64_t kQuad = 32;         // columns; groups of whole blocks start on multiples of this
constexpr int64_t kGroupsAhead = 64;  // steps of groups are found this many at a time; a block has at most 8 groups

template <class V>
struct UpdateBlock {
  static constexpr int64_t kRoom = kMomentBlock + V::kLanes;
  alignas(64) float grad[kRoom], m[kRoom], v[kRoom], m_after[kRoom], v_after[kRoom];
  alignas(64) uint32_t words[kRoom];
  alignas(64) uint8_t codes[kRoom], low[kRoom], codes_after[kRoom], low_after[kRoom], m_codes[kRoom], v_codes[kRoom];
};

// The steps of groups [first, first + count) of a row, of one segment.
template <class V>
struct GroupSteps {
  static constexpr int64_t kRoom = kGroupsAhead + V::kLanes;
  int64_t first = 0, count = 0;
  alignas(64) float scale[kRoom], zero[kRoom], rate[kRoom], decay[kRoom], pull[kRoom], centre[kRoom], shrink[kRoom];
};

// What all rows of a call share.
struct UpdatePlan {
  UpdateNumbers c;
  uint64_t key;
  int64_t blocks, groups, residual_bytes, m_bytes, v_bytes;
  float harmless;  // gradients of a smaller magnitude are usable; a NaN if the factor is
  explicit UpdatePlan(const PackedUpdateParams& p)
      : c(update_numbers(p, host_numbers(p))),
        key(step_key(p.seed, c.offset)),
        blocks(ceil_div(p.w.k, kMomentBlock)),
        groups(p.w.groups()),
        residual_bytes(stream_bytes(p.w.k, p.residual_bits)),
        m_bytes(moment_row_bytes(p.m.type, p.w.k)),
        v_bytes(moment_row_bytes(p.v.type, p.w.k)),
        harmless(0.5f * kTooLarge / ScalarLane::max(ScalarLane::abs(c.factor), 1.0f)) {}
};

// ---- whole blocks, pair by pair

template <class V>
void load_params(const void* p, DType type, int64_t i, int64_t count, float* out) {
  switch (type) {
    case DType::kF32: return load_piece_as<V, DType::kF32>(p, nullptr, i, count, out);
    case DType::kF16: return load_piece_as<V, DType::kF16>(p, nullptr, i, count, out);
    case DType::kBF16: return load_piece_as<V, DType::kBF16>(p, nullptr, i, count, out);
    case DType::kF64: return load_piece_as<V, DType::kF64>(p, nullptr, i, count, out);
  }
}

template <class V>
void find_group_steps(const PackedUpdateParams& p, const UpdatePlan& plan, float fixed_zero, int64_t n, int64_t first,
                      GroupSteps<V>& steps) {
  const PackedMatrix& w = p.w;
  steps.first = first;
  steps.count = min_i64(kGroupsAhead, plan.groups - first);
  const int64_t i = n * plan.groups + first;
  load_params<V>(w.scales, w.scale_dtype, i, steps.count, steps.scale);
  if (w.zero_kind != ZeroKind::kFixed) load_params<V>(w.zeros, w.zero_dtype, i, steps.count, steps.zero);
  for (int64_t g = 0; g < steps.count; g += V::kLanes) {
    const typename V::F zero =
        w.zero_kind == ZeroKind::kFixed ? V::set(fixed_zero) : V::template load<DType::kF32>(steps.zero, g);
    const GroupStep<V> s =
        group_step<V>(V::template load<DType::kF32>(steps.scale, g), zero, w.zero_kind, p.residual_bits, plan.c);
    V::template store<DType::kF32>(steps.rate, g, s.rate);
    V::template store<DType::kF32>(steps.decay, g, s.decay);
    V::template store<DType::kF32>(steps.pull, g, s.pull);
    V::template store<DType::kF32>(steps.centre, g, s.zero);
    V::template store<DType::kF32>(steps.shrink, g, s.shrink);
  }
}

// A block of codes in a stream, one a byte, and back.
template <class V>
void spread_block(const uint8_t* stream, int bits, uint8_t* codes) {
  if (bits == 4) V::spread_nibbles(stream, kMomentBlock, codes);
  else V::unpack(stream, kMomentBlock, bits, codes);
}
template <class V>
void gather_block(const uint8_t* codes, int bits, uint8_t* stream) {
  if (bits == 4) V::gather_nibbles(codes, kMomentBlock, stream);
  else V::pack(codes, kMomentBlock, bits, stream);
}

// A moment of a block: where it stands, its codes one a byte, and the largest of the values after the step.
template <class V, MomentType kType, bool kSigned>
struct MomentBlock {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr bool kBlockwise = is_blockwise(kType);
  using Code = MomentCode<kBlockwise ? kType : MomentType::kQ8, kSigned>;

  uint8_t* data = nullptr;
  float* absmax = nullptr;
  uint8_t* codes = nullptr;  // `data` or spread
  MomentGrid grid{};
  F top;

  MomentBlock(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k, uint8_t* bytes)
      : top(V::set(0.0f)) {
    if constexpr (kType != MomentType::kNone)
      data = static_cast<uint8_t*>(moment.data) + n * row_bytes + moment_row_bytes(kType, k);
    if constexpr (kBlockwise) {
      absmax = moment.absmax + n * blocks + k / kMomentBlock;
      grid = moment_grid<Code>(*absmax);
      codes = kType == MomentType::kQ8 ? data : bytes;
      if constexpr (kType == MomentType::kQ4) V::spread_nibbles(data, kMomentBlock, bytes);
    }
  }
  void load(int64_t j, F (&out)[2]) const {
    if constexpr (kType == MomentType::kNone) {
      out[0] = out[1] = V::set(0.0f);
    } else if constexpr (kType == MomentType::kF32) {
      V::template load_pair<DType::kF32>(data, j, out);
    } else if constexpr (kType == MomentType::kBF16) {
      V::template load_pair<DType::kBF16>(data, j, out);
    } else {
      I code[2];
      if constexpr (kSigned) V::template load_pair_upper<Code::kBits>(codes + j, code);
      else V::load_pair_bytes(codes + j, code);
      for (int i = 0; i < 2; ++i) {
        if constexpr (kSigned) out[i] = signed_value<Code, V>(grid, code[i]);
        else out[i] = unsigned_value<Code, V>(grid, code[i]);
      }
    }
  }
  void take(F value) {
    if constexpr (kBlockwise) top = larger_positive<V>(kSigned ? V::abs(value) : value, top);
  }
  void all_taken() {
    if constexpr (kBlockwise) {
      *absmax = stored_absmax(V::reduce_max(top));
      grid = moment_grid<Code>(*absmax);
    }
  }
  // Pair 0 or 1 of kQuad columns, then their storage: pairs are narrowed one by one, so that few registers wait.
  struct Narrow {
    typename V::Pair values[2], signs[2];
    F floats[kType == MomentType::kF32 ? V::kParts : 1];
  };
  void narrow(int pair, const F (&values)[2], const I (&words)[2], Narrow& out) const {
    if constexpr (kType == MomentType::kF32) {
      for (int i = 0; i < 2; ++i) out.floats[2 * pair + i] = values[i];
    } else if constexpr (kType == MomentType::kBF16) {
      out.values[pair] =
          V::upper_halves(noisy_bf16<V>(kSigned, values[0], words[0]), noisy_bf16<V>(kSigned, values[1], words[1]));
    } else if constexpr (kBlockwise && kSigned) {
      out.values[pair] = V::template codes_of<Code>(noisy_magnitude<Code, V>(grid, values[0], words[0]),
                                                    noisy_magnitude<Code, V>(grid, values[1], words[1]));
      out.signs[pair] = V::signs_of(values[0], values[1]);
    } else if constexpr (kBlockwise) {
      out.values[pair] = V::template codes_of<Code>(noisy_square<Code, V>(grid, values[0], words[0]),
                                                    noisy_square<Code, V>(grid, values[1], words[1]));
    }
  }
  void store(int64_t j, const Narrow& in) const {
    if constexpr (kType == MomentType::kF32) V::store_floats(reinterpret_cast<float*>(data) + j, in.floats);
    else if constexpr (kType == MomentType::kBF16) V::store_halves(reinterpret_cast<uint16_t*>(data) + j, in.values);
    else if constexpr (kBlockwise && kSigned) V::template store_signed_codes<Code>(codes + j, in.values, in.signs);
    else if constexpr (kBlockwise) V::store_codes(codes + j, in.values, 255);
  }
  void close() const {
    if constexpr (kType == MomentType::kQ4) V::gather_nibbles(codes, kMomentBlock, data);
  }
};

// The 256 columns of row n from k on, all in segment s, whose groups start on multiples of kQuad. False, and nothing is
// changed, where a gradient may have to be skipped.
template <class V, UpdateRule kRule, MomentType kM, MomentType kV, DType kGrad>
bool step_whole_block(const PackedUpdateParams& p, const UpdatePlan& plan, const Segment& s, const void* grad, int64_t n,
                      int64_t k, GroupSteps<V>& steps, UpdateBlock<V>& x) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr bool kSecond = kRule == UpdateRule::kAdamW;
  const UpdateNumbers c = plan.c;
  const PackedMatrix& w = p.w;
  const int bits = format_bits(s.format), residual_bits = p.residual_bits;
  const uint32_t top = uint32_t(format_levels(s.format) << residual_bits) - 1u, low_mask = (1u << residual_bits) - 1u;
  const uint8_t coarse_top = uint8_t(format_levels(s.format) - 1);
  uint8_t* const stream = p.codes + n * w.layout.row_bytes + s.byte_begin + (k - s.k_begin) / 8 * bits;
  uint8_t* const residual = p.residual + n * plan.residual_bytes + k / 8 * residual_bits;
  MomentBlock<V, kM, true> m_block(p.m, plan.m_bytes, plan.blocks, n, k, x.m_codes);
  MomentBlock<V, kV, false> v_block(p.v, plan.v_bytes, plan.blocks, n, k, x.v_codes);
  uint8_t* const codes = bits == 8 ? stream : x.codes;
  if (bits != 8) spread_block<V>(stream, bits, codes);
  if (residual_bits > 0) spread_block<V>(residual, residual_bits, x.low);
  const int64_t first_group = k / w.group_size;
  if (first_group < steps.first || (k + kMomentBlock - 1) / w.group_size >= steps.first + steps.count)
    find_group_steps<V>(p, plan, format_fixed_zero(s.format), n, first_group, steps);
  const BlockKey key = block_key(plan.key, (p.first_row + uint64_t(n)) * uint64_t(plan.blocks) + uint64_t(k / kMomentBlock));

  const auto load_codes = [&](int64_t j, I(&q)[2]) {
    V::load_pair_bytes(codes + j, q);
    if (residual_bits == 0) return;
    I low[2];
    V::load_pair_bytes(x.low + j, low);
    for (int i = 0; i < 2; ++i) q[i] = V::int_add(V::left_by(q[i], residual_bits), low[i]);
  };
  const auto group_at = [&](int64_t g) {
    g -= steps.first;
    return GroupStep<V>{V::set(steps.rate[g]), V::set(steps.decay[g]), V::set(steps.pull[g]), V::set(steps.centre[g]),
                        V::set(steps.shrink[g])};
  };
  const int64_t first_end = (first_group + 1) * w.group_size - k;

  I size = V::zero();
  for (int64_t j = 0, g = first_group, end = first_end; j < kMomentBlock; ++g, end += w.group_size) {
    const GroupStep<V> group = group_at(g);
    for (const int64_t until = min_i64(end, kMomentBlock); j < until; j += 2 * V::kLanes) {
      F gradient[2], m[2], v[2];
      I q[2];
      V::template load_pair<kGrad>(grad, j, gradient);
      V::template track_pair<kGrad>(grad, j, size);
      m_block.load(j, m);
      v_block.load(j, v);
      if constexpr (kRule == UpdateRule::kSgd) load_codes(j, q);
      else q[0] = q[1] = V::int_set(0);
      for (int i = 0; i < 2; ++i) {
        const int64_t at = j + i * V::kLanes;
        const Averages<V> a = averaged<kRule, V>(c, group, V::mul(gradient[i], V::set(c.factor)), {m[i], v[i], q[i]});
        m_block.take(a.m);
        V::template store<DType::kF32>(x.m, at, a.m);
        if constexpr (kSecond) v_block.take(a.v);
        V::template store<DType::kF32>(x.v, at, a.r);
      }
    }
  }
  if (!V::template tracked_below<kGrad>(size, plan.harmless)) [[unlikely]]
    return false;
  m_block.all_taken();
  v_block.all_taken();
  const I second_key = V::int_set(key.second);
  I counters = V::int_set(key.first);
  for (int64_t j = 0, g = first_group, end = first_end; j < kMomentBlock; ++g, end += w.group_size) {
    const GroupStep<V> group = group_at(g);
    for (const int64_t until = min_i64(end, kMomentBlock); j < until; j += kQuad) {
      typename V::Pair code[2], low[2];
      typename decltype(m_block)::Narrow m_narrow;
      typename decltype(v_block)::Narrow v_narrow;
#pragma GCC unroll 2
      for (int pair = 0; pair < V::kParts / 2; ++pair) {
        F m[2], r[2];
        I q[2], words[2];
        load_codes(j + 2 * V::kLanes * pair, q);
        for (int i = 0; i < 2; ++i) {
          const int64_t at = j + (2 * pair + i) * V::kLanes;
          m[i] = V::template load<DType::kF32>(x.m, at);
          r[i] = V::template load<DType::kF32>(x.v, at);
          words[i] = random_words<V>(V::int_add(counters, V::quad_columns(2 * pair + i)), second_key);
          q[i] = moved<kRule, V>(c, group, m[i], r[i], q[i], words[i]);
        }
        if (residual_bits > 0) {
          for (int i = 0; i < 2; ++i) q[i] = inside<V>(q[i], top);
          low[pair] = V::narrow(V::int_and(q[0], V::int_set(low_mask)), V::int_and(q[1], V::int_set(low_mask)));
          for (int i = 0; i < 2; ++i) q[i] = V::right_by(q[i], residual_bits);
        }
        code[pair] = V::narrow(q[0], q[1]);
        m_block.narrow(pair, m, words, m_narrow);
        v_block.narrow(pair, r, words, v_narrow);
      }
      counters = V::int_add(counters, V::int_set(kQuad * kColumnStep));
      V::store_codes(codes + j, code, coarse_top);
      if (residual_bits > 0) V::store_codes(x.low + j, low, 255);
      m_block.store(j, m_narrow);
      v_block.store(j, v_narrow);
    }
  }
  if (bits != 8) gather_block<V>(codes, bits, stream);
  if (residual_bits > 0) gather_block<V>(x.low, residual_bits, residual);
  m_block.close();
  v_block.close();
  return true;
}

// step_whole_block for the moments of p; false too where it serves none such. (Not a pointer to the function: a call through
// one might throw, for all that the compiler knows, and would bring symbols of the exception handling into this file.)
template <class V, UpdateRule kRule, DType kGrad>
bool try_whole_block(const PackedUpdateParams& p, const UpdatePlan& plan, const Segment& s, const void* grad, int64_t n,
                     int64_t k, GroupSteps<V>& steps, UpdateBlock<V>& x) {
  using enum MomentType;
  constexpr bool kSecond = kRule == UpdateRule::kAdamW;
  if constexpr (kSecond) {
    if (p.m.type == kQ8 && p.v.type == kQ4)
      return step_whole_block<V, kRule, kQ8, kQ4, kGrad>(p, plan, s, grad, n, k, steps, x);
    if (p.m.type != p.v.type) return false;
  }
  switch (p.m.type) {
    case kNone:
      if constexpr (kSecond) return false;
      else return step_whole_block<V, kRule, kNone, kNone, kGrad>(p, plan, s, grad, n, k, steps, x);
    case kF32: return step_whole_block < V, kRule, kF32, kSecond ? kF32 : kNone, kGrad > (p, plan, s, grad, n, k, steps, x);
    case kBF16: return step_whole_block < V, kRule, kBF16, kSecond ? kBF16 : kNone, kGrad > (p, plan, s, grad, n, k, steps, x);
    case kQ8: return step_whole_block < V, kRule, kQ8, kSecond ? kQ8 : kNone, kGrad > (p, plan, s, grad, n, k, steps, x);
    case kQ4: return step_whole_block < V, kRule, kQ4, kSecond ? kQ4 : kNone, kGrad > (p, plan, s, grad, n, k, steps, x);
  }
  return false;
}

// ---- other blocks, group by group

template <class V>
void load_gradient(const PackedUpdateParams& p, int64_t n, int64_t k, int64_t count, float* out) {
  const void* row = static_cast<const uint8_t*>(p.grad) + n * p.grad_stride * dtype_bytes(p.grad_dtype);
  switch (p.grad_dtype) {
    case DType::kF32: load_piece_as<V, DType::kF32>(row, p.w.perm, k, count, out); break;
    case DType::kF16: load_piece_as<V, DType::kF16>(row, p.w.perm, k, count, out); break;
    case DType::kBF16: load_piece_as<V, DType::kBF16>(row, p.w.perm, k, count, out); break;
    case DType::kF64: load_piece_as<V, DType::kF64>(row, p.w.perm, k, count, out); break;
  }
  V::template store<DType::kF32>(out, count, V::set(0.0f));
}

// Codes of stored columns [k, k + count), one a byte, from one stream or from segments; and back. Segments that do not start on
// a multiple of 8 go code by code.
template <class V>
void unpack_columns(const RowLayout& layout, const uint8_t* row, int64_t k, int64_t count, uint8_t* out) {
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int64_t begin = max_i64(k, s.k_begin) - s.k_begin, end = min_i64(k + count, s.k_begin + s.k_count) - s.k_begin;
    if (begin >= end) continue;
    const int bits = format_bits(s.format);
    const uint8_t* const stream = row + s.byte_begin;
    uint8_t* const to = out + s.k_begin + begin - k;
    if (begin % 8 == 0) {
      V::unpack(stream + begin / 8 * bits, end - begin, bits, to);
    } else {
      for (int64_t j = begin; j < end; ++j) to[j - begin] = uint8_t(get_code(stream, j, bits));
    }
  }
}

template <class V>
void pack_columns(const RowLayout& layout, uint8_t* row, int64_t k, int64_t count, const uint8_t* codes) {
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int64_t begin = max_i64(k, s.k_begin) - s.k_begin, end = min_i64(k + count, s.k_begin + s.k_count) - s.k_begin;
    if (begin >= end) continue;
    const int bits = format_bits(s.format);
    uint8_t* const stream = row + s.byte_begin;
    const uint8_t* const from = codes + s.k_begin + begin - k;
    // A piece that ends inside a byte would clear the bits after it, which belong to the next piece.
    if (begin % 8 == 0 && (end % 8 == 0 || end == s.k_count)) {
      V::pack(from, end - begin, bits, stream + begin / 8 * bits);
    } else {
      for (int64_t j = begin; j < end; ++j) set_code(stream, j, bits, from[j - begin]);
      if (end == s.k_count) clear_spare_bits(stream, s.k_count, bits);
    }
  }
}

template <class V, MomentType kType, bool kSigned>
void decode_codes(const uint8_t* codes, int64_t count, float absmax, float* out) {
  using Code = MomentCode<kType, kSigned>;
  const MomentGrid grid = moment_grid<Code>(absmax);
  for (int64_t j = 0; j < count; j += V::kLanes) {
    const typename V::I code = V::load_bytes(codes + j);
    if constexpr (kSigned)
      V::template store<DType::kF32>(out, j, signed_value<Code, V>(grid, V::template left<32 - Code::kBits>(code)));
    else V::template store<DType::kF32>(out, j, unsigned_value<Code, V>(grid, code));
  }
}

// A moment of stored columns [k, k + count) of row n as float; zeros after them.
template <class V, bool kSigned>
void load_moment(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k, int64_t count, float* out,
                 uint8_t* bytes) {
  const uint8_t* const row = static_cast<const uint8_t*>(moment.data) + n * row_bytes;
  switch (moment.type) {
    case MomentType::kNone: std::memset(out, 0, size_t(count) * sizeof(float)); break;
    case MomentType::kF32: load_piece_as<V, DType::kF32>(row, nullptr, k, count, out); break;
    case MomentType::kBF16: load_piece_as<V, DType::kBF16>(row, nullptr, k, count, out); break;
    case MomentType::kQ8:
      std::memcpy(bytes, row + k, size_t(count));
      decode_codes<V, MomentType::kQ8, kSigned>(bytes, count, moment.absmax[n * blocks + k / kMomentBlock], out);
      break;
    case MomentType::kQ4:
      V::unpack(row + k / 2, count, 4, bytes);
      decode_codes<V, MomentType::kQ4, kSigned>(bytes, count, moment.absmax[n * blocks + k / kMomentBlock], out);
      break;
  }
  V::template store<DType::kF32>(out, count, V::set(0.0f));
}

template <bool kSigned, MomentType kType>
void encode_codes(float absmax, const float* values, const uint32_t* words, int64_t count, uint8_t* codes) {
  using Code = MomentCode<kType, kSigned>;
  for (int64_t j = 0; j < count; ++j) {
    if constexpr (kSigned) codes[j] = uint8_t(signed_code<Code>(absmax, values[j], words[j]));
    else codes[j] = uint8_t(unsigned_code<Code>(absmax, values[j], words[j]));
  }
}

template <class V, bool kSigned>
void store_moment_columns(const MomentView& moment, int64_t row_bytes, int64_t blocks, int64_t n, int64_t k, int64_t count,
                          const float* values, const uint32_t* words, uint8_t* bytes) {
  uint8_t* const row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  float absmax = 0;
  if (is_blockwise(moment.type)) {
    typename V::F top = V::set(0.0f);
    for (int64_t j = 0; j < count; j += V::kLanes) top = V::max(V::abs(V::template load<DType::kF32>(values, j)), top);
    absmax = stored_absmax(V::reduce_max(top));
    moment.absmax[n * blocks + k / kMomentBlock] = absmax;
  }
  switch (moment.type) {
    case MomentType::kNone: break;
    case MomentType::kF32: {
      float* const out = reinterpret_cast<float*>(row) + k;
      int64_t j = 0;
      for (; j + V::kLanes <= count; j += V::kLanes)
        V::template store<DType::kF32>(out, j, V::template load<DType::kF32>(values, j));
      for (; j < count; ++j) out[j] = values[j];
      break;
    }
    case MomentType::kBF16: {
      uint16_t* const out = reinterpret_cast<uint16_t*>(row) + k;
      for (int64_t j = 0; j < count; ++j) out[j] = uint16_t(noisy_bf16<ScalarLane>(kSigned, values[j], words[j]) >> 16);
      break;
    }
    case MomentType::kQ8: encode_codes<kSigned, MomentType::kQ8>(absmax, values, words, count, row + k); break;
    case MomentType::kQ4:
      encode_codes<kSigned, MomentType::kQ4>(absmax, values, words, count, bytes);
      V::pack(bytes, count, 4, row + k / 2);
      break;
  }
}

template <class V, UpdateRule kRule>
void step_block(const PackedUpdateParams& p, const UpdatePlan& plan, int64_t n, int64_t k, int64_t count, UpdateBlock<V>& x) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr bool kSecond = kRule == UpdateRule::kAdamW;
  const PackedMatrix& w = p.w;
  const UpdateNumbers& c = plan.c;
  const int residual_bits = p.residual_bits;
  uint8_t* const row = p.codes + n * w.layout.row_bytes;
  uint8_t* const residual = p.residual + n * plan.residual_bytes + k / 8 * residual_bits;
  load_gradient<V>(p, n, k, count, x.grad);
  load_moment<V, true>(p.m, plan.m_bytes, plan.blocks, n, k, count, x.m, x.m_codes);
  if constexpr (kSecond) load_moment<V, false>(p.v, plan.v_bytes, plan.blocks, n, k, count, x.v, x.v_codes);
  unpack_columns<V>(w.layout, row, k, count, x.codes);
  if (residual_bits > 0) V::unpack(residual, count, residual_bits, x.low);
  const BlockKey key = block_key(plan.key, (p.first_row + uint64_t(n)) * uint64_t(plan.blocks) + uint64_t(k / kMomentBlock));
  for (int64_t j = 0; j < count; j += V::kLanes)
    V::store_words(x.words + j, random_words<V>(V::int_add(V::columns(), V::int_set(key.first + uint32_t(j) * kColumnStep)),
                                                V::int_set(key.second)));
  for (int64_t j = 0; j < count;) {
    const int64_t g = (k + j) / w.group_size;
    const Segment& s = segment_of(w.layout, k + j);
    const int64_t end = min_i64(count, (g + 1) * w.group_size - k);
    const int64_t i = n * plan.groups + g;
    const GroupStep<V> group = group_step<V>(V::set(load_float(w.scales, w.scale_dtype, i)), V::set(group_zero(w, s.format, i)),
                                             w.zero_kind, residual_bits, c);
    const uint32_t top = uint32_t(format_levels(s.format) << residual_bits) - 1u;
    for (; j < end; j += V::kLanes) {
      Element<V> before{V::template load<DType::kF32>(x.m, j), V::template load<DType::kF32>(x.v, j),
                        V::load_bytes(x.codes + j)};
      if (residual_bits > 0) before.q = V::int_add(V::left_by(before.q, residual_bits), V::load_bytes(x.low + j));
      const F grad = V::mul(V::template load<DType::kF32>(x.grad, j), V::set(c.factor));
      const Element<V> e =
          kept_unless<V>(usable<V>(grad), stepped<kRule, V>(c, group, top, grad, before, V::load_words(x.words + j)), before);
      V::template store<DType::kF32>(x.m_after, j, e.m);
      if constexpr (kSecond) V::template store<DType::kF32>(x.v_after, j, e.v);
      I q = e.q;
      if (residual_bits > 0) {
        V::store_vector_bytes(x.low_after + j, V::int_and(q, V::int_set((1u << residual_bits) - 1u)));
        q = V::right_by(q, residual_bits);
      }
      V::store_vector_bytes(x.codes_after + j, q);
    }
    j = end;
  }
  // What the last group wrote after the block does not count for absmax.
  V::template store<DType::kF32>(x.m_after, count, V::set(0.0f));
  V::template store<DType::kF32>(x.v_after, count, V::set(0.0f));
  pack_columns<V>(w.layout, row, k, count, x.codes_after);
  if (residual_bits > 0) V::pack(x.low_after, count, residual_bits, residual);
  store_moment_columns<V, true>(p.m, plan.m_bytes, plan.blocks, n, k, count, x.m_after, x.words, x.m_codes);
  if constexpr (kSecond)
    store_moment_columns<V, false>(p.v, plan.v_bytes, plan.blocks, n, k, count, x.v_after, x.words, x.v_codes);
}

// Row n by whole blocks where that can be.
template <class V, UpdateRule kRule>
void update_rows_as(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) {
  const PackedMatrix& w = p.w;
  const UpdatePlan plan(p);
  UpdateBlock<V> x;
  std::memset(&x, 0, sizeof(x));
  GroupSteps<V> steps;
  std::memset(&steps, 0, sizeof(steps));
  // Other gradients become float32 first.
  const bool narrow = p.grad_dtype == DType::kBF16 && w.perm == nullptr;
  const bool direct = narrow || (p.grad_dtype == DType::kF32 && w.perm == nullptr);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const uint8_t* const row = static_cast<const uint8_t*>(p.grad) + n * p.grad_stride * dtype_bytes(p.grad_dtype);
    for (int64_t k = 0; k < w.k; k += kMomentBlock) {
      const int64_t count = min_i64(kMomentBlock, w.k - k);
      const Segment& s = segment_of(w.layout, k);
      if (k - s.k_begin < kMomentBlock) steps.count = 0;  // another row or segment
      if (count == kMomentBlock && w.group_size % kQuad == 0 && (k - s.k_begin) % 8 == 0 &&
          k + count <= s.k_begin + s.k_count) {
        if (!direct) load_gradient<V>(p, n, k, count, x.grad);
        const void* const grad = direct ? row + k * dtype_bytes(p.grad_dtype) : static_cast<const void*>(x.grad);
        if (narrow ? try_whole_block<V, kRule, DType::kBF16>(p, plan, s, grad, n, k, steps, x)
                   : try_whole_block<V, kRule, DType::kF32>(p, plan, s, grad, n, k, steps, x))
          continue;
      }
      step_block<V, kRule>(p, plan, n, k, count, x);
    }
  }
}

template <class V>
void update_rows_with(const PackedUpdateParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.rule) {
    case UpdateRule::kAdamW: return update_rows_as<V, UpdateRule::kAdamW>(p, row_begin, row_end);
    case UpdateRule::kSign: return update_rows_as<V, UpdateRule::kSign>(p, row_begin, row_end);
    case UpdateRule::kSgd: return update_rows_as<V, UpdateRule::kSgd>(p, row_begin, row_end);
  }
}

}  // namespace
}  // namespace subbyte
