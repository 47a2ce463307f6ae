// The kernels of linear for float32, float16 and bfloat16 x, and which of them serves a shape. A kernel computes in float32 on
// one segment of the weight (weight_segment.h); linear.cc prepares x, walks the segments and rounds the result.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/linear/weight_segment.h"

namespace subbyte {

enum class LinearForm : uint8_t {
  kRows,       // few rows of x: the codes pass through registers once, x lies in the order of the decoded fields
  kTile,       // many rows: strips of weight rows are decoded to a float32 panel, then multiplied by a register tile
  kReference,  // linear_rows: any dtype, mixed width as a whole
};

// x of one segment, made by LinearKernel::prepare.
//   kRows   x [M][blocks][fields][lanes] padded with zeros, group sums [M][sums_stride] padded with zeros when the segment
//           has offsets, lane_groups [blocks][lanes]: the group of each lane, when groups change inside blocks
//   kTile   x [blocks of K][tiles][columns of the block][rows of the tile]
struct LinearInput {
  const void* x = nullptr;  // column 0 of the whole matrix
  DType dtype = DType::kF32;
  int64_t m = 0;
  int64_t x_stride = 0;
  const int32_t* perm = nullptr;
  float* prepared = nullptr;
  float* sums = nullptr;
  int64_t sums_stride = 0;
  int32_t* lane_groups = nullptr;
};

// out[m, n] = (accumulate ? out[m, n] : 0) + sum over the segment's columns + (bias ? bias[n] : 0), m_begin <= m < m_end
struct LinearOutput {
  float* out = nullptr;
  int64_t stride = 0;
  bool accumulate = false;
  const float* bias = nullptr;
  int64_t m_begin = 0, m_end = 0;  // kTile: first rows of tiles (tile_grid.h), or M; kRows: 0 and M
};

struct LinearKernel {
  const char* name;
  Isa isa;
  LinearForm form;
  int lanes;      // float32 lanes of the vector
  int row_step;   // rows of the weight that one pass serves: ranges begin on multiples of it
  int tile_rows;  // kTile: rows of x in a tile
  int64_t max_m;  // most rows of x it is chosen for
  // Rows [m_begin, m_end) of the prepared x; kTile: the tiles that begin there.
  void (*prepare)(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept;
  // Rows [n_begin, n_end) of the weight, rows of x as the output says.
  void (*multiply)(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin,
                   int64_t n_end) noexcept;
};

std::span<const LinearKernel> linear_kernels();

// Whether the kernel can serve a segment at all: kRows needs groups that do not end inside a lane.
bool linear_kernel_serves(const LinearKernel& kernel, Format format, int64_t group_size, int64_t k, DType dtype);
// The first row of the table that the instruction set has, that serves the segment and whose max_m is not exceeded. A pure
// function; never fails, since the last row is the reference.
const LinearKernel& select_linear_kernel(int64_t m, Format format, int64_t group_size, int64_t k, DType dtype, Isa isa);

#define SB_LINEAR_KERNEL(name, isa, form, lanes, row_step, tile_rows, max_m)                                    \
  void name##_prepare(const WeightSegment& w, const LinearInput& in, int64_t m_begin, int64_t m_end) noexcept;  \
  void name##_multiply(const WeightSegment& w, const LinearInput& in, const LinearOutput& out, int64_t n_begin, \
                       int64_t n_end) noexcept;
#include "subbyte/ops/linear/kernels.inc"
#undef SB_LINEAR_KERNEL

}  // namespace subbyte
