// The two shapes of kernel, written once over a vector type. Text for the ISA files alone: each includes it inside its own
// namespace after it has defined `struct V`, so every instruction set compiles its own copy and none has external linkage.
//
// V offers: I, F (integer and float vectors), kBytes, kLanes (of 32 bits), kNr (vectors of weight rows in a strip), kBlockK,
// kBlockM, kCentersBytes, kVnni, and the static functions used below. Integer products:
//   kVnni   vpdpbusd: codes unsigned, x signed, straight into int32
//   else    vpmaddubsw into int16 and vpmaddwd into int32, never saturating: a pair is at most 2 * 127 * (2^bits - 1), i.e.
//   3810
//           at 4 bits (8 pairs fit) and 32258 at 7; 8-bit codes are centred to [-128, 127] and multiplied as |q| * (sign(q) x),
//           a pair at most 2 * 128 * 127 = 32512.
// Sums of int32 may pass 2^31 on the way and wrap; what they end at fits (kMaxGroupColumns).

using I = V::I;
using F = V::F;
constexpr int kLanes = V::kLanes, kBytes = V::kBytes;

SB_INLINE int64_t group_index(const LinearA8Job& job, int64_t m, int64_t g) {
  return m / job.tile_rows * job.group_stride + g * job.tile_rows + m % job.tile_rows;
}

// count floats from element i of a float array of any of three types.
SB_INLINE void load_floats(const void* src, DType t, int64_t i, int64_t count, float* out) {
  int64_t j = 0;
  if (t == DType::kF32) {
    const float* p = static_cast<const float*>(src) + i;
    for (; j + kLanes <= count; j += kLanes) V::store_f(out + j, V::load_f(p + j));
    for (; j < count; ++j) out[j] = p[j];
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(src) + i;
  if (t == DType::kF16) {
    for (; j + kLanes <= count; j += kLanes) V::store_f(out + j, V::load_f16(p + j));
    for (; j < count; ++j) out[j] = _cvtsh_ss(p[j]);
  } else {
    for (; j + kLanes <= count; j += kLanes) V::store_f(out + j, V::load_bf16(p + j));
    for (; j < count; ++j) out[j] = bf16_to_float(p[j]);
  }
}

// One vector of results, `count` of its lanes, rounded to type t.
SB_INLINE void store_floats(void* dst, DType t, int64_t i, int64_t count, F v) {
  alignas(64) uint8_t bytes[4 * kLanes];
  const int64_t size = t == DType::kF32 ? 4 : 2;
  uint8_t* out = static_cast<uint8_t*>(dst) + i * size;
  uint8_t* at = count == kLanes ? out : bytes;
  if (t == DType::kF32) V::store_f(reinterpret_cast<float*>(at), v);
  else if (t == DType::kF16) V::store_f16(at, v);
  else V::store_bf16(at, v);
  if (at == bytes)
    for (int64_t b = 0; b < count * size; ++b) out[b] = bytes[b];
}

// ---- x ----------------------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 1024;

// Stored columns [k, k + count) of row m as float32; count <= kChunk.
SB_INLINE const float* x_chunk(const LinearA8Params& p, int64_t m, int64_t k, int64_t count, float* buffer) {
  const int64_t at = m * p.x_stride;
  if (p.w.perm != nullptr) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = load_float(p.x, p.dtype, at + p.w.perm[k + i]);
    return buffer;
  }
  if (p.dtype == DType::kF32) return static_cast<const float*>(p.x) + at + k;
  load_floats(p.x, p.dtype, at + k, count, buffer);
  return buffer;
}

// Quantizes columns [begin, end) of row m with one scale, which it returns; NaN if they hold NaN or infinity.
float quantize_range(const LinearA8Job& job, int64_t m, int64_t begin, int64_t end) {
  float buffer[kChunk];
  int32_t largest = 0;  // bit patterns of magnitudes order as the magnitudes do, NaN above infinity
  for (int64_t k = begin; k < end; k += kChunk) {
    const int64_t count = min_i64(kChunk, end - k);
    const float* x = x_chunk(job.p, m, k, count, buffer);
    I v = V::zero();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) v = V::max_i32(v, V::magnitude(V::load_f(x + i)));
    alignas(64) int32_t lanes[kLanes];
    V::store(lanes, v);
    for (int l = 0; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
    for (; i < count; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
  }
  const bool finite = largest < 0x7f800000;
  const float a = std::bit_cast<float>(largest);
  const bool zero = !finite || a < kLinearA8SmallestX;
  const float inverse = zero ? 0.0f : 127.0f / a;
  int8_t* out = job.columns + m * job.column_stride;
  for (int64_t k = begin; k < end; k += kChunk) {
    const int64_t count = min_i64(kChunk, end - k);
    if (zero) {
      for (int64_t i = 0; i < count; ++i) out[k + i] = 0;
      continue;
    }
    const float* x = x_chunk(job.p, m, k, count, buffer);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) V::store_i8(out + k + i, V::round(V::mul(V::load_f(x + i), V::set1_f(inverse))));
    for (; i < count; ++i) out[k + i] = int8_t(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)));
  }
  return finite ? (zero ? 0.0f : a / 127.0f) : __builtin_nanf("");
}

int32_t sum_columns(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Row m of x into job.columns, its scales and its sums by group.
void quantize_row(const LinearA8Job& job, int64_t m) {
  const PackedMatrix& w = job.p.w;
  int8_t* columns = job.columns + m * job.column_stride;
  for (int64_t k = w.k; k < job.column_stride; ++k) columns[k] = 0;
  const bool by_row = job.p.x_scale == ActivationScale::kRow;
  float row_scale = 1;
  if (by_row) row_scale = quantize_range(job, m, 0, w.k);
  for (int64_t g = 0; g < job.groups; ++g) {
    const int64_t begin = g * job.group_size, end = min_i64(begin + job.group_size, w.k), i = group_index(job, m, g);
    float scale = 1;
    if (!by_row) {
      scale = quantize_range(job, m, begin, end);
      if (scale != scale) row_scale = scale, scale = 0;
    }
    job.group_scales[i] = scale;
    job.sums[i] = float(sum_columns(columns + begin, end - begin)) * scale;
  }
  job.row_scales[m] = row_scale;
}

// ---- rowdot: dot products along the packed row ------------------------------------------------------------------------

void prepare_rowdot_rows(const LinearA8Job& job, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    quantize_row(job, m);
    for (int64_t g = job.groups; g < job.group_stride; ++g) job.group_scales[m * job.group_stride + g] = 0;
    for (int i = 0; i < job.segment_count; ++i) {
      const LinearA8Segment& s = job.segments[i];
      const int streams = 8 / s.bits;
      const int64_t blocks = ceil_div(s.byte_count, kBytes);
      const int8_t* columns = job.columns + m * job.column_stride + s.k_begin;
      int8_t* x = job.x + m * job.x_stride_bytes + s.x_begin_bytes;
      int32_t* starts = job.starts + m * job.start_stride + s.block_begin * kLanes;
      const int64_t padded = blocks * kBytes * streams;
      // Columns after this segment belong to the next one: the last block ends where the segment does.
      for (int64_t j = 0; j < padded / (kBytes * streams); ++j)
        for (int b = 0; b < kBytes; ++b)
          for (int t = 0; t < streams; ++t) {
            const int64_t k = (j * kBytes + b) * streams + t;
            x[(j * streams + t) * kBytes + b] = k < s.k_count ? columns[k] : int8_t(0);
          }
      const bool centered = V::kCentersBytes && s.bits == 8;
      for (int64_t l = 0; l < blocks * kLanes; ++l) {
        const int64_t k = l * 4 * streams, end = min_i64(k + 4 * streams, s.k_count);
        starts[l] = centered || k >= end ? 0 : -s.middle * sum_columns(columns + k, end - k);
      }
    }
  }
}

// The partial products of one block of packed codes with kM rows of x, added to acc: [kM][kChains].
template <int kBits, int kM, int kChains>
SB_INLINE void dot_block(I codes, const int8_t* const* x, int64_t at, I (&acc)[kM][kChains]) {
  constexpr int kStreams = 8 / kBits;
  if constexpr (V::kVnni) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      I c = codes;
      if (s != 0) c = V::shift_right_16(c, s * kBits);
      if (kBits != 8) c = V::bit_and(c, V::set1_i8((1 << kBits) - 1));
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) V::dot(acc[m][s % kChains], c, V::load(x[m] + at + s * kBytes));
    }
  } else if constexpr (kBits == 8) {
    const I q = V::bit_xor(codes, V::set1_i8(-128)), a = V::abs_i8(q);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
      acc[m][0] = V::add_i32(acc[m][0], V::widen_pairs(V::pairs(a, V::apply_sign(V::load(x[m] + at), q))));
  } else {
    I sum[kM];
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      I c = codes;
      if (s != 0) c = V::shift_right_16(c, s * kBits);
      c = V::bit_and(c, V::set1_i8((1 << kBits) - 1));
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const I t = V::pairs(c, V::load(x[m] + at + s * kBytes));
        sum[m] = s == 0 ? t : V::add_i16(sum[m], t);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) acc[m][0] = V::add_i32(acc[m][0], V::widen_pairs(sum[m]));
  }
}

constexpr int64_t kScaleChunk = 512;  // groups whose scales are expanded at a time; a multiple of every number of lanes

// Scales of groups [g, g + count) of row n, and the weight at the middle code where it is not 0.
SB_INLINE void load_scales(const LinearA8Job& job, const LinearA8Segment& s, int64_t n, int64_t g, int64_t count, float* scales,
                           float* middles) {
  const PackedMatrix& w = job.p.w;
  const int64_t i = n * job.groups + g;
  load_floats(w.scales, w.scale_dtype, i, count, scales);
  if (!job.has_offset) return;
  const float c = float(s.middle);
  if (w.zero_kind == ZeroKind::kFixed) {
    for (int64_t j = 0; j < count; ++j) middles[j] = scales[j] * (c - s.fixed_zero);
    return;
  }
  load_floats(w.zeros, w.zero_dtype, i, count, middles);
  if (w.zero_kind == ZeroKind::kZeros) {
    for (int64_t j = 0; j < count; ++j) middles[j] = scales[j] * (c - middles[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) middles[j] = scales[j] * c + middles[j];
  }
}

// Where kM rows of x, their lane starts and their scales of weight groups lie, for one row of weight and one segment.
template <int kM>
struct RowdotOperands {
  const uint8_t* codes;
  const int8_t* x[kM];
  const int32_t* starts[kM];
  const float* scales[kM];
};

// `units` units of kUnitBlocks blocks (0: `unit_blocks`) from block `block` on, all whole but for the last `part_bytes` bytes.
// A unit is what shares one int32 sum: some blocks of one group, or one block of groups_a_unit groups.
// A scale that many lanes share is broadcast from its 4 bytes: a vector load would stall on the stores that just made it.
template <int kBits, int kM, int kUnitBlocks, bool kOneGroup>
SB_INLINE void rowdot_units(const RowdotOperands<kM>& from, int64_t block, int64_t units, int64_t unit_blocks,
                            int64_t groups_a_unit, int64_t part_bytes, F (&total)[kM]) {
  constexpr int kStreams = 8 / kBits;
  constexpr int kChains = !V::kVnni || kM > 2 ? 1 : kM == 2 ? (kStreams < 2 ? 1 : 2) : (kStreams < 4 ? kStreams : 4);
  constexpr bool kStarts = !(V::kCentersBytes && kBits == 8);
  const I lanes = V::group_of_lane(int(groups_a_unit));
  if (kUnitBlocks != 0) unit_blocks = kUnitBlocks;
  for (int64_t u = 0; u < units; ++u) {
    I acc[kM][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) acc[m][c] = V::zero();
    auto add_block = [&](I codes) __attribute__((always_inline)) {
      if (kStarts) {
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) acc[m][0] = V::add_i32(acc[m][0], V::load(from.starts[m] + block * kLanes));
      }
      dot_block<kBits, kM, kChains>(codes, from.x, block * (kBytes * kStreams), acc);
      ++block;
    };
    for (int64_t i = 0; i < unit_blocks; ++i) {
      V::prefetch(from.codes + block * kBytes + V::kPrefetchBytes);
      add_block(V::load(from.codes + block * kBytes));
    }
    if (part_bytes != 0) add_block(V::load_part(from.codes + block * kBytes, part_bytes));
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      I sum = acc[m][0];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sum = V::add_i32(sum, acc[m][c]);
      const F scale = kOneGroup ? V::set1_f(from.scales[m][u]) : V::pick(V::load_f(from.scales[m] + u * groups_a_unit), lanes);
      total[m] = V::fma(V::to_float(sum), scale, total[m]);
    }
  }
}

// The end of a segment that is no whole unit: `whole` blocks and a part of one.
template <int kBits, int kM>
[[gnu::noinline]] void rowdot_last_unit(const RowdotOperands<kM>& from, int64_t block, int64_t whole, int64_t groups_a_unit,
                                        int64_t part_bytes, F* total) {
  F t[kM];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) t[m] = total[m];
  rowdot_units<kBits, kM, 0, false>(from, block, 1, whole, groups_a_unit, part_bytes, t);
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) total[m] = t[m];
}

template <int kBits, int kM>
[[gnu::noinline]] void rowdot_segment(const LinearA8Job& job, const LinearA8Segment& s, int64_t n, int64_t m0, F* total_at) {
  constexpr int64_t kBlockColumns = kBytes * 8 / kBits;
  const bool by_group = job.p.x_scale == ActivationScale::kRowGroup;
  const int64_t blocks = ceil_div(s.byte_count, kBytes), whole = s.byte_count / kBytes, part = s.byte_count % kBytes;
  int64_t unit_blocks = 1, groups_a_unit = 1;
  if (s.group_count == 1) unit_blocks = blocks;
  else if (job.group_size >= kBlockColumns) unit_blocks = job.group_size / kBlockColumns;
  else groups_a_unit = kBlockColumns / job.group_size;
  F total[kM];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) total[m] = total_at[m];
  RowdotOperands<kM> from;
  from.codes = job.p.w.codes + n * job.p.w.layout.row_bytes + s.byte_begin;
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    from.x[m] = job.x + (m0 + m) * job.x_stride_bytes + s.x_begin_bytes;
    from.starts[m] = job.starts + (m0 + m) * job.start_stride + s.block_begin * kLanes;
  }
  alignas(64) float scales[kScaleChunk + 16], middles[kScaleChunk + 16], products[kM][kScaleChunk + 16];
  int64_t block = 0;
  for (int64_t g = 0; g < s.group_count; g += kScaleChunk) {
    const int64_t count = min_i64(kScaleChunk, s.group_count - g), padded = round_up(count, 16);
    load_scales(job, s, n, s.group_begin + g, count, scales, middles);
    for (int64_t i = count; i < padded; ++i) scales[i] = 0;
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const int64_t at = (m0 + m) * job.group_stride + s.group_begin + g;
      from.scales[m] = scales;
      if (by_group) {
        for (int64_t i = 0; i < count; ++i) products[m][i] = scales[i] * job.group_scales[at + i];
        for (int64_t i = count; i < padded; ++i) products[m][i] = 0;
        from.scales[m] = products[m];
      }
      if (job.has_offset) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
          total[m] = V::fma(V::load_f(middles + i), V::load_f(job.sums + at + i), total[m]);
        float rest = 0;
        for (; i < count; ++i) rest += middles[i] * job.sums[at + i];
        total[m] = V::add(total[m], V::first_lane(rest));
      }
    }
    const int64_t units = ceil_div(count, groups_a_unit), whole_units = min_i64(units, (whole - block) / unit_blocks);
    if (groups_a_unit > 1) rowdot_units<kBits, kM, 1, false>(from, block, whole_units, 1, groups_a_unit, 0, total);
    else if (unit_blocks == 1) rowdot_units<kBits, kM, 1, true>(from, block, whole_units, 1, 1, 0, total);
    else if (kM == 1 && unit_blocks == 2) rowdot_units<kBits, kM, 2, true>(from, block, whole_units, 2, 1, 0, total);
    else if (kM == 1 && unit_blocks == 4) rowdot_units<kBits, kM, 4, true>(from, block, whole_units, 4, 1, 0, total);
    else rowdot_units<kBits, kM, 0, true>(from, block, whole_units, unit_blocks, 1, 0, total);
    block += whole_units * unit_blocks;
    if (whole_units < units) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) from.scales[m] += whole_units * groups_a_unit;
      rowdot_last_unit<kBits, kM>(from, block, whole - block, groups_a_unit, part, total);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) total_at[m] = total[m];
}

template <int kM>
void rowdot_rows(const LinearA8Job& job, int64_t n_begin, int64_t n_end, int64_t m0) {
  const LinearA8Params& p = job.p;
  for (int64_t n = n_begin; n < n_end; ++n) {
    F total[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) total[m] = V::zero_f();
    for (int i = 0; i < job.segment_count; ++i) {
      const LinearA8Segment& s = job.segments[i];
      if (s.bits == 8) rowdot_segment<8, kM>(job, s, n, m0, total);
      else if (s.bits == 4) rowdot_segment<4, kM>(job, s, n, m0, total);
      else if (s.bits == 2) rowdot_segment<2, kM>(job, s, n, m0, total);
      else rowdot_segment<1, kM>(job, s, n, m0, total);
    }
    float bias = 0;
    if (p.bias != nullptr) bias = load_float(p.bias, p.dtype, n);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
      store_float(p.y, p.dtype, (m0 + m) * p.y_stride + n, V::sum(total[m]) * job.row_scales[m0 + m] + bias);
  }
}

// A few rows of weight at a time, so that they are still in the first-level cache for the next four rows of x.
void rowdot(const LinearA8Job& job, int64_t n_begin, int64_t n_end) {
  const int64_t step = job.p.m <= 4 ? n_end - n_begin : 4;
  for (int64_t n = n_begin; n < n_end; n += step) {
    const int64_t end = min_i64(n + step, n_end);
    int64_t m = 0;
    for (; m + 4 <= job.p.m; m += 4) rowdot_rows<4>(job, n, end, m);
    for (; m + 2 <= job.p.m; m += 2) rowdot_rows<2>(job, n, end, m);
    if (m < job.p.m) rowdot_rows<1>(job, n, end, m);
  }
}

// ---- panel: decode and transpose a strip of weight rows once, then a dense tile over x ---------------------------------

constexpr int kMr = 4, kNr = V::kNr, kStrip = kNr * kLanes;
constexpr int64_t kBlockK = V::kBlockK, kBlockM = V::kBlockM, kBlockGroups = 128;

void prepare_panel_rows(const LinearA8Job& job, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) quantize_row(job, m);
  for (int64_t tile = m_begin / kMr; tile * kMr < m_end; ++tile)
    for (int r = 0; r < kMr; ++r) {
      const int64_t m = tile * kMr + r;
      int8_t* x = job.x + tile * job.x_stride_bytes + r * 4;
      for (int i = 0; i < job.segment_count; ++i) {
        const LinearA8Segment& s = job.segments[i];
        for (int64_t g = s.group_begin; g < s.group_begin + s.group_count; ++g) {
          const int64_t begin = g * job.group_size, count = min_i64(job.group_size, job.p.w.k - begin);
          int8_t* to = x + g * job.padded_group_size * kMr;
          const int64_t index = group_index(job, m, g);
          if (m >= job.p.m) {
            for (int64_t j = 0; j < job.padded_group_size; j += 4) store_dword(to + j * kMr, 0);
            job.starts[index] = 0;
            job.sums[index] = 0;
            job.group_scales[index] = 0;
            continue;
          }
          const int8_t* from = job.columns + m * job.column_stride + begin;
          int64_t j = 0;
          for (; j + 4 <= count; j += 4) store_dword(to + j * kMr, load_dword(from + j));
          if (j < count) {
            int8_t last[4] = {};
            for (int64_t b = j; b < count; ++b) last[b - j] = from[b];
            store_dword(to + j * kMr, load_dword(last));
          }
          job.starts[index] = V::kCentersBytes && s.bits == 8 ? 0 : -s.middle * sum_columns(from, count);
        }
      }
    }
}

// `units` runs of 8 codes, to bytes. Reads [p, end) only; what lies beyond is 0. pdep spreads 8 codes of any width a cycle.
template <int kBits>
SB_INLINE void decode(const uint8_t* p, const uint8_t* end, int64_t units, uint8_t* out) {
  constexpr uint64_t kMask = 0x0101010101010101ull * ((1u << kBits) - 1u);
  int64_t u = 0;
  if constexpr (kBits == 4) {
    for (; u + 4 <= units && end - p >= 16; u += 4, p += 16) {
      const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m256i c = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * 8), c);
    }
  } else if constexpr (kBits == 2) {
    for (; u + 4 <= units && end - p >= 8; u += 4, p += 8) {
      __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      v = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
      v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi8(3));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * 8), v);
    }
  } else if constexpr (kBits == 1) {
    const __m256i spread =
        _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
    for (; u + 4 <= units && end - p >= 4; u += 4, p += 4) {
      __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(load_dword(p)), spread);
      v = _mm256_min_epu8(_mm256_and_si256(v, bit), _mm256_set1_epi8(1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * 8), v);
    }
  }
  for (; u < units && end - p >= 8; ++u, p += kBits) {
    uint64_t v;
    __builtin_memcpy(&v, p, 8);
    if (kBits != 8) v = _pdep_u64(v, kMask);
    __builtin_memcpy(out + u * 8, &v, 8);
  }
  for (; u < units; ++u, p += kBits) {
    uint64_t v = 0;
    for (int i = 0; i < kBits && end - p > i; ++i) v |= uint64_t(p[i]) << (8 * i);
    if (kBits != 8) v = _pdep_u64(v, kMask);
    __builtin_memcpy(out + u * 8, &v, 8);
  }
}

void decode_row(const LinearA8Segment& s, const uint8_t* row, int64_t unit, int64_t units, uint8_t* out) {
  const uint8_t *p = row + unit * s.bits, *end = row + s.byte_count;
  switch (s.bits) {
    case 1: return decode<1>(p, end, units, out);
    case 2: return decode<2>(p, end, units, out);
    case 3: return decode<3>(p, end, units, out);
    case 4: return decode<4>(p, end, units, out);
    case 5: return decode<5>(p, end, units, out);
    case 6: return decode<6>(p, end, units, out);
    case 7: return decode<7>(p, end, units, out);
    default: break;
  }
  decode<8>(p, end, units, out);
  if (V::kCentersBytes) {
    int64_t i = 0;
    for (; i + 32 <= units * 8; i += 32) {
      __m256i* at = reinterpret_cast<__m256i*>(out + i);
      _mm256_storeu_si256(at, _mm256_xor_si256(_mm256_loadu_si256(at), _mm256_set1_epi8(-128)));
    }
    for (; i < units * 8; ++i) out[i] ^= 0x80;
  }
}

// Columns of one K block: `groups` whole groups, or a part of one.
struct Block {
  int64_t k = 0, count = 0;        // columns, from the segment's first
  int64_t group = 0, groups = 0;   // from the segment's first
  int64_t padded_k = 0;            // first column in the padded order of x
  bool first = true, last = true;  // holds the begin, the end of its (last) group
};

SB_INLINE Block next_block(const LinearA8Job& job, const LinearA8Segment& s, int64_t k) {
  Block b;
  b.k = k;
  b.group = k / job.group_size;
  const int64_t in_group = k - b.group * job.group_size;
  b.padded_k = (s.group_begin + b.group) * job.padded_group_size + in_group;
  if (job.padded_group_size > kBlockK) {
    const int64_t left = min_i64(job.group_size - in_group, s.k_count - k);
    b.groups = 1;
    b.count = min_i64(kBlockK, left);
    b.first = in_group == 0;
    b.last = b.count == left;
  } else {
    b.groups = min_i64(min_i64(kBlockK / job.padded_group_size, kBlockGroups), s.group_count - b.group);
    b.count = min_i64(b.groups * job.group_size, s.k_count - k);
  }
  return b;
}

struct Panel {
  alignas(64) uint8_t codes[kStrip * kBlockK];  // [k / 4][kNr][kLanes rows][4]
  alignas(64) float scales[kBlockGroups * kStrip], middles[kBlockGroups * kStrip];
};

void build_panel(const LinearA8Job& job, const LinearA8Segment& s, const Block& b, int64_t n0, Panel& panel) {
  // Row buffers lie a little more than a power of two apart, or they would share one set of the cache.
  constexpr int64_t kStride = kBlockK + 128, kScaleStride = kBlockGroups + 16;
  alignas(64) uint8_t rows[kLanes * kStride];
  alignas(64) uint8_t raw[kBlockK + 64];
  alignas(64) float scale_rows[2][kLanes * kScaleStride];
  const PackedMatrix& w = job.p.w;
  const int64_t unit = b.k / 8, skip = b.k % 8, units = ceil_div(skip + b.count, 8);
  const bool repack = job.padded_group_size != job.group_size && b.groups > 1;
  const int64_t padded =
      b.groups > 1 ? (b.groups - 1) * job.padded_group_size + b.count - (b.groups - 1) * job.group_size : b.count;
  for (int v = 0; v < kNr; ++v) {
    for (int l = 0; l < kLanes; ++l) {
      const int64_t n = min_i64(n0 + v * kLanes + l, w.n - 1);
      uint8_t* to = rows + l * kStride;
      decode_row(s, w.codes + n * w.layout.row_bytes + s.byte_begin, unit, units, repack ? raw : to);
      if (repack)
        for (int64_t g = 0; g < b.groups; ++g)
          __builtin_memcpy(to + g * job.padded_group_size, raw + skip + g * job.group_size,
                           size_t(min_i64(job.group_size, b.count - g * job.group_size)));
      if (b.last)
        load_scales(job, s, n, s.group_begin + b.group, b.groups, scale_rows[0] + l * kScaleStride,
                    scale_rows[1] + l * kScaleStride);
    }
    const uint8_t* from = rows + (repack ? 0 : skip);
    for (int64_t j = 0; j * 4 < padded; j += kLanes)
      V::transpose(from + j * 4, kStride, panel.codes + (j * kNr + v) * kBytes, kNr * kBytes);
    if (!b.last) continue;
    for (int i = 0; i < (job.has_offset ? 2 : 1); ++i)
      for (int64_t g = 0; g < b.groups; g += kLanes)
        V::transpose(reinterpret_cast<const uint8_t*>(scale_rows[i] + g), kScaleStride * 4,
                     reinterpret_cast<uint8_t*>((i == 0 ? panel.scales : panel.middles) + g * kStrip + v * kLanes), kStrip * 4);
  }
}

enum class Product { kDirect, kPairs16, kCentered };

// acc[m][v] += products of `steps` runs of 4 columns. `run`: steps whose pairs fit int16 (kPairs16).
template <Product kProduct, int kM>
SB_INLINE void tile_dots(const uint8_t* w, const int8_t* x, int64_t steps, int64_t run, I (&acc)[kM][kNr]) {
  if constexpr (kProduct == Product::kPairs16) {
    for (int64_t k = 0; k < steps; k += run) {
      const int64_t count = min_i64(run, steps - k);
      I sum[kM][kNr];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kNr; ++v) sum[m][v] = V::zero();
      for (int64_t i = 0; i < count; ++i, w += kNr * kBytes, x += kMr * 4) {
        I c[kNr];
#pragma GCC unroll 8
        for (int v = 0; v < kNr; ++v) c[v] = V::load(w + v * kBytes);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const I xm = V::set1_i32(load_dword(x + m * 4));
#pragma GCC unroll 8
          for (int v = 0; v < kNr; ++v) sum[m][v] = V::add_i16(sum[m][v], V::pairs(c[v], xm));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kNr; ++v) acc[m][v] = V::add_i32(acc[m][v], V::widen_pairs(sum[m][v]));
    }
  } else {
    for (int64_t i = 0; i < steps; ++i, w += kNr * kBytes, x += kMr * 4) {
      I c[kNr];
#pragma GCC unroll 8
      for (int v = 0; v < kNr; ++v) c[v] = V::load(w + v * kBytes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const I xm = V::set1_i32(load_dword(x + m * 4));
#pragma GCC unroll 8
        for (int v = 0; v < kNr; ++v) {
          if constexpr (kProduct == Product::kDirect) V::dot(acc[m][v], c[v], xm);
          else acc[m][v] = V::add_i32(acc[m][v], V::widen_pairs(V::pairs(V::abs_i8(c[v]), V::apply_sign(xm, c[v]))));
        }
      }
    }
  }
}

// What one tile of kM rows of x reads and writes beside codes.
struct TileState {
  const int32_t* starts;  // [group][kMr]
  const float *sums, *group_scales;
  int32_t* partial;  // [kMr][kStrip]: sums of a group that goes on in the next block
  float* total;      // [kMr][kStrip]
  bool by_group, has_offset;
};

// One tile over all groups of a block.
template <Product kProduct, int kM>
[[gnu::noinline]] void tile(const LinearA8Job& job, const Block& b, const Panel& panel, const int8_t* x, const TileState& t,
                            int64_t run) {
  const uint8_t* w = panel.codes;
  for (int64_t g = 0; g < b.groups; ++g) {
    const int64_t count = b.groups == 1 ? b.count : min_i64(job.group_size, b.count - g * job.group_size);
    const int64_t steps = ceil_div(count, 4);
    I acc[kM][kNr];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const I start = V::set1_i32(b.first ? t.starts[g * kMr + m] : 0);
#pragma GCC unroll 8
      for (int v = 0; v < kNr; ++v) acc[m][v] = b.first ? start : V::load(t.partial + m * kStrip + v * kLanes);
    }
    tile_dots<kProduct, kM>(w, x, steps, run, acc);
    w += steps * kNr * kBytes;
    x += steps * kMr * 4;
    if (!b.last) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kNr; ++v) V::store(t.partial + m * kStrip + v * kLanes, acc[m][v]);
      return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kNr; ++v) {
      const F s = V::load_f(panel.scales + g * kStrip + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        float* at = t.total + m * kStrip + v * kLanes;
        F f = V::load_f(at);
        const F scale = t.by_group ? V::mul(s, V::set1_f(t.group_scales[g * kMr + m])) : s;
        f = V::fma(V::to_float(acc[m][v]), scale, f);
        if (t.has_offset) f = V::fma(V::load_f(panel.middles + g * kStrip + v * kLanes), V::set1_f(t.sums[g * kMr + m]), f);
        V::store_f(at, f);
      }
    }
  }
}

template <Product kProduct>
SB_INLINE void tile_rows(const LinearA8Job& job, const Block& b, const Panel& panel, const int8_t* x, const TileState& t,
                         int64_t run, int64_t rows) {
  switch (rows) {
    case 1: return tile<kProduct, 1>(job, b, panel, x, t, run);
    case 2: return tile<kProduct, 2>(job, b, panel, x, t, run);
    case 3: return tile<kProduct, 3>(job, b, panel, x, t, run);
    default: return tile<kProduct, 4>(job, b, panel, x, t, run);
  }
}

void panel_strip(const LinearA8Job& job, int64_t n0, int64_t n_end) {
  const LinearA8Params& p = job.p;
  Panel panel;
  alignas(64) float total[kBlockM * kStrip];
  alignas(64) int32_t partial[kBlockM * kStrip];
  for (int64_t m0 = 0; m0 < p.m; m0 += kBlockM) {
    const int64_t m_end = min_i64(m0 + kBlockM, p.m), padded_rows = round_up(m_end - m0, kMr);
    for (int64_t i = 0; i < padded_rows * kStrip; i += kLanes) V::store_f(total + i, V::zero_f());
    for (int i = 0; i < job.segment_count; ++i) {
      const LinearA8Segment& s = job.segments[i];
      const int64_t run = s.bits <= 4 ? 32767 / (254 * ((1 << s.bits) - 1)) : 1;
      for (int64_t k = 0; k < s.k_count;) {
        const Block b = next_block(job, s, k);
        k += b.count;
        build_panel(job, s, b, n0, panel);
        for (int64_t m = m0; m < m_end; m += kMr) {
          const int64_t group = m / kMr * job.group_stride + (s.group_begin + b.group) * kMr, at = (m - m0) * kStrip;
          const TileState t = {job.starts + group, job.sums + group, job.group_scales + group,
                               partial + at,       total + at,       p.x_scale == ActivationScale::kRowGroup,
                               job.has_offset};
          const int8_t* x = job.x + m / kMr * job.x_stride_bytes + b.padded_k * kMr;
          const int64_t rows = m_end - m;
          if (V::kVnni || (s.bits > 4 && s.bits < 8)) tile_rows<Product::kDirect>(job, b, panel, x, t, run, rows);
          else if (s.bits <= 4) tile_rows<Product::kPairs16>(job, b, panel, x, t, run, rows);
          else tile_rows<Product::kCentered>(job, b, panel, x, t, run, rows);
        }
      }
    }
    const int64_t columns = min_i64(kStrip, n_end - n0);
    alignas(64) float bias[kStrip] = {};
    if (p.bias != nullptr) load_floats(p.bias, p.dtype, n0, columns, bias);
    for (int64_t m = m0; m < m_end; ++m) {
      const F scale = V::set1_f(job.row_scales[m]);
      for (int64_t c = 0; c < columns; c += kLanes)
        store_floats(p.y, p.dtype, m * p.y_stride + n0 + c, min_i64(kLanes, columns - c),
                     V::add(V::mul(V::load_f(total + (m - m0) * kStrip + c), scale), V::load_f(bias + c)));
    }
  }
}
