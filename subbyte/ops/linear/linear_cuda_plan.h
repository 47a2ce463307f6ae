// Which CUDA kernel serves a linear: pure functions of shape, format and type, so that they are tested without a device.
#pragma once
#include "subbyte/ops/linear/linear.h"

namespace subbyte::cuda {

enum class LinearCudaKernel : uint8_t {
  kRows,  // matrix units, weights decoded in registers; 16-bit x, every width, whole groups: rows_mma_cuda.h
  kDot,   // few rows, everything
  kTile,  // many rows, everything
};
LinearCudaKernel select_linear_cuda_kernel(const LinearParams& p);

// kRows: how many groups share a chunk of 128 columns (1, 2 or 4), 0 when the kernel does not serve the grouping.
int rows_pieces(const PackedMatrix& w);
// kRows: warps of a block, so that all blocks together fill the device about once, and no warp is without work.
int rows_warps(int64_t blocks, int64_t chunks, int multiprocessors);
// kRows: true when x must first be brought into stored order, or onto 16-byte boundaries, in the workspace.
bool rows_need_staged_x(const LinearParams& p);

}  // namespace subbyte::cuda
