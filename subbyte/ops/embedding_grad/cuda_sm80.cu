// embedding_grad: a thread keeps one column of a touched row and adds the row's look-ups in order, four loads of gy in flight;
// 32 neighbours are a coalesced line of gy and, by ballot, four bytes of signs. Limited by reading gy once. A row with most of
// the look-ups serialises: its sum is a chain of additions, which is what makes the bits those of the CPU.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/embedding_grad/embedding_grad_cuda.h"

namespace subbyte::cuda {
namespace {

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

template <DType kType>
__global__ void __launch_bounds__(256) grad_kernel(const __grid_constant__ EmbeddingGradParams p) {
  using E = Elem<kType>;
  using Storage = typename E::Storage;
  using Sum = typename E::Sum;
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool inside = k < p.k;
  const Storage* gy = static_cast<const Storage*>(p.gy) + k;
  for (int64_t t = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; t < p.rows; t += int64_t(gridDim.y) * blockDim.y) {
    const int64_t begin = max_i64(0, p.begins[t]), end = min_i64(p.count, p.ends[t]);
    Sum sum = 0;
    if (inside) {
#pragma unroll 4
      for (int64_t j = begin; j < end; ++j) {
        const int64_t source = p.sources[j];
        Sum g = source >= 0 && source < p.gy_rows ? E::load(gy[source * p.gy_stride]) : Sum(__int_as_float(0x7fffffff));
        if (p.factors != nullptr) g = times(Sum(p.factors[j]), g);
        sum = add(sum, g);
      }
      if (p.values != nullptr) static_cast<Storage*>(p.values)[t * p.values_stride + k] = E::store(sum);
    }
    if (p.sign_bits == nullptr) continue;
    // A warp is 32 columns of one row (blockDim.x is a multiple of 32): every lane arrives here.
    const bool bit = inside && (p.scales == nullptr ? sum : times(Sum(p.scales[t]), sum)) >= Sum(0);
    const unsigned bits = __ballot_sync(0xffffffffu, bit);
    const int64_t byte = k / 32 * 4 + threadIdx.x % 32;
    if (threadIdx.x % 32 < 4 && byte < p.sign_bytes())
      p.sign_bits[t * p.sign_bytes() + byte] = uint8_t(bits >> (threadIdx.x % 32 * 8));
  }
}

}  // namespace

void embedding_grad(const EmbeddingGradParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  const RowGrid g = row_grid(p.rows, max_i64(32, p.k), 1);
  dispatch_dtype(p.gy_dtype,
                 [&](auto tag) { grad_kernel<decltype(tag)::value><<<g.grid, g.block, 0, stream_of(stream)>>>(p); });
  check_launch("embedding_grad");
}

}  // namespace subbyte::cuda
