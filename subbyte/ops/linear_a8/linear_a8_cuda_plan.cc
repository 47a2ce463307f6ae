#include "subbyte/ops/linear_a8/linear_a8_cuda_plan.h"

#include "subbyte/ops/linear/linear_cuda_plan.h"

namespace subbyte::cuda {

LinearA8CudaKernel select_linear_a8_cuda_kernel(const LinearA8Params& p) {
  const PackedMatrix& w = p.w;
  const bool complete = w.group_size >= w.k ? w.k <= 65536 : w.group_size <= 128;  // a group's integer sum in one place
  const int bits = w.layout.segment_count == 1 ? format_bits(w.layout.segments[0].format) : 0;
  const bool power = (bits & (bits - 1)) == 0;
  if (w.k > 0 && w.k < (int64_t(1) << 30) && rows_pieces(w) != 0 && power && complete &&
      reinterpret_cast<uintptr_t>(w.codes) % 16 == 0)
    return LinearA8CudaKernel::kRows;
  return LinearA8CudaKernel::kDot;
}

}  // namespace subbyte::cuda
