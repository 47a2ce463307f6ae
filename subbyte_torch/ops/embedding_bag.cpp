// subbyte::embedding_bag (subbyte/ops/embedding_bag/embedding_bag.h) and its gradients.
#include "subbyte/ops/embedding_bag/embedding_bag.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#if SB_CUDA
#include <c10/core/DeviceGuard.h>

#include "subbyte/ops/embedding_bag/embedding_bag_cuda.h"
#endif

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/embedding.h"
#include "subbyte_torch/ops/embedding_rows.h"
#include "subbyte_torch/ops/gradient_mode.h"

namespace subbyte {
namespace {

constexpr const char* kSchema = "embedding_bag(Tensor indices, Tensor? bag_offsets, Tensor? weight, " SB_PACKED_SCHEMA
                                ", str mode=\"sum\", Tensor? per_sample_weights=None, int padding_idx=-1, bool sparse=False, "
                                "ScalarType? dtype=None) -> Tensor";

#define SB_BAG_PARAMS                                                                                           \
  const at::Tensor &indices, const OptionalTensor &bag_offsets, const OptionalTensor &weight, SB_PACKED_PARAMS, \
      std::string_view mode, const OptionalTensor &per_sample_weights, int64_t padding_idx, bool sparse,        \
      std::optional<at::ScalarType> dtype
#define SB_BAG indices, bag_offsets, weight, SB_PACKED, mode, per_sample_weights, padding_idx, sparse, dtype

at::Tensor bag_shape(SB_BAG_PARAMS) {
  check_packed("embedding_bag", {SB_PACKED});
  check_handle("embedding_bag", weight, codes.sym_size(0), in_features);
  const BagMode bag = bag_mode_of("embedding_bag", mode);
  const c10::SymInt bags = check_bags("embedding_bag", indices, bag_offsets, bag, per_sample_weights);
  TORCH_CHECK_VALUE(bag != BagMode::kMajority || format == "sign",
                    "embedding_bag: a majority needs a table of format sign, not ", format);
  TORCH_CHECK_VALUE(codes.sym_size(0) > padding_idx, "embedding_bag: padding_idx is ", padding_idx,
                    ", expected below num_embeddings = ", codes.sym_size(0));
  const at::ScalarType type = dtype.value_or(scales.scalar_type());
  dtype_of("embedding_bag", "dtype", type);
  return at::empty_symint({bags, c10::SymInt(in_features)}, scales.options().dtype(type).requires_grad(std::nullopt));
}

template <class Run>
at::Tensor bag_with(Run run, SB_BAG_PARAMS) {
  at::Tensor out = bag_shape(SB_BAG);
  const PackedView w = view_of("embedding_bag", {SB_PACKED}, "indices", indices);
  for (const OptionalTensor* t : {&bag_offsets, &per_sample_weights})
    if (given(*t)) check_device("embedding_bag", "bag_offsets or per_sample_weights", **t, "indices", indices);
  const at::Tensor positions = indices.contiguous();
  const at::Tensor starts = given(bag_offsets) ? bag_offsets->to(at::kLong).contiguous() : at::Tensor();
  const at::Tensor weights = given(per_sample_weights) ? per_sample_weights->to(at::kFloat).contiguous() : at::Tensor();
  EmbeddingBagParams p;
  p.table = w.matrix;
  p.indices = data_of(positions);
  p.indices_are_int64 = indices.scalar_type() == at::kLong;
  p.count = indices.numel();
  p.offsets = static_cast<const int64_t*>(data_of(starts));
  p.bags = out.size(0);
  p.bag_size = starts.defined() ? 0 : indices.size(1);
  p.weights = static_cast<const float*>(data_of(weights));
  p.padding_idx = padding_idx;
  p.mode = bag_mode_of("embedding_bag", mode);
  p.out = mutable_data_of(out);
  p.out_dtype = dtype_of("embedding_bag", "dtype", out.scalar_type());
  p.out_stride = in_features;
  translated([&] { run(p); });
  return out;
}

at::Tensor bag_cpu(SB_BAG_PARAMS) {
  return bag_with([](const EmbeddingBagParams& p) { embedding_bag(p); }, SB_BAG);
}

#if SB_CUDA
at::Tensor bag_cuda(SB_BAG_PARAMS) {
  const c10::DeviceGuard device(codes.device());
  return bag_with([&](const EmbeddingBagParams& p) { cuda::embedding_bag(p, stream_of(codes)); }, SB_BAG);
}
TORCH_LIBRARY_IMPL(subbyte, CUDA, m) { m.impl("embedding_bag", bag_cuda); }
#endif

struct EmbeddingBagFn : torch::autograd::Function<EmbeddingBagFn> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& indices, const OptionalTensor& bag_offsets,
                            const at::Tensor& scales, const OptionalTensor& weight, const OptionalTensor& zeros,
                            const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const PackedRest& rest,
                            std::string_view mode, int64_t padding_idx, bool sparse, std::optional<at::ScalarType> dtype) {
    rest.save(ctx, {indices, bag_offsets.value_or(at::Tensor()), scales, zeros.value_or(at::Tensor()),
                    offsets.value_or(at::Tensor()), per_sample_weights.value_or(at::Tensor())});
    ctx->saved_data["mode"] = std::string(mode);
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["has_weight"] = given(weight);
    ctx->saved_data["sparse"] = sparse;
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::embedding_bag(indices, bag_offsets, std::nullopt, rest.codes, scales, zeros, offsets, rest.perm, rest.format,
                              rest.in_features, rest.group_size, mode, per_sample_weights, padding_idx, sparse, dtype);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    const SavedPacked saved(ctx, 6);
    const at::Tensor& indices = saved.tensors[0];
    const OptionalTensor bag_offsets = optional_of(saved.tensors[1]), zeros = optional_of(saved.tensors[3]),
                         offsets = optional_of(saved.tensors[4]), per_sample_weights = optional_of(saved.tensors[5]);
    const std::string mode = ctx->saved_data["mode"].toStringRef();
    const bool majority = mode == "majority";
    // Edges are counted over the tensors given, in the order of forward's arguments.
    size_t edge = given(bag_offsets) ? 2 : 1;
    const bool need_scales = ctx->needs_input_grad(edge++) && !majority;
    const bool need_weight = ctx->saved_data["has_weight"].toBool() && ctx->needs_input_grad(edge++);
    const bool need_zeros = given(zeros) && ctx->needs_input_grad(edge++) && !majority;
    const bool need_offsets = given(offsets) && ctx->needs_input_grad(edge++) && !majority;
    const bool need_weights = given(per_sample_weights) && ctx->needs_input_grad(edge++);
    const bool need_affine = need_scales || need_zeros || need_offsets;
    const int64_t height = saved.rest.codes.size(0), padding_idx = ctx->saved_data["padding_idx"].toInt();
    const PackedArgs w = saved.args(saved.tensors[2], zeros, offsets);
    const bool sparse = ctx->saved_data["sparse"].toBool();
    const at::Tensor& gy = grads[0];
    at::Tensor gw, g_weights, spread, bag_of;
    AffineGradients affine;
    if (need_weights || ((need_weight || need_affine) && !sparse)) {
      const at::Tensor positions = at::arange(indices.sym_numel(), indices.options().dtype(at::kLong));
      bag_of = bag_of_positions(indices, bag_offsets, positions);
      spread = gy.index_select(0, bag_of);  // one row of gy a look-up
    }
    if (need_weights) {
      const at::Tensor looked_up = ops::embedding(indices, std::nullopt, w.codes, w.scales, w.zeros, w.offsets, w.perm,
                                                  w.format, w.in_features, w.group_size, -1, false, gy.scalar_type());
      g_weights = spread.reshape_symint(looked_up.sym_sizes())
                      .mul(looked_up)
                      .sum(-1)
                      .masked_fill(indices.eq(padding_idx), 0)
                      .to(per_sample_weights->scalar_type());
    }
    if ((need_weight || need_affine) && sparse) {
      const auto [rows, values] =
          ops::embedding_grad_rows(gy, indices, height, padding_idx, bag_offsets, mode, per_sample_weights);
      if (need_weight) gw = sparse_rows(rows, values, height);
      if (need_affine) affine = sparse_affine_gradients(rows, values, w, need_scales, need_zeros, need_offsets);
    } else if (need_weight || need_affine) {
      if (given(per_sample_weights)) {
        spread = spread.mul(per_sample_weights->reshape({-1, 1}).to(gy.scalar_type()));
      } else if (mode == "mean") {
        const at::Tensor inverse = inverse_bag_sizes(indices, bag_offsets, gy.size(0), padding_idx);
        spread = spread.mul(inverse.index_select(0, bag_of).unsqueeze(1).to(gy.scalar_type()));
      }
      gw = ops::embedding_grad_weight(spread, indices.reshape({-1}), height, padding_idx);
      if (need_affine) affine = affine_gradients(gw, w, need_scales, need_zeros, need_offsets);
    }
    return {at::Tensor(), at::Tensor(),   affine.scales, need_weight ? gw : at::Tensor(),
            affine.zeros, affine.offsets, g_weights,     at::Tensor(),
            at::Tensor(), at::Tensor(),   at::Tensor(),  at::Tensor()};
  }
};

at::Tensor bag_autograd(SB_BAG_PARAMS) {
  if (needs_gradient({&scales}, {&weight, &zeros, &offsets, &per_sample_weights})) {
    check_handle("embedding_bag", weight, codes.sym_size(0), in_features);
    return EmbeddingBagFn::apply(indices, bag_offsets, scales, weight, zeros, offsets, per_sample_weights,
                                 PackedRest{codes, perm, std::string(format), in_features, group_size}, mode, padding_idx,
                                 sparse, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::embedding_bag(indices, bag_offsets, std::nullopt, SB_PACKED, mode, per_sample_weights, padding_idx, sparse,
                            dtype);
}

TORCH_LIBRARY_FRAGMENT(subbyte, m) { m.def(kSchema); }
TORCH_LIBRARY_IMPL(subbyte, Meta, m) { m.impl("embedding_bag", bag_shape); }
TORCH_LIBRARY_IMPL(subbyte, CPU, m) { m.impl("embedding_bag", bag_cpu); }
TORCH_LIBRARY_IMPL(subbyte, Autograd, m) { m.impl("embedding_bag", bag_autograd); }

}  // namespace

at::Tensor ops::embedding_bag(SB_BAG_PARAMS) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("subbyte::embedding_bag", "").typed<decltype(bag_shape)>();
  return op.call(SB_BAG);
}

}  // namespace subbyte
