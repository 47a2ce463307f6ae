#include "subbyte/ops/linear/linear_cuda_plan.h"

#include <gtest/gtest.h>

#include "subbyte/ops/linear/linear_cuda.h"
#include "subbyte/ops/linear_a8/linear_a8_cuda_plan.h"

namespace subbyte {
namespace {

using cuda::LinearA8CudaKernel;
using cuda::LinearCudaKernel;

alignas(64) uint8_t aligned_bytes[64];

PackedMatrix weight(const char* format, int64_t k, int64_t group_size) {
  PackedMatrix w;
  w.layout = row_layout(format, k);
  w.n = 64;
  w.k = k;
  w.group_size = group_size;
  w.codes = aligned_bytes;
  return w;
}

TEST(LinearCudaPlan, PiecesOfAChunkFollowGroupSizeAndWidth) {
  struct Row {
    const char* format;
    int64_t k, group_size;
    int pieces;
  };
  const Row table[] = {
      {"uint4", 4096, 128, 1},    {"uint4", 4096, 256, 1},
      {"uint4", 4096, 64, 2},     {"uint4", 4096, 32, 4},
      {"uint4", 4096, 16, 0},     {"uint4", 4096, 100, 0},
      {"uint4", 4096, 192, 0},    {"uint4", 576, 1 << 20, 1},
      {"uint4", 576, 64, 2},      {"uint4", 100, 128, 0},
      {"uint8", 4096, 32, 4},     {"uint8", 4096, 64, 2},
      {"uint2", 4096, 64, 2},     {"uint2", 4096, 32, 0},
      {"ternary", 4096, 4096, 1}, {"sign", 4096, 128, 1},
      {"sign", 4096, 64, 0},      {"uint3", 4096, 128, 1},
      {"uint5", 4096, 64, 0},     {"uint6", 4096, 64, 0},
      {"uint7", 4096, 4096, 1},   {"uint8*64+uint4*64", 128, 64, 0},
  };
  for (const Row& row : table)
    EXPECT_EQ(cuda::rows_pieces(weight(row.format, row.k, row.group_size)), row.pieces)
        << row.format << " K " << row.k << " group_size " << row.group_size;
}

TEST(LinearCudaPlan, KernelFollowsTypeRowsAndAlignment) {
  LinearParams p;
  p.w = weight("uint4", 4096, 128);
  const auto at = [&](DType t, int64_t m) {
    p.dtype = t;
    p.m = m;
    return cuda::select_linear_cuda_kernel(p);
  };
  EXPECT_EQ(at(DType::kBF16, 1), LinearCudaKernel::kRows);
  EXPECT_EQ(at(DType::kF16, 65535), LinearCudaKernel::kRows);
  EXPECT_EQ(at(DType::kF16, 65536), LinearCudaKernel::kTile);
  EXPECT_EQ(at(DType::kF32, 16), LinearCudaKernel::kDot);
  EXPECT_EQ(at(DType::kF32, 17), LinearCudaKernel::kTile);
  EXPECT_EQ(at(DType::kF64, 1), LinearCudaKernel::kDot);
  p.w.codes = aligned_bytes + 1;
  EXPECT_EQ(at(DType::kBF16, 1), LinearCudaKernel::kDot);
  p.w = weight("uint5", 4096, 64);
  EXPECT_EQ(at(DType::kBF16, 1), LinearCudaKernel::kDot);
}

TEST(LinearCudaPlan, BlocksFillTheDeviceAboutOnceAndNoWarpIsIdle) {
  EXPECT_EQ(cuda::rows_warps(128, 32, 132), 16);  // 4096 x 4096
  EXPECT_EQ(cuda::rows_warps(256, 64, 132), 8);   // 8192 x 8192
  EXPECT_EQ(cuda::rows_warps(448, 32, 132), 4);   // 14336 x 4096
  EXPECT_EQ(cuda::rows_warps(4000, 32, 132), 4);  // a vocabulary
  EXPECT_EQ(cuda::rows_warps(18, 5, 132), 8);     // 576 x 576
  EXPECT_EQ(cuda::rows_warps(1, 1, 132), 4);
}

TEST(LinearCudaPlan, ManyRowsOfXPreferADenseLibraryButFloat64Never) {
  EXPECT_FALSE(cuda::linear_prefer_dense(64, DType::kBF16));
  EXPECT_TRUE(cuda::linear_prefer_dense(128, DType::kF16));
  EXPECT_FALSE(cuda::linear_prefer_dense(1, DType::kF32));
  EXPECT_TRUE(cuda::linear_prefer_dense(64, DType::kF32));
  EXPECT_FALSE(cuda::linear_prefer_dense(1000, DType::kF64));
}

TEST(LinearCudaPlan, XIsStagedForAPermutationOrOddAlignment) {
  LinearParams p;
  p.w = weight("uint4", 4096, 128);
  p.x = aligned_bytes;
  p.m = 2;
  p.x_stride = 4096;
  EXPECT_FALSE(cuda::rows_need_staged_x(p));
  p.x_stride = 4097;
  EXPECT_TRUE(cuda::rows_need_staged_x(p));
  p.m = 1;
  EXPECT_FALSE(cuda::rows_need_staged_x(p));
  p.x = aligned_bytes + 2;
  EXPECT_TRUE(cuda::rows_need_staged_x(p));
  p.x = aligned_bytes;
  const int32_t perm = 0;
  p.w.perm = &perm;
  EXPECT_TRUE(cuda::rows_need_staged_x(p));
}

TEST(LinearA8CudaPlan, AGroupWhoseIntegersMeetInOnePlaceGoesToTheMatrixUnits) {
  LinearA8Params p;
  const auto at = [&](const char* format, int64_t k, int64_t group_size) {
    p.w = weight(format, k, group_size);
    return cuda::select_linear_a8_cuda_kernel(p);
  };
  EXPECT_EQ(at("ternary", 4096, 4096), LinearA8CudaKernel::kRows);
  EXPECT_EQ(at("uint4", 4096, 128), LinearA8CudaKernel::kRows);
  EXPECT_EQ(at("uint4", 4096, 32), LinearA8CudaKernel::kRows);
  EXPECT_EQ(at("uint4", 4096, 256), LinearA8CudaKernel::kDot);
  EXPECT_EQ(at("uint8", 65536, 65536), LinearA8CudaKernel::kRows);
  EXPECT_EQ(at("uint8", 65568, 65568), LinearA8CudaKernel::kDot);
  EXPECT_EQ(at("uint3", 4096, 128), LinearA8CudaKernel::kDot);
}

}  // namespace
}  // namespace subbyte
