#include "subbyte_torch/ops/binary_sign.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <utility>

#if SB_CUDA
#include "subbyte/base/value_watch.h"
#endif
#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

at::ScalarType wide_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace

void check_scale(const char* op, const char* name, const at::Tensor& scale) {
  TORCH_CHECK_VALUE(scale.is_floating_point() && scale.sym_numel() == 1, op, ": ", name, " is ", scale.scalar_type(), " ",
                    scale.sym_sizes(), ", expected one floating-point number");
}

void check_scale_values(const char* op, const char* first_name, const at::Tensor& first, const char* second_name,
                        const at::Tensor& second) {
#if SB_CUDA
  if (first.is_cuda()) {
    const auto watched = [op](const char* name, const at::Tensor& scale) {
      return cuda::WatchedScale{data_of(scale), dtype_of(op, name, scale.scalar_type()), name};
    };
    translated([&] {
      cuda::watch_scales(watched(first_name, first), watched(second_name, second), cuda::ScaleRange::kPositive, op,
                         stream_of(first));
    });
    return;
  }
#endif
  for (const auto& [name, scale] : {std::pair{first_name, &first}, std::pair{second_name, &second}}) {
    const double value = scale->item().toDouble();
    TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, op, ": ", name, " is ", value, ", expected a finite number above 0");
  }
}

at::Tensor wide_scale(const at::Tensor& scale, at::ScalarType type) {
  return scale.detach().to(wide_type(type)).resolve_neg().reshape({});
}

at::Tensor signs_of(const at::Tensor& v, at::ScalarType type) { return (v >= 0).to(type) * 2 - 1; }

at::Tensor signs_of_codes(const at::Tensor& codes, int64_t k, at::ScalarType type) {
  return ops::unpack(codes, "sign", k).to(type) * 2 - 1;
}

at::Tensor within_clip(const at::Tensor& v, const at::Tensor& clip, const at::Tensor& g) {
  const at::ScalarType wide = wide_type(v.scalar_type());
  // The same set as |v / clip| <= 1: a quotient of neighbouring numbers never rounds to 1.
  const at::Tensor inside = v.to(wide).abs() <= clip.to(wide).reshape({}).abs();
  return at::where(inside, g, at::zeros_like(g));
}

at::Tensor clip_gradient(const at::Tensor& g, const at::Tensor& signs, const at::Tensor& clip, const at::Tensor& count_of) {
  const at::ScalarType wide = wide_type(g.scalar_type());
  const at::Tensor sum = (g.to(wide) * signs.to(wide)).sum();
  at::Tensor out;
  if (const auto count = count_of.sym_numel().maybe_as_int()) {
    out = sum / std::sqrt(double(*count > 0 ? *count : 1));
  } else {
    // As a sum of ones the count stays symbolic.
    out = sum / at::ones_like(count_of, count_of.options().dtype(wide)).sum().clamp_min(1).sqrt();
  }
  return out.to(clip.scalar_type()).reshape_symint(clip.sym_sizes());
}

c10::SymInt check_sign_weight(const char* op, const SignWeight& w, const c10::SymInt& k, c10::SymIntArrayRef rest) {
  TORCH_CHECK_VALUE(given(w.weight) || given(w.codes), op,
                    ": weight and codes are both missing, expected at least one of them");
  c10::SymInt n = 0;
  if (given(w.codes)) {
    n = w.codes->dim() > 0 ? w.codes->sym_size(0) : c10::SymInt(0);
    const c10::SymInt bytes = row_bytes_of(op, "sign", k);
    TORCH_CHECK_VALUE(w.codes->scalar_type() == at::kByte && w.codes->dim() == 2 && w.codes->sym_size(1) == bytes, op,
                      ": codes is ", w.codes->scalar_type(), " ", w.codes->sym_sizes(),
                      ", expected uint8 [N, ceil(K/8)] = [N, ", bytes, "] for K = ", k);
  }
  if (given(w.weight)) {
    const at::Tensor& t = *w.weight;
    TORCH_CHECK_VALUE(t.is_floating_point() && t.dim() == int64_t(rest.size()) + 1 && t.sym_sizes().slice(1) == rest, op,
                      ": weight is ", t.scalar_type(), " ", t.sym_sizes(), ", expected floating point [N, ...] with ", rest,
                      " behind N");
    if (given(w.codes)) TORCH_CHECK_VALUE(t.sym_size(0) == n, op, ": weight has ", t.sym_size(0), " rows, codes has ", n);
    n = t.sym_size(0);
  }
  return n;
}

void check_vector(const char* op, const char* name, const OptionalTensor& v, const c10::SymInt& size) {
  if (!given(v)) return;
  TORCH_CHECK_VALUE(v->is_floating_point() && v->dim() == 1 && v->sym_size(0) == size, op, ": ", name, " is ", v->scalar_type(),
                    " ", v->sym_sizes(), ", expected floating point [", size, "]");
}

}  // namespace subbyte
