// embedding_bag: a thread keeps one column of a bag and walks through the bag's look-ups in order; neighbours read neighbouring
// codes, so a warp's 32 sign codes are one four-byte line. Limited by the latency of the scattered rows, which the unrolled
// loop and the many bags hide.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/base/value_watch.h"
#include "subbyte/formats/cuda_codes.h"
#include "subbyte/ops/embedding_bag/embedding_bag_cuda.h"

namespace subbyte::cuda {
namespace {

template <DType kOut>
__device__ __forceinline__ typename Elem<kOut>::Storage out_of(float v) {
  if constexpr (kOut == DType::kF64) return double(v);
  else return Elem<kOut>::store(v);
}

template <DType kOut>
__global__ void __launch_bounds__(256) bag_kernel(const __grid_constant__ EmbeddingBagParams p, const int64_t groups) {
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= p.table.k) return;
  const int64_t to = p.table.perm != nullptr ? p.table.perm[k] : k;
  if (to < 0 || to >= p.table.k) return;
  const Segment segment = segment_of(p.table.layout, k);
  const float fixed_zero = format_fixed_zero(segment.format);
  const int bits = format_bits(segment.format);
  const int64_t group = k / p.table.group_size, in_segment = k - segment.k_begin;
  const float nan = __int_as_float(0x7fffffff);
  for (int64_t b = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; b < p.bags; b += int64_t(gridDim.y) * blockDim.y) {
    const int64_t begin = max_i64(0, p.begin(b)), end = min_i64(p.count, p.end(b));
    float total = 0.0f;
    int64_t counted = 0, votes = 0;
    bool stray = false;
#pragma unroll 4
    for (int64_t j = begin; j < end; ++j) {
      const int64_t n = p.index(j);
      if (n == p.padding_idx) continue;
      ++counted;
      if (n < 0 || n >= p.table.n) {
        stray = true;
        continue;
      }
      const uint32_t code = get_code(p.table.codes + n * p.table.layout.row_bytes + segment.byte_begin, in_segment, bits);
      if (p.mode == BagMode::kMajority) {
        votes += code;
        continue;
      }
      const GroupParams g = load_group(p.table, fixed_zero, n * groups + group);
      float value = affine_value(small_to_float(code), g.scale, g.zero, p.table.zero_kind);
      if (p.weights != nullptr) value = __fmul_rn(p.weights[j], value);
      total = __fadd_rn(total, value);
    }
    float y = total;
    if (p.mode == BagMode::kMean && counted > 0) y = __fdiv_rn(total, float(counted));
    if (p.mode == BagMode::kMajority) y = counted == 0 ? 0.0f : votes >= counted - counted / 2 ? 1.0f : -1.0f;
    static_cast<typename Elem<kOut>::Storage*>(p.out)[b * p.out_stride + to] = out_of<kOut>(stray ? nan : y);
  }
}

}  // namespace

void embedding_bag(const EmbeddingBagParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  watch_indices(p.indices, p.indices_are_int64, p.count, p.table.n, "embedding_bag", "index", stream);
  if (p.table.k == 0) return;
  const RowGrid g = row_grid(p.bags, p.table.k, 1);
  dispatch_dtype(p.out_dtype, [&](auto tag) {
    bag_kernel<decltype(tag)::value><<<g.grid, g.block, 0, stream_of(stream)>>>(p, p.table.groups());
  });
  check_launch("embedding_bag");
}

}  // namespace subbyte::cuda
