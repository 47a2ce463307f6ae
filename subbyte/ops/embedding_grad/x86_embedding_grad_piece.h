// embedding_grad_piece over a vector type V (x86_<isa>_vector.h). Included by x86_*.cc files only; V is local to the file, so
// no instance of these templates leaves it.
#pragma once
#include "subbyte/ops/embedding_grad/embedding_grad.h"
#include "subbyte/ops/embedding_grad/kernels.h"

namespace subbyte {
namespace {

template <class V, DType T, bool kFactors>
void add_rows(const EmbeddingGradParams& p, int64_t t, int64_t k, int64_t count, float* sum) {
  for (int64_t j = p.begins[t]; j < p.ends[t]; ++j) {
    const int64_t row = p.sources[j] * p.gy_stride + k;
    const float factor = kFactors ? p.factors[j] : 1.0f;
    const auto factors = V::set(factor);
    int64_t c = 0;
    for (; c + V::kLanes <= count; c += V::kLanes) {
      auto g = V::template load<T>(p.gy, row + c);
      if constexpr (kFactors) g = V::mul(factors, g);
      V::template store<DType::kF32>(sum, c, V::add(V::template load<DType::kF32>(sum, c), g));
    }
    for (; c < count; ++c) {
      float g = load_float(p.gy, T, row + c);
      if constexpr (kFactors) g = factor * g;
      sum[c] += g;
    }
  }
}

template <class V, DType T>
void embedding_grad_piece_as(const EmbeddingGradParams& p, int64_t t, int64_t k, int64_t count) {
  alignas(64) float sum[kEmbeddingGradPiece + V::kLanes] = {};
  if (p.factors != nullptr) add_rows<V, T, true>(p, t, k, count, sum);
  else add_rows<V, T, false>(p, t, k, count, sum);
  if (p.values != nullptr) {
    const int64_t out = t * p.values_stride + k;
    int64_t c = 0;
    for (; c + V::kLanes <= count; c += V::kLanes)
      V::template store<T>(p.values, out + c, V::template load<DType::kF32>(sum, c));
    for (; c < count; ++c) store_float(p.values, T, out + c, sum[c]);
  }
  if (p.sign_bits == nullptr) return;
  alignas(64) uint8_t codes[kEmbeddingGradPiece + V::kLanes];
  const auto scale = V::set(p.scales == nullptr ? 1.0f : p.scales[t]), zero = V::set(0.0f);
  for (int64_t c = 0; c < count; c += V::kLanes)
    V::store_codes(codes + c, V::one_if_not_less(V::mul(scale, V::template load<DType::kF32>(sum, c)), zero));
  V::pack(codes, count, 1, p.sign_bits + t * p.sign_bytes() + k / 8);
}

template <class V>
void embedding_grad_piece_any(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) {
  const int64_t count = k_end - k_begin;
  switch (p.gy_dtype) {
    case DType::kF32: embedding_grad_piece_as<V, DType::kF32>(p, t, k_begin, count); break;
    case DType::kF16: embedding_grad_piece_as<V, DType::kF16>(p, t, k_begin, count); break;
    case DType::kBF16: embedding_grad_piece_as<V, DType::kBF16>(p, t, k_begin, count); break;
    case DType::kF64: break;  // the reference's alone
  }
}

}  // namespace
}  // namespace subbyte
