// The arithmetic of packed_update.h, written once over a vector type V: one lane (reference, CUDA) or a register of an
// instruction set. One text and one rounding an operation are what gives the same bits everywhere. Everything has internal
// linkage.
#pragma once
#include <cmath>

#include "subbyte/base/philox.h"
#include "subbyte/ops/packed_update/packed_update.h"

namespace subbyte {
namespace {

// One lane: a float32 F or the 32-bit integer I of the same place (signed where that matters). The names are those of the
// vector types (UpdateVector of x86_<isa>.cc).
struct ScalarLane {
  using F = float;
  using I = uint32_t;
  using M = bool;
  SB_MEMBER_HD static F set(float v) { return v; }
  SB_MEMBER_HD static I bits(F a) { return std::bit_cast<uint32_t>(a); }
  SB_MEMBER_HD static F of_bits(I a) { return std::bit_cast<float>(a); }
#if defined(__CUDA_ARCH__)
  SB_MEMBER_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  SB_MEMBER_HD static F sub(F a, F b) { return __fsub_rn(a, b); }
  SB_MEMBER_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  SB_MEMBER_HD static F div(F a, F b) { return __fdiv_rn(a, b); }
  SB_MEMBER_HD static F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  SB_MEMBER_HD static F sqrt(F a) { return __fsqrt_rn(a); }
#else
  SB_MEMBER_HD static F add(F a, F b) { return a + b; }
  SB_MEMBER_HD static F sub(F a, F b) { return a - b; }
  SB_MEMBER_HD static F mul(F a, F b) { return a * b; }
  SB_MEMBER_HD static F div(F a, F b) { return a / b; }
  SB_MEMBER_HD static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  SB_MEMBER_HD static F sqrt(F a) { return sqrtf(a); }
#endif
  // a * b - c, rounded once.
  SB_MEMBER_HD static F fused_sub(F a, F b, F c) { return fma(a, b, -c); }
  SB_MEMBER_HD static F abs(F a) { return fabsf(a); }
  // A NaN in the first argument gives the second.
  SB_MEMBER_HD static F min(F a, F b) { return a < b ? a : b; }
  SB_MEMBER_HD static F max(F a, F b) { return a > b ? a : b; }
  SB_MEMBER_HD static M less(F a, F b) { return a < b; }
  SB_MEMBER_HD static F pick(M m, F a, F b) { return m ? a : b; }
  SB_MEMBER_HD static I pick_int(M m, I a, I b) { return m ? a : b; }
  // |magnitude| is not negative; the result has the sign bit of `sign`.
  SB_MEMBER_HD static F with_sign_of(F magnitude, F sign) { return copysignf(magnitude, sign); }

  SB_MEMBER_HD static I int_set(uint32_t v) { return v; }
  SB_MEMBER_HD static I int_add(I a, I b) { return a + b; }
  SB_MEMBER_HD static I int_sub(I a, I b) { return a - b; }
  SB_MEMBER_HD static I int_mul(I a, I b) { return a * b; }
  SB_MEMBER_HD static I int_and(I a, I b) { return a & b; }
  SB_MEMBER_HD static I int_or(I a, I b) { return a | b; }
  SB_MEMBER_HD static I int_xor(I a, I b) { return a ^ b; }
  SB_MEMBER_HD static I int_min(I a, I b) { return int32_t(a) < int32_t(b) ? a : b; }
  SB_MEMBER_HD static I int_max(I a, I b) { return int32_t(a) > int32_t(b) ? a : b; }
  template <int kBits>
  SB_MEMBER_HD static I left(I a) {
    return a << kBits;
  }
  template <int kBits>
  SB_MEMBER_HD static I right(I a) {
    return a >> kBits;
  }
  SB_MEMBER_HD static F to_float(I a) { return float(int32_t(a)); }
  // Nearest integer, ties to even, of a > -2^22; 2^17 and everything above may come out as any number that is 2^17 or more, or
  // as the smallest.
  SB_MEMBER_HD static I to_int(F a) { return bits(add(min(a, 0x1p17f), 0x1.8p23f)) - 0x4B400000u; }
};

constexpr float kTooLarge = 0x1p63f;  // squares of what is below are finite
constexpr float kSmallestDivisor =
    0x1p-120f;  // below, scales and absmax count as 0: their inverses would lose bits or overflow

// |a| <= limit.
SB_HD float bounded(float a, float limit) { return ScalarLane::max(ScalarLane::min(a, limit), -limit); }

// What a step needs of the numbers, in float32. Formed in double where a difference to 1 is wanted.
struct UpdateNumbers {
  bool nesterov;
  float factor, rate, decay, inverse_root, eps, threshold;
  float fresh1, fresh2;  // 1 - beta1, 1 - beta2
  float momentum, undamped, weight_decay;
  uint64_t offset;

  SB_MEMBER_HD void set_rates(UpdateRule rule, float lr, float correction1, float correction2) {
    rate = lr;
    decay = rule == UpdateRule::kSgd ? 0.0f : bounded(ScalarLane::mul(lr, weight_decay), 0x1p20f);
    if (rule != UpdateRule::kAdamW) return;
    rate = ScalarLane::div(lr, correction1);
    inverse_root = bounded(ScalarLane::div(1.0f, ScalarLane::sqrt(correction2)), 0x1p60f);
  }
};

// From the fields alone, and with what stands in memory (`numbers`, `grad_factor`, `counter`). The same numbers by either way.
SB_HD UpdateNumbers host_numbers(const PackedUpdateParams& p) {
  UpdateNumbers c{};
  const bool sgd = p.rule == UpdateRule::kSgd, none = p.m.type == MomentType::kNone;
  c.nesterov = p.nesterov;
  c.factor = p.maximize ? -1.0f : 1.0f;
  c.weight_decay = float(p.weight_decay);
  c.set_rates(p.rule, float(p.lr), float(p.bias_correction1), float(p.bias_correction2));
  c.eps = ScalarLane::max(float(p.eps), 0x1p-60f);
  c.threshold = float(p.threshold);
  c.fresh1 = none ? 1.0f : float(1.0 - p.beta1);
  c.fresh2 = none ? 1.0f : float(1.0 - p.beta2);
  c.momentum = float(p.momentum);
  c.undamped = sgd && none ? 1.0f : float(1.0 - p.dampening);
  c.offset = p.offset;
  return c;
}

SB_HD UpdateNumbers update_numbers(const PackedUpdateParams& p, UpdateNumbers c) {
  if (p.grad_factor != nullptr) c.factor = c.factor < 0.0f ? -*p.grad_factor : *p.grad_factor;
  if (p.numbers != nullptr) c.set_rates(p.rule, p.numbers[0], p.numbers[1], p.numbers[2]);
  if (p.counter != nullptr) c.offset += uint64_t(*p.counter);
  return c;
}

// ---- random words

constexpr uint32_t kColumnStep = 0x9E3779B9u, kMix1 = 0x7FEB352Du, kMix2 = 0x846CA68Bu, kMixM = 0x9E3779B1u,
                   kMixV = 0x85EBCA77u;

struct BlockKey {
  uint32_t first, second;
};

SB_HD constexpr uint64_t step_key(uint64_t seed, uint64_t offset) {
  const Philox4 words = philox4x32(seed, offset, 0);
  return uint64_t(words.v[1]) << 32 | words.v[0];
}

// Number `block` of the SplitMix64 sequence that starts at `key`.
SB_HD constexpr BlockKey block_key(uint64_t key, uint64_t block) {
  uint64_t z = key + (block + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {uint32_t(z), uint32_t(z >> 32)};
}

// `counter` = key.first + column * kColumnStep.
template <class V>
SB_HD typename V::I random_words(typename V::I counter, typename V::I second) {
  using I = typename V::I;
  const I x = V::int_mul(V::int_xor(counter, V::template right<16>(counter)), V::int_set(kMix1));
  return V::int_mul(V::int_xor(V::int_xor(x, V::template right<15>(x)), second), V::int_set(kMix2));
}

SB_HD uint32_t random_word(BlockKey key, uint32_t column) {
  return random_words<ScalarLane>(key.first + column * kColumnStep, key.second);
}

// What is added to d before it is rounded: inside (-1/2, 1/2), so that d = -1, 0 and 1 are rounded to themselves.
constexpr float kDither = 0x1.fffff8p-33f;

// ---- one step

// What a step needs of a group (V = ScalarLane) or of as many groups as V has lanes: the grid of the codes with their residual.
// A frozen group has rate, decay and pull 0.
template <class V>
struct GroupStep {
  typename V::F rate, decay, pull;  // d = rate r + (decay q + pull)
  typename V::F zero, shrink;       // sgd: weight_decay w = shrink (q - zero)
};

template <class V>
SB_HD typename V::F bounded_lanes(typename V::F a, float limit) {
  return V::max(V::min(a, V::set(limit)), V::set(-limit));
}

template <class V>
SB_HD GroupStep<V> group_step(typename V::F scale, typename V::F zero, ZeroKind kind, int residual_bits,
                              const UpdateNumbers& c) {
  using F = typename V::F;
  const float span = float(1 << residual_bits), by_span = 1.0f / span;
  const F none = V::set(0.0f), inverse = V::div(V::set(1.0f), scale);
  const F coarse = kind == ZeroKind::kOffsets ? V::sub(none, V::mul(zero, inverse)) : zero;
  const F fine = bounded_lanes<V>(V::add(V::mul(coarse, V::set(span)), V::set((span - 1.0f) * 0.5f)), 0x1p100f);
  const F rate = bounded_lanes<V>(V::mul(V::set(c.rate), V::mul(inverse, V::set(span))), 0x1p100f);
  const F shrink = bounded_lanes<V>(V::mul(V::set(c.weight_decay), V::mul(scale, V::set(by_span))), 0x1p100f);
  const F decay = V::set(c.decay), pull = V::sub(none, V::mul(decay, fine));
  // A NaN is not less than anything.
  const typename V::M small = V::less(V::abs(scale), V::set(kSmallestDivisor)), fits = V::less(V::abs(scale), V::set(0x1p120f));
  const auto live = [&](F a) { return V::pick(fits, V::pick(small, none, a), none); };
  return {live(rate), live(decay), live(pull), live(fine), live(shrink)};
}

// One element's (or register's) step. Values before, then after.
template <class V>
struct Element {
  typename V::F m, v;
  typename V::I q;
};

// The first half: m and v after, and what r is made of: v for adamw, r itself for the others. g: the gradient times factor.
template <class V>
struct Averages {
  typename V::F m, v, r;
};

template <UpdateRule kRule, class V>
SB_HD Averages<V> averaged(const UpdateNumbers& c, const GroupStep<V>& group, typename V::F g, const Element<V>& e) {
  using F = typename V::F;
  if constexpr (kRule == UpdateRule::kAdamW) {
    const F v = V::fma(V::set(c.fresh2), V::fused_sub(g, g, e.v), e.v);
    return {V::fma(V::set(c.fresh1), V::sub(g, e.m), e.m), v, v};
  } else if constexpr (kRule == UpdateRule::kSign) {
    const F change = V::sub(g, e.m), mixed = V::fma(V::set(c.fresh1), change, e.m);
    const F r = V::pick(V::less(V::set(c.threshold), V::abs(mixed)), V::with_sign_of(V::set(1.0f), mixed), V::set(0.0f));
    return {V::fma(V::set(c.fresh2), change, e.m), e.v, r};
  } else {
    const F decayed = V::fma(group.shrink, V::sub(V::to_float(e.q), group.zero), g);
    const F m = V::fma(V::set(c.momentum), e.m, V::mul(V::set(c.undamped), decayed));
    return {m, e.v, c.nesterov ? V::fma(V::set(c.momentum), m, decayed) : m};
  }
}

// Of numbers that are not negative; integers are compared on more ports than floats.
template <class V>
SB_HD typename V::F larger_positive(typename V::F a, typename V::F b) {
  return V::of_bits(V::int_max(V::bits(a), V::bits(b)));
}

// adamw's r.
template <class V>
SB_HD typename V::F divisor(const UpdateNumbers& c, typename V::F root) {
  return V::fma(root, V::set(c.inverse_root), V::set(c.eps));
}
template <class V>
SB_HD typename V::F root_argument(typename V::F v) {
  return larger_positive<V>(v, V::set(0x1p-100f));
}

// The second half: the code after, not yet brought into 0 .. top.
template <class V>
SB_HD typename V::I moved_by(const GroupStep<V>& group, typename V::F r, typename V::I q, typename V::I word) {
  using F = typename V::F;
  const F d = V::fma(group.rate, r, V::fma(group.decay, V::to_float(q), group.pull));
  const F shaken = V::max(V::fma(V::to_float(word), V::set(kDither), d), V::set(-0x1p17f));
  return V::int_sub(q, V::to_int(shaken));
}

template <UpdateRule kRule, class V>
SB_HD typename V::I moved(const UpdateNumbers& c, const GroupStep<V>& group, typename V::F m, typename V::F r, typename V::I q,
                          typename V::I word) {
  if constexpr (kRule == UpdateRule::kAdamW) r = V::div(m, divisor<V>(c, V::sqrt(root_argument<V>(r))));
  return moved_by<V>(group, r, q, word);
}

template <class V>
SB_HD typename V::I inside(typename V::I q, uint32_t top) {
  return V::int_min(V::int_max(q, V::int_set(0)), V::int_set(top));
}

template <UpdateRule kRule, class V>
SB_HD Element<V> stepped(const UpdateNumbers& c, const GroupStep<V>& group, uint32_t top, typename V::F g, const Element<V>& e,
                         typename V::I word) {
  const Averages<V> a = averaged<kRule, V>(c, group, g, e);
  return {a.m, a.v, inside<V>(moved<kRule, V>(c, group, a.m, a.r, e.q, word), top)};
}

template <class V>
SB_HD typename V::M usable(typename V::F g) {
  return V::less(V::abs(g), V::set(kTooLarge));
}

// `after` where the gradient is usable, else `before`.
template <class V>
SB_HD Element<V> kept_unless(typename V::M m, const Element<V>& after, const Element<V>& before) {
  return {V::pick(m, after.m, before.m), V::pick(m, after.v, before.v), V::pick_int(m, after.q, before.q)};
}

// ---- moments in 16 bits: bits + noise, of which the upper half is kept

template <class V>
SB_HD typename V::I noisy_bf16(bool is_signed, typename V::F value, typename V::I word) {
  return V::int_add(V::bits(value), V::template right<16>(V::int_mul(word, V::int_set(is_signed ? kMixM : kMixV))));
}

// ---- blockwise moments: t = z + c of z = |value| / absmax in 0 .. 1, c = 2^-kRange, whose float32 bits grow by 2^kShift a
// code

template <MomentType kType, bool kSigned>
struct MomentCode {
  static constexpr int kBits = kType == MomentType::kQ8 ? 8 : 4;
  static constexpr int kMantissa = kType == MomentType::kQ8 ? 3 : 0, kShift = 23 - kMantissa;
  static constexpr int kMagnitudeBits = kBits - (kSigned ? 1 : 0);
  static constexpr int kRange = (1 << (kMagnitudeBits - kMantissa)) - 1;
  static constexpr uint32_t kBase = uint32_t(127 - kRange) << 23, kMask = (1u << kMagnitudeBits) - 1u;
  static constexpr float kStart = 1.0f / float(uint64_t(1) << kRange);
  // The code of c is 0, so that the code is the low bits of what the shift leaves.
  static_assert(((kBase >> kShift) & kMask) == 0);
};

// What a block of codes means and how values become codes: value = t unit + origin; t = value up + c.
struct MomentGrid {
  float unit, origin, up;
};
// absmax as it is stored.
SB_HD float stored_absmax(float absmax) { return absmax < kSmallestDivisor ? 0.0f : absmax; }
template <class Code>
SB_HD MomentGrid moment_grid(float absmax) {
  // A little less than 1 - c at the top: t stays below 1, whose code is the largest, whatever the roundings.
  constexpr float kTop = (1.0f - Code::kStart) * (1.0f - 0x1p-20f), kInverseTop = 1.0f / (1.0f - Code::kStart);
  const float unit = ScalarLane::mul(absmax, kInverseTop);
  return {unit, -ScalarLane::mul(unit, Code::kStart),
          absmax == 0.0f ? 0.0f : ScalarLane::mul(ScalarLane::div(1.0f, absmax), kTop)};
}

// From the code in the upper bits of the word (signed) or in the lower ones (unsigned), where loads have it cheaply.
template <class Code, class V>
SB_HD typename V::F signed_value(const MomentGrid& grid, typename V::I upper) {
  using I = typename V::I;
  const I magnitude =
      V::int_and(V::template right<32 - Code::kBits - Code::kShift>(upper), V::int_set(Code::kMask << Code::kShift));
  const typename V::F t = V::of_bits(V::int_or(magnitude, V::int_set(Code::kBase)));
  return V::of_bits(
      V::int_xor(V::bits(V::fma(t, V::set(grid.unit), V::set(grid.origin))), V::int_and(upper, V::int_set(0x80000000u))));
}
template <class Code, class V>
SB_HD typename V::F unsigned_value(const MomentGrid& grid, typename V::I code) {
  const typename V::F t = V::of_bits(V::int_or(V::template left<Code::kShift>(code), V::int_set(Code::kBase)));
  return V::fma(t, V::set(grid.unit), V::set(grid.origin));
}

// The word whose bits from kShift on are the magnitude's code (kMask).
template <class Code, class V>
SB_HD typename V::I noisy_magnitude(const MomentGrid& grid, typename V::F m, typename V::I word) {
  const typename V::I noise = V::template right<32 - Code::kShift>(V::int_mul(word, V::int_set(kMixM)));
  return V::int_add(V::bits(V::fma(V::abs(m), V::set(grid.up), V::set(Code::kStart))), noise);
}
template <class Code, class V>
SB_HD typename V::I noisy_square(const MomentGrid& grid, typename V::F v, typename V::I word) {
  constexpr float kFirst = Code::kStart * (1.0f + 1.0f / float(1 << Code::kMantissa));  // code 1
  const typename V::I noise = V::template right<32 - Code::kShift>(V::int_mul(word, V::int_set(kMixV)));
  return V::int_add(V::bits(larger_positive<V>(V::fma(v, V::set(grid.up), V::set(Code::kStart)), V::set(kFirst))), noise);
}

// ---- one row, one element at a time: the definition

template <bool kSigned>
SB_HD float moment_value(const MomentView& moment, int64_t row_bytes, int64_t n, int64_t k, int64_t blocks) {
  using V = ScalarLane;
  const uint8_t* row = static_cast<const uint8_t*>(moment.data) + n * row_bytes;
  switch (moment.type) {
    case MomentType::kF32: return reinterpret_cast<const float*>(row)[k];
    case MomentType::kBF16: return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[k]);
    case MomentType::kQ8: {
      using Code = MomentCode<MomentType::kQ8, kSigned>;
      const MomentGrid grid = moment_grid<Code>(moment.absmax[n * blocks + k / kMomentBlock]);
      if constexpr (kSigned) return signed_value<Code, V>(grid, uint32_t(row[k]) << 24);
      else return unsigned_value<Code, V>(grid, row[k]);
    }
    case MomentType::kQ4: {
      using Code = MomentCode<MomentType::kQ4, kSigned>;
      const MomentGrid grid = moment_grid<Code>(moment.absmax[n * blocks + k / kMomentBlock]);
      if constexpr (kSigned) return signed_value<Code, V>(grid, get_code(row, k, 4) << 28);
      else return unsigned_value<Code, V>(grid, get_code(row, k, 4));
    }
    default: return 0.0f;
  }
}

template <class Code>
SB_HD uint32_t signed_code(float absmax, float m, uint32_t word) {
  const uint32_t magnitude =
      noisy_magnitude<Code, ScalarLane>(moment_grid<Code>(absmax), m, word) >> Code::kShift & Code::kMask;
  return std::bit_cast<uint32_t>(m) >> 31 << Code::kMagnitudeBits | magnitude;
}
template <class Code>
SB_HD uint32_t unsigned_code(float absmax, float v, uint32_t word) {
  return noisy_square<Code, ScalarLane>(moment_grid<Code>(absmax), v, word) >> Code::kShift & Code::kMask;
}

template <bool kSigned>
SB_HD void store_moment(const MomentView& moment, int64_t row_bytes, int64_t n, int64_t k, float absmax, float value,
                        uint32_t word) {
  uint8_t* row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  switch (moment.type) {
    case MomentType::kF32: reinterpret_cast<float*>(row)[k] = value; break;
    case MomentType::kBF16:
      reinterpret_cast<uint16_t*>(row)[k] = uint16_t(noisy_bf16<ScalarLane>(kSigned, value, word) >> 16);
      break;
    case MomentType::kQ8: {
      using Code = MomentCode<MomentType::kQ8, kSigned>;
      if constexpr (kSigned) row[k] = uint8_t(signed_code<Code>(absmax, value, word));
      else row[k] = uint8_t(unsigned_code<Code>(absmax, value, word));
      break;
    }
    case MomentType::kQ4: {
      using Code = MomentCode<MomentType::kQ4, kSigned>;
      if constexpr (kSigned) set_code(row, k, 4, signed_code<Code>(absmax, value, word));
      else set_code(row, k, 4, unsigned_code<Code>(absmax, value, word));
      break;
    }
    default: break;
  }
}

// Spare bits of a stream's last byte are zero.
SB_HD void clear_spare_bits(uint8_t* stream, int64_t count, int bits) {
  const int used = int(count % 8) * bits % 8;
  if (used != 0) stream[stream_bytes(count, bits) - 1] &= uint8_t((1u << used) - 1u);
}

SB_HD float largest(float a, float b) { return a > b ? a : b; }

template <UpdateRule kRule>
SB_HD void update_row_as(const PackedUpdateParams& p, const UpdateNumbers& c, uint64_t key, int64_t n) {
  using V = ScalarLane;
  const PackedMatrix& w = p.w;
  const int64_t blocks = ceil_div(w.k, kMomentBlock), groups = w.groups();
  const int64_t m_bytes = moment_row_bytes(p.m.type, w.k), v_bytes = moment_row_bytes(p.v.type, w.k);
  uint8_t* const row = p.codes + n * w.layout.row_bytes;
  uint8_t* const residual = p.residual + n * stream_bytes(w.k, p.residual_bits);
  float ms[kMomentBlock], vs[kMomentBlock];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kMomentBlock, count = min_i64(kMomentBlock, w.k - begin);
    const BlockKey words = block_key(key, (p.first_row + uint64_t(n)) * uint64_t(blocks) + uint64_t(block));
    float m_max = 0, v_max = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = begin + j, i = n * groups + k / w.group_size, from = w.perm != nullptr ? w.perm[k] : k;
      const Segment& s = segment_of(w.layout, k);
      const int bits = format_bits(s.format);
      const GroupStep<V> group =
          group_step<V>(load_float(w.scales, w.scale_dtype, i), group_zero(w, s.format, i), w.zero_kind, p.residual_bits, c);
      const bool reachable = from >= 0 && from < w.k;  // a device cannot refuse such a perm
      const float grad = reachable ? load_float(p.grad, p.grad_dtype, n * p.grad_stride + from) : __builtin_nanf("");
      uint32_t code = get_code(row + s.byte_begin, k - s.k_begin, bits);
      if (p.residual_bits > 0) code = code << p.residual_bits | get_code(residual, k, p.residual_bits);
      const Element<V> before{moment_value<true>(p.m, m_bytes, n, k, blocks), moment_value<false>(p.v, v_bytes, n, k, blocks),
                              code};
      const uint32_t top = uint32_t(format_levels(s.format) << p.residual_bits) - 1u;
      const float g = V::mul(grad, c.factor);
      const Element<V> e =
          kept_unless<V>(usable<V>(g), stepped<kRule, V>(c, group, top, g, before, random_word(words, uint32_t(j))), before);
      set_code(row + s.byte_begin, k - s.k_begin, bits, e.q >> p.residual_bits);
      if (p.residual_bits > 0) set_code(residual, k, p.residual_bits, e.q & ((1u << p.residual_bits) - 1u));
      ms[j] = e.m;
      vs[j] = e.v;
      m_max = largest(V::abs(e.m), m_max);
      v_max = largest(e.v, v_max);
    }
    m_max = stored_absmax(m_max);
    v_max = stored_absmax(v_max);
    if (is_blockwise(p.m.type)) p.m.absmax[n * blocks + block] = m_max;
    if (is_blockwise(p.v.type)) p.v.absmax[n * blocks + block] = v_max;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t word = random_word(words, uint32_t(j));
      store_moment<true>(p.m, m_bytes, n, begin + j, m_max, ms[j], word);
      store_moment<false>(p.v, v_bytes, n, begin + j, v_max, vs[j], word);
    }
  }
  for (int i = 0; i < w.layout.segment_count; ++i) {
    const Segment& s = w.layout.segments[i];
    clear_spare_bits(row + s.byte_begin, s.k_count, format_bits(s.format));
  }
  if (p.residual_bits > 0) clear_spare_bits(residual, w.k, p.residual_bits);
  if (p.m.type == MomentType::kQ4) clear_spare_bits(static_cast<uint8_t*>(p.m.data) + n * m_bytes, w.k, 4);
  if (p.v.type == MomentType::kQ4) clear_spare_bits(static_cast<uint8_t*>(p.v.data) + n * v_bytes, w.k, 4);
}

// Row n from end to end. A device thread may run it: nothing is kept outside the row.
SB_HD void update_row(const PackedUpdateParams& p, const UpdateNumbers& c, uint64_t key, int64_t n) {
  switch (p.rule) {
    case UpdateRule::kAdamW: return update_row_as<UpdateRule::kAdamW>(p, c, key, n);
    case UpdateRule::kSign: return update_row_as<UpdateRule::kSign>(p, c, key, n);
    case UpdateRule::kSgd: return update_row_as<UpdateRule::kSgd>(p, c, key, n);
  }
}

}  // namespace
}  // namespace subbyte
