#include "subbyte/ops/linear/linear_cuda_plan.h"

#include "subbyte/ops/linear/linear_cuda.h"

namespace subbyte::cuda {

int rows_pieces(const PackedMatrix& w) {
  const int bits = w.layout.segment_count == 1 ? format_bits(w.layout.segments[0].format) : 0;
  if (bits == 0 || w.k % 32 != 0) return 0;
  if (w.group_size % 128 == 0 || w.group_size >= w.k) return 1;
  if (bits != 2 && bits != 4 && bits != 8) return 0;
  // A lane's piece of a group must fill whole 32-bit words: 8 codes of 4 bits, 16 of 2.
  if (w.group_size == 64 && w.k % 64 == 0) return 2;
  if (w.group_size == 32 && bits >= 4) return 4;
  return 0;
}

int rows_warps(int64_t blocks, int64_t chunks, int multiprocessors) {
  int warps = 16;
  while (warps > 4 && (blocks * warps > int64_t(multiprocessors) * 17 || warps / 2 >= chunks)) warps /= 2;
  return warps;
}

bool rows_need_staged_x(const LinearParams& p) {
  return p.w.perm != nullptr || reinterpret_cast<uintptr_t>(p.x) % 16 != 0 || (p.m > 1 && p.x_stride % 8 != 0);
}

LinearCudaKernel select_linear_cuda_kernel(const LinearParams& p) {
  const bool half = p.dtype == DType::kF16 || p.dtype == DType::kBF16;
  if (half && p.m <= 65535 && p.w.k > 0 && p.w.k < (int64_t(1) << 30) && rows_pieces(p.w) != 0 &&
      reinterpret_cast<uintptr_t>(p.w.codes) % 16 == 0)
    return LinearCudaKernel::kRows;
  return p.m <= 16 ? LinearCudaKernel::kDot : LinearCudaKernel::kTile;
}

bool linear_prefer_dense(int64_t m, DType dtype) {
  switch (dtype) {
    case DType::kF64: return false;
    case DType::kF32:
      return m > 8;          // dot re-reads the weight for every 4 rows, tile runs at a few TFLOP/s; not measured in detail
    default: return m > 96;  // 4 bits, H100: 64 rows 1.4 to 1.6 times faster here, 128 rows 1.2 to 1.3 times slower
  }
}

}  // namespace subbyte::cuda
