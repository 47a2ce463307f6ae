// subbyte::embedding (subbyte/ops/embedding/embedding.h) and its dense gradient, subbyte::embedding_grad_weight:
//   gw[indices[i], :] += gy[i, :]   for every i whose index is not padding_idx; [num_embeddings, K] of gy's dtype
#include "subbyte/ops/embedding/embedding.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/embedding/embedding_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/affine_gradient.h"
#include "subbyte_torch/ops/embedding.h"
#include "subbyte_torch/ops/embedding_rows.h"
#include "subbyte_torch/ops/gradient_mode.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "embedding(Tensor indices, Tensor? weight, " SB_PACKED_SCHEMA
                                ", int padding_idx=-1, bool sparse=False, ScalarType? dtype=None) -> Tensor";
constexpr const char* kGradSchema =
    "embedding_grad_weight(Tensor gy, Tensor indices, int num_embeddings, int padding_idx=-1) -> Tensor";

at::Tensor embedding_shape(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx,
                           bool sparse, std::optional<at::ScalarType> dtype) {
  check_packed("embedding", {SB_PACKED});
  check_indices("embedding", indices);
  check_handle("embedding", weight, codes.sym_size(0), in_features);
  TORCH_CHECK_VALUE(codes.sym_size(0) > padding_idx, "embedding: padding_idx is ", padding_idx,
                    ", expected below num_embeddings = ", codes.sym_size(0));
  const at::ScalarType type = dtype.value_or(scales.scalar_type());
  dtype_of("embedding", "dtype", type);
  auto sizes = indices.sym_sizes().vec();
  sizes.emplace_back(in_features);
  return at::empty_symint(sizes, scales.options().dtype(type).requires_grad(std::nullopt));
}

at::Tensor embedding_grad_weight_shape(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                       int64_t padding_idx) {
  check_indices("embedding_grad_weight", indices);
  TORCH_CHECK_VALUE(gy.dim() == indices.dim() + 1 && gy.sym_sizes().slice(0, indices.dim()) == indices.sym_sizes(),
                    "embedding_grad_weight: gy is ", gy.sym_sizes(), ", indices is ", indices.sym_sizes(),
                    ", expected the same leading dimensions and one more");
  TORCH_CHECK_VALUE(num_embeddings >= 0, "embedding_grad_weight: num_embeddings is ", num_embeddings, ", expected at least 0");
  dtype_of("embedding_grad_weight", "gy", gy.scalar_type());
  return at::empty_symint({num_embeddings, gy.sym_size(-1)}, gy.options().requires_grad(std::nullopt));
}

template <class Run>
at::Tensor embedding_with(Run run, const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS,
                          int64_t padding_idx, bool sparse, std::optional<at::ScalarType> dtype) {
  at::Tensor out = embedding_shape(indices, weight, SB_PACKED, padding_idx, sparse, dtype);
  const PackedView w = view_of("embedding", {SB_PACKED}, "indices", indices);
  const at::Tensor positions = indices.contiguous();
  EmbeddingParams p;
  p.table = w.matrix;
  p.indices = data_of(positions);
  p.indices_are_int64 = indices.scalar_type() == at::kLong;
  p.count = indices.numel();
  p.out = mutable_data_of(out);
  p.out_dtype = dtype_of("embedding", "dtype", out.scalar_type());
  p.out_stride = in_features;
  translated([&] { run(p); });
  return out;
}

at::Tensor embedding_cpu(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx,
                         bool sparse, std::optional<at::ScalarType> dtype) {
  return embedding_with([](const EmbeddingParams& p) { embedding(p); }, indices, weight, SB_PACKED, padding_idx, sparse, dtype);
}

at::Tensor embedding_grad_weight_dense(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                       int64_t padding_idx) {
  check_device("embedding_grad_weight", "indices", indices, "gy", gy);
  at::Tensor gw = embedding_grad_weight_shape(gy, indices, num_embeddings, padding_idx);
  if (gw.numel() == 0 || indices.numel() == 0) return gw.zero_();
  if (indices.is_cuda()) {
    // PyTorch's kernel would write outside the matrix where an index is: those go to a row that is cut off. The forward pass
    // has reported them.
    const at::Tensor inside = indices.ge(0).logical_and_(indices.lt(num_embeddings));
    const at::Tensor rows = at::where(inside, indices, num_embeddings);
    return gw.copy_(at::embedding_dense_backward(gy, rows, num_embeddings + 1, padding_idx, /*scale_grad_by_freq=*/false)
                        .narrow(0, 0, num_embeddings));
  }
  return gw.copy_(at::embedding_dense_backward(gy, indices, num_embeddings, padding_idx, /*scale_grad_by_freq=*/false));
}

#if SB_CUDA
at::Tensor embedding_cuda(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx,
                          bool sparse, std::optional<at::ScalarType> dtype) {
  const c10::DeviceGuard device(codes.device());
  return embedding_with([&](const EmbeddingParams& p) { cuda::embedding(p, stream_of(codes)); }, indices, weight, SB_PACKED,
                        padding_idx, sparse, dtype);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) {
  m.impl("embedding", embedding_cuda);
  m.impl("embedding_grad_weight", embedding_grad_weight_dense);
}
#endif

struct EmbeddingGradWeightFn : torch::autograd::Function<EmbeddingGradWeightFn> {
  static constexpr bool is_traceable = true;
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gy, const at::Tensor& indices,
                            int64_t num_embeddings, int64_t padding_idx) {
    ctx->save_for_backward({indices});
    ctx->saved_data["padding_idx"] = padding_idx;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::embedding_grad_weight(gy, indices, num_embeddings, padding_idx);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const at::Tensor indices = ctx->get_saved_variables()[0];
    const int64_t padding_idx = ctx->saved_data["padding_idx"].toInt();
    at::Tensor g = at::embedding(grads[0], indices);
    if (padding_idx >= 0) g = g.masked_fill(indices.eq(padding_idx).unsqueeze(-1), 0);
    return {g, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct EmbeddingFn : torch::autograd::Function<EmbeddingFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& indices, const at::Tensor& scales,
                            const OptionalTensor& weight, const OptionalTensor& zeros, const OptionalTensor& offsets,
                            const PackedRest& rest, int64_t padding_idx, bool sparse, std::optional<at::ScalarType> dtype) {
    rest.save(ctx, {indices, scales, zeros.value_or(at::Tensor()), offsets.value_or(at::Tensor())});
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["has_weight"] = given(weight);
    ctx->saved_data["sparse"] = sparse;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::embedding(indices, std::nullopt, rest.codes, scales, zeros, offsets, rest.perm, rest.format, rest.in_features,
                          rest.group_size, padding_idx, sparse, dtype);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const SavedPacked saved(ctx, 4);
    const OptionalTensor zeros = optional_of(saved.tensors[2]), offsets = optional_of(saved.tensors[3]);
    size_t edge = 2;
    const bool need_scales = ctx->needs_input_grad(1);
    const bool need_weight = ctx->saved_data["has_weight"].toBool() && ctx->needs_input_grad(edge++);
    const bool need_zeros = given(zeros) && ctx->needs_input_grad(edge++);
    const bool need_offsets = given(offsets) && ctx->needs_input_grad(edge++);
    const bool need_affine = need_scales || need_zeros || need_offsets;
    const int64_t height = saved.rest.codes.size(0), padding_idx = ctx->saved_data["padding_idx"].toInt();
    at::Tensor gw;
    AffineGradients affine;
    if (ctx->saved_data["sparse"].toBool()) {
      if (need_weight || need_affine) {
        const auto [rows, values] = ops::embedding_grad_rows(grads[0], saved.tensors[0], height, padding_idx);
        if (need_weight) gw = sparse_rows(rows, values, height);
        if (need_affine)
          affine = sparse_affine_gradients(rows, values, saved.args(saved.tensors[1], zeros, offsets), need_scales, need_zeros,
                                           need_offsets);
      }
    } else if (need_weight || need_affine) {
      gw = ops::embedding_grad_weight(grads[0], saved.tensors[0], height, padding_idx);
      if (need_affine)
        affine = affine_gradients(gw, saved.args(saved.tensors[1], zeros, offsets), need_scales, need_zeros, need_offsets);
    }
    return {at::Tensor(), affine.scales,  need_weight ? gw : at::Tensor(),
            affine.zeros, affine.offsets, at::Tensor(),
            at::Tensor(), at::Tensor(),   at::Tensor()};
  }
};

at::Tensor embedding_autograd(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx,
                              bool sparse, std::optional<at::ScalarType> dtype) {
  if (needs_gradient({&scales}, {&weight, &zeros, &offsets})) {
    check_handle("embedding", weight, codes.sym_size(0), in_features);
    return EmbeddingFn::apply(indices, scales, weight, zeros, offsets,
                              PackedRest{codes, perm, std::string(format), in_features, group_size}, padding_idx, sparse,
                              dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::embedding(indices, std::nullopt, SB_PACKED, padding_idx, sparse, dtype);
}

at::Tensor embedding_grad_weight_autograd(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                          int64_t padding_idx) {
  if (needs_gradient({&gy}, {})) return EmbeddingGradWeightFn::apply(gy, indices, num_embeddings, padding_idx);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::embedding_grad_weight(gy, indices, num_embeddings, padding_idx);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def(kSchema);
  m.def(kGradSchema);
}
TORCH_LIBRARY_IMPL(subbyte, Meta, m) {
  m.impl("embedding", embedding_shape);
  m.impl("embedding_grad_weight", embedding_grad_weight_shape);
}
TORCH_LIBRARY_IMPL(subbyte, CPU, m) {
  m.impl("embedding", embedding_cpu);
  m.impl("embedding_grad_weight", embedding_grad_weight_dense);
}
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) {
  m.impl("embedding", embedding_autograd);
  m.impl("embedding_grad_weight", embedding_grad_weight_autograd);
}

}  // namespace

at::Tensor ops::embedding(const at::Tensor& indices, const OptionalTensor& weight, SB_PACKED_PARAMS, int64_t padding_idx,
                          bool sparse, std::optional<at::ScalarType> dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding", "").typed<decltype(embedding_shape)>();
  return op.call(indices, weight, SB_PACKED, padding_idx, sparse, dtype);
}

at::Tensor ops::embedding_grad_weight(const at::Tensor& gy, const at::Tensor& indices, int64_t num_embeddings,
                                      int64_t padding_idx) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("subbyte::embedding_grad_weight", "")
                             .typed<decltype(embedding_grad_weight_shape)>();
  return op.call(gy, indices, num_embeddings, padding_idx);
}

}  // namespace subbyte
