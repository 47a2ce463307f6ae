#include "subbyte/formats/bits.h"
#include "subbyte/ops/embedding_grad/embedding_grad.h"

namespace subbyte::reference {
namespace {

template <class Sum>
Sum load_as(const void* p, DType t, int64_t i) {
  if constexpr (sizeof(Sum) == 8) return load_double(p, t, i);
  else return load_float(p, t, i);
}

template <class Sum>
void piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) {
  uint8_t byte = 0;
  for (int64_t k = k_begin; k < k_end; ++k) {
    Sum sum = 0;
    for (int64_t j = p.begins[t]; j < p.ends[t]; ++j) {
      const Sum g = load_as<Sum>(p.gy, p.gy_dtype, p.sources[j] * p.gy_stride + k);
      sum += p.factors == nullptr ? g : Sum(p.factors[j]) * g;
    }
    if (p.values != nullptr) store_double(p.values, p.gy_dtype, t * p.values_stride + k, double(sum));
    if (p.sign_bits == nullptr) continue;
    const Sum signed_sum = p.scales == nullptr ? sum : Sum(p.scales[t]) * sum;
    byte = uint8_t(byte | (signed_sum >= 0 ? 1 << (k % 8) : 0));
    if (k % 8 == 7 || k + 1 == p.k) {
      p.sign_bits[t * p.sign_bytes() + k / 8] = byte;
      byte = 0;
    }
  }
}

}  // namespace

void embedding_grad_piece(const EmbeddingGradParams& p, int64_t t, int64_t k_begin, int64_t k_end) noexcept {
  if (p.gy_dtype == DType::kF64) piece<double>(p, t, k_begin, k_end);
  else piece<float>(p, t, k_begin, k_end);
}

}  // namespace subbyte::reference
