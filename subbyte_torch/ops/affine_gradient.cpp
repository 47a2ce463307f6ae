#include "subbyte_torch/ops/affine_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {

at::Tensor group_sums(const at::Tensor& t, int64_t k, int64_t group_size) {
  const int64_t size = std::min(group_size, k), groups = ceil_div(k, size);
  const at::Tensor padded = at::constant_pad_nd(t, {0, groups * size - k});
  return padded.view_symint({t.sym_size(0), groups, size}).sum(-1);
}

namespace {

// The format's zero of every stored column, [K], or [1] when all columns share it.
at::Tensor fixed_zeros(const RowLayout& layout, const at::TensorOptions& options) {
  std::vector<at::Tensor> parts;
  for (int i = 0; i < layout.segment_count; ++i)
    parts.push_back(
        at::full({layout.uniform() ? 1 : layout.segments[i].k_count}, format_fixed_zero(layout.segments[i].format), options));
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

}  // namespace

AffineSums affine_sums(const at::Tensor& gw, const PackedArgs& w, bool need_scales, bool need_shift) {
  AffineSums out;
  at::Tensor g = gw.to(at::kFloat);
  if (given(w.perm)) g = g.index_select(1, *w.perm);
  if (need_shift || given(w.zeros)) out.shift = group_sums(g, w.in_features, w.group_size);
  if (need_scales) {
    at::Tensor q = ops::unpack(w.codes, w.format, w.in_features).to(at::kFloat);
    if (!given(w.zeros) && !given(w.offsets))
      q = q - fixed_zeros(layout_of("affine gradient", w.format, w.in_features), q.options());
    out.scales = group_sums(g * q, w.in_features, w.group_size);
    if (given(w.zeros)) out.scales = out.scales - w.zeros->to(at::kFloat) * out.shift;
  }
  return out;
}

AffineGradients affine_gradients(const at::Tensor& gw, const PackedArgs& w, bool need_scales, bool need_zeros,
                                 bool need_offsets) {
  AffineGradients out;
  if (w.in_features == 0) {  // no group, so nothing to sum
    if (need_scales) out.scales = at::zeros_like(w.scales);
    if (need_zeros) out.zeros = at::zeros_like(*w.zeros);
    if (need_offsets) out.offsets = at::zeros_like(*w.offsets);
    return out;
  }
  const AffineSums sums = affine_sums(gw, w, need_scales, need_zeros || need_offsets);
  if (need_scales) out.scales = sums.scales.to(w.scales.scalar_type());
  if (need_zeros) out.zeros = (-(w.scales.to(at::kFloat) * sums.shift)).to(w.zeros->scalar_type());
  if (need_offsets) out.offsets = sums.shift.to(w.offsets->scalar_type());
  return out;
}

}  // namespace subbyte
