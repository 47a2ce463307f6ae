// The arithmetic of packed_update.h, written once over a vector type V: one lane (reference, CUDA) or a register of an
// instruction set. One text and one rounding an operation are what gives the same bits everywhere. Everything has internal
// linkage.
#pragma once
#include <cmath>

#include "subbyte/base/philox.h"
#include "subbyte/ops/packed_update/packed_update.h"

namespace subbyte {
namespace {

// One float32 lane. The names are those of the vector types (x86_<isa>_vector.h).
struct ScalarLane {
  using F = float;
  using M = bool;
  SB_MEMBER_HD static F set(float v) { return v; }
  SB_MEMBER_HD static F one_if_not_less(F a, F b) { return a >= b ? 1.0f : 0.0f; }
#if defined(__CUDA_ARCH__)
  SB_MEMBER_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  SB_MEMBER_HD static F sub(F a, F b) { return __fsub_rn(a, b); }
  SB_MEMBER_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  SB_MEMBER_HD static F div(F a, F b) { return __fdiv_rn(a, b); }
  SB_MEMBER_HD static F sqrt(F a) { return __fsqrt_rn(a); }
  // Within 2^-10 of the root of a >= 1/4; where only neighbours of the root are wanted.
  SB_MEMBER_HD static F rough_sqrt(F a) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a));
    return root;
  }
#else
  SB_MEMBER_HD static F add(F a, F b) { return a + b; }
  SB_MEMBER_HD static F sub(F a, F b) { return a - b; }
  SB_MEMBER_HD static F mul(F a, F b) { return a * b; }
  SB_MEMBER_HD static F div(F a, F b) { return a / b; }
  SB_MEMBER_HD static F sqrt(F a) { return sqrtf(a); }
  SB_MEMBER_HD static F rough_sqrt(F a) { return sqrtf(a); }
#endif
  SB_MEMBER_HD static F floor(F a) { return floorf(a); }
  SB_MEMBER_HD static F abs(F a) { return fabsf(a); }
  // A NaN in the first argument gives the second.
  SB_MEMBER_HD static F min(F a, F b) { return a < b ? a : b; }
  SB_MEMBER_HD static F max(F a, F b) { return a > b ? a : b; }
  SB_MEMBER_HD static M less(F a, F b) { return a < b; }
  SB_MEMBER_HD static F pick(M m, F a, F b) { return m ? a : b; }
  SB_MEMBER_HD static F one_if_less(F a, F b) { return a < b ? 1.0f : 0.0f; }
  // |magnitude| is not negative; the result has the sign bit of `sign`.
  SB_MEMBER_HD static F with_sign_of(F magnitude, F sign) { return copysignf(magnitude, sign); }
};

constexpr float kTooLarge = 0x1p63f;  // squares of what is below are finite
constexpr float kSmallestDivisor =
    0x1p-120f;  // below, scales and absmax count as 0: their inverses would lose bits or overflow
constexpr uint32_t kMixM = 0x9E3779B1u, kMixV = 0x85EBCA77u;

// What a step needs of the numbers, in float32. Formed in double where a difference to 1 is wanted.
struct UpdateNumbers {
  bool nesterov;
  float factor, rate, decay, inverse_root, eps, threshold;
  float keep2, fresh1, fresh2;  // adamw: beta2, 1 - beta1, 1 - beta2; sign: -, 1 - beta1, 1 - beta2
  float momentum, undamped, weight_decay;
  uint64_t offset;

  SB_MEMBER_HD void set_rates(UpdateRule rule, float lr, float correction1, float correction2) {
    rate = lr;
    decay = rule == UpdateRule::kSgd ? 0.0f : ScalarLane::mul(lr, weight_decay);
    if (rule != UpdateRule::kAdamW) return;
    rate = ScalarLane::div(lr, correction1);
    inverse_root = ScalarLane::div(1.0f, ScalarLane::sqrt(correction2));
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
  c.eps = float(p.eps);
  c.threshold = float(p.threshold);
  c.keep2 = float(p.beta2);
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

// What a step needs of a group: the grid of the codes with their residual.
struct GroupStep {
  bool frozen;
  float zero, scale, rate;
};

SB_HD GroupStep group_step(float scale, float zero, ZeroKind kind, int residual_bits, const UpdateNumbers& c) {
  using V = ScalarLane;
  if (!(V::abs(scale) >= kSmallestDivisor && V::abs(scale) < 0x1p120f)) return {true, 0.0f, 0.0f, 0.0f};
  const float span = float(1 << residual_bits), inverse = V::div(1.0f, scale);
  const float coarse = kind == ZeroKind::kOffsets ? -V::mul(zero, inverse) : zero;
  return {false, V::add(V::mul(coarse, span), (span - 1.0f) * 0.5f), V::div(scale, span),
          V::mul(c.rate, V::mul(inverse, span))};
}

// One element's (or register's) step. Values before, then after.
template <class V>
struct Element {
  typename V::F m, v, q;
};

template <UpdateRule kRule, class V>
SB_HD Element<V> stepped(const UpdateNumbers& c, const GroupStep& group, float top, typename V::F grad, Element<V> e,
                         typename V::F u) {
  using F = typename V::F;
  const F scaled = V::mul(grad, V::set(c.factor)), zero = V::set(0.0f);
  const typename V::M usable = V::less(V::abs(scaled), V::set(kTooLarge));
  const F g = V::pick(usable, scaled, zero);
  const F centred = V::sub(e.q, V::set(group.zero));
  F r;
  if constexpr (kRule == UpdateRule::kAdamW) {
    const F m = V::add(e.m, V::mul(V::set(c.fresh1), V::sub(g, e.m)));
    const F v = V::add(V::mul(V::set(c.keep2), e.v), V::mul(V::set(c.fresh2), V::mul(g, g)));
    e.m = V::pick(usable, m, e.m);
    e.v = V::pick(usable, v, e.v);
    r = V::div(e.m, V::add(V::mul(V::sqrt(e.v), V::set(c.inverse_root)), V::set(c.eps)));
  } else if constexpr (kRule == UpdateRule::kSign) {
    const F change = V::sub(g, e.m), mixed = V::add(e.m, V::mul(V::set(c.fresh1), change));
    r = V::pick(V::less(V::set(c.threshold), V::abs(mixed)), V::with_sign_of(V::set(1.0f), mixed), zero);
    e.m = V::pick(usable, V::add(e.m, V::mul(V::set(c.fresh2), change)), e.m);
  } else {
    const F decayed = V::add(g, V::mul(V::set(c.weight_decay), V::mul(V::set(group.scale), centred)));
    const F m = V::add(V::mul(V::set(c.momentum), e.m), V::mul(V::set(c.undamped), decayed));
    r = c.nesterov ? V::add(decayed, V::mul(V::set(c.momentum), m)) : m;
    e.m = V::pick(usable, m, e.m);
  }
  const F d = V::add(V::mul(V::set(c.decay), centred), V::mul(V::set(group.rate), r));
  const F size = V::abs(d);
  // A NaN is not less than anything.
  const F steps = V::pick(V::less(size, V::set(0x1p126f)), V::min(size, V::set(0x1p17f)), zero), low = V::floor(steps);
  const F moved = V::sub(e.q, V::with_sign_of(V::add(low, V::one_if_less(u, V::sub(steps, low))), d));
  const F inside = V::min(V::max(moved, zero), V::set(top));
  e.q = group.frozen ? e.q : V::pick(usable, inside, e.q);
  return e;
}

// ---- blockwise moments

// What a block of codes means and how values become codes.
struct MomentGrid {
  float levels, absmax, inverse;
};
SB_HD float signed_levels(MomentType t) { return t == MomentType::kQ8 ? 127.0f : 7.0f; }
SB_HD float unsigned_levels(MomentType t) { return t == MomentType::kQ8 ? 255.0f : 15.0f; }
// absmax as it is stored.
SB_HD float stored_absmax(float absmax) { return absmax < kSmallestDivisor ? 0.0f : absmax; }
SB_HD MomentGrid moment_grid(float levels, float absmax) {
  return {levels, absmax, absmax == 0.0f ? 0.0f : ScalarLane::div(1.0f, absmax)};
}

template <class V>
SB_HD typename V::F signed_value(const MomentGrid& grid, typename V::F code) {
  const float unit = ScalarLane::div(1.0f, grid.levels * grid.levels);
  const typename V::F c = V::sub(code, V::set(grid.levels + 1.0f));
  return V::mul(V::mul(V::mul(c, V::abs(c)), V::set(unit)), V::set(grid.absmax));
}

template <class V>
SB_HD typename V::F unsigned_value(const MomentGrid& grid, typename V::F code) {
  const float square = grid.levels * grid.levels, unit = ScalarLane::div(1.0f, ScalarLane::mul(square, square));
  const typename V::F c2 = V::mul(code, code);
  return V::mul(V::mul(V::mul(c2, c2), V::set(unit)), V::set(grid.absmax));
}

// y is the largest whole number with f(y) <= z in float32, f(y) = y^2 or y^4; of y and y + 1 the upper one is taken with the
// probability that makes the mean of f the value. A root that is a little low and off by less than 1 finds y or y - 1, and a
// comparison tells which: so every path may take its cheapest root.
constexpr float kLittleLow = 1.0f - 0x1p-9f;

template <class V>
SB_HD typename V::F signed_code(const MomentGrid& grid, typename V::F m, typename V::F u) {
  using F = typename V::F;
  const F levels = V::set(grid.levels), one = V::set(1.0f);
  const F z = V::mul(V::mul(V::abs(m), V::set(grid.inverse)), V::set(grid.levels * grid.levels));
  const F low = V::floor(V::mul(V::rough_sqrt(V::max(z, V::set(0.25f))), V::set(kLittleLow))), next = V::add(low, one);
  const F y = V::min(V::add(low, V::one_if_not_less(z, V::mul(next, next))), levels);
  const F up = V::one_if_less(V::mul(u, V::add(V::add(y, y), one)), V::sub(z, V::mul(y, y)));
  return V::add(V::with_sign_of(V::min(V::add(y, up), levels), m), V::set(grid.levels + 1.0f));
}

template <class V>
SB_HD typename V::F fourth_power(typename V::F a) {
  const typename V::F square = V::mul(a, a);
  return V::mul(square, square);
}

template <class V>
SB_HD typename V::F unsigned_code(const MomentGrid& grid, typename V::F v, typename V::F u) {
  using F = typename V::F;
  const float square = grid.levels * grid.levels;
  const F levels = V::set(grid.levels), one = V::set(1.0f);
  const F z = V::mul(V::mul(v, V::set(grid.inverse)), V::set(ScalarLane::mul(square, square)));
  const F root = V::rough_sqrt(V::rough_sqrt(V::max(z, one)));
  const F low = V::max(V::floor(V::mul(root, V::set(kLittleLow))), one);
  const F y = V::min(V::add(low, V::one_if_not_less(z, fourth_power<V>(V::add(low, one)))), levels);
  const F here = fourth_power<V>(y), next = fourth_power<V>(V::add(y, one));
  const F up = V::one_if_less(V::mul(u, V::sub(next, here)), V::sub(z, here));
  return V::pick(V::less(V::set(0.0f), v), V::min(V::add(y, up), levels), V::set(0.0f));
}

// bfloat16 bits of a finite value, rounded stochastically.
SB_HD uint16_t stochastic_bf16(float v, uint32_t word) { return uint16_t((std::bit_cast<uint32_t>(v) + (word >> 16)) >> 16); }

// ---- one row, one element at a time: the definition

SB_HD float moment_value(const MomentView& moment, int64_t row_bytes, int64_t n, int64_t k, bool is_signed, int64_t blocks) {
  using V = ScalarLane;
  switch (moment.type) {
    case MomentType::kF32: return static_cast<const float*>(moment.data)[n * (row_bytes / 4) + k];
    case MomentType::kBF16: return bf16_to_float(static_cast<const uint16_t*>(moment.data)[n * (row_bytes / 2) + k]);
    case MomentType::kQ8:
    case MomentType::kQ4: {
      const uint8_t* row = static_cast<const uint8_t*>(moment.data) + n * row_bytes;
      const float code = float(moment.type == MomentType::kQ8 ? row[k] : get_code(row, k, 4));
      const MomentGrid grid{is_signed ? signed_levels(moment.type) : unsigned_levels(moment.type),
                            moment.absmax[n * blocks + k / kMomentBlock], 0.0f};
      return is_signed ? signed_value<V>(grid, code) : unsigned_value<V>(grid, code);
    }
    default: return 0.0f;
  }
}

SB_HD void store_moment_code(const MomentView& moment, int64_t row_bytes, int64_t n, int64_t k, float code) {
  uint8_t* row = static_cast<uint8_t*>(moment.data) + n * row_bytes;
  if (moment.type == MomentType::kQ8) row[k] = uint8_t(code);
  else set_code(row, k, 4, uint32_t(code));
}

// Spare bits of a stream's last byte are zero.
SB_HD void clear_spare_bits(uint8_t* stream, int64_t count, int bits) {
  const int used = int(count % 8) * bits % 8;
  if (used != 0) stream[stream_bytes(count, bits) - 1] &= uint8_t((1u << used) - 1u);
}

SB_HD float largest(float a, float b) { return a > b ? a : b; }

template <UpdateRule kRule>
SB_HD void update_row_as(const PackedUpdateParams& p, const UpdateNumbers& c, int64_t n) {
  using V = ScalarLane;
  const PackedMatrix& w = p.w;
  const int64_t blocks = ceil_div(w.k, kMomentBlock), groups = w.groups();
  const int64_t m_bytes = moment_row_bytes(p.m.type, w.k), v_bytes = moment_row_bytes(p.v.type, w.k);
  uint8_t* const row = p.codes + n * w.layout.row_bytes;
  uint8_t* const residual = p.residual + n * stream_bytes(w.k, p.residual_bits);
  float ms[kMomentBlock], vs[kMomentBlock];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kMomentBlock, count = min_i64(kMomentBlock, w.k - begin);
    float m_max = 0, v_max = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = begin + j, i = n * groups + k / w.group_size, from = w.perm != nullptr ? w.perm[k] : k;
      const Segment& s = segment_of(w.layout, k);
      const int bits = format_bits(s.format);
      const GroupStep group =
          group_step(load_float(w.scales, w.scale_dtype, i), group_zero(w, s.format, i), w.zero_kind, p.residual_bits, c);
      const bool reachable = from >= 0 && from < w.k;  // a device cannot refuse such a perm
      const float grad = reachable ? load_float(p.grad, p.grad_dtype, n * p.grad_stride + from) : __builtin_nanf("");
      uint32_t code = get_code(row + s.byte_begin, k - s.k_begin, bits);
      if (p.residual_bits > 0) code = code << p.residual_bits | get_code(residual, k, p.residual_bits);
      Element<V> e;
      e.m = moment_value(p.m, m_bytes, n, k, true, blocks);
      e.v = moment_value(p.v, v_bytes, n, k, false, blocks);
      e.q = float(code);
      const uint32_t word = philox_word(p.seed, c.offset, (p.first_row + uint64_t(n)) * uint64_t(w.k) + uint64_t(k));
      const float top = float((format_levels(s.format) << p.residual_bits) - 1);
      e = stepped<kRule, V>(c, group, top, grad, e, uniform24(word));
      code = uint32_t(e.q);
      set_code(row + s.byte_begin, k - s.k_begin, bits, code >> p.residual_bits);
      if (p.residual_bits > 0) set_code(residual, k, p.residual_bits, code & ((1u << p.residual_bits) - 1u));
      ms[j] = e.m;
      vs[j] = e.v;
      m_max = largest(V::abs(e.m), m_max);
      v_max = largest(e.v, v_max);
    }
    m_max = stored_absmax(m_max);
    v_max = stored_absmax(v_max);
    if (is_blockwise(p.m.type)) p.m.absmax[n * blocks + block] = m_max;
    if (is_blockwise(p.v.type)) p.v.absmax[n * blocks + block] = v_max;
    const MomentGrid m_grid = moment_grid(signed_levels(p.m.type), m_max),
                     v_grid = moment_grid(unsigned_levels(p.v.type), v_max);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = begin + j, i = n * w.k + k;
      const uint32_t word = philox_word(p.seed, c.offset, (p.first_row + uint64_t(n)) * uint64_t(w.k) + uint64_t(k));
      if (p.m.type == MomentType::kF32) static_cast<float*>(p.m.data)[i] = ms[j];
      else if (p.m.type == MomentType::kBF16) static_cast<uint16_t*>(p.m.data)[i] = stochastic_bf16(ms[j], word * kMixM);
      else if (p.m.type != MomentType::kNone)
        store_moment_code(p.m, m_bytes, n, k, m_max == 0 ? 0.0f : signed_code<V>(m_grid, ms[j], uniform24(word * kMixM)));
      if (p.v.type == MomentType::kF32) static_cast<float*>(p.v.data)[i] = vs[j];
      else if (p.v.type == MomentType::kBF16) static_cast<uint16_t*>(p.v.data)[i] = stochastic_bf16(vs[j], word * kMixV);
      else if (p.v.type != MomentType::kNone)
        store_moment_code(p.v, v_bytes, n, k, v_max == 0 ? 0.0f : unsigned_code<V>(v_grid, vs[j], uniform24(word * kMixV)));
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
SB_HD void update_row(const PackedUpdateParams& p, const UpdateNumbers& c, int64_t n) {
  switch (p.rule) {
    case UpdateRule::kAdamW: return update_row_as<UpdateRule::kAdamW>(p, c, n);
    case UpdateRule::kSign: return update_row_as<UpdateRule::kSign>(p, c, n);
    case UpdateRule::kSgd: return update_row_as<UpdateRule::kSgd>(p, c, n);
  }
}

}  // namespace
}  // namespace subbyte
