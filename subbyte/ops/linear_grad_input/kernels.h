// The kernels of linear_grad_input for float32, float16 and bfloat16 gy, and which of them serves a shape. A kernel computes in
// float32 on one segment of the weight (../linear/weight_segment.h), unit by unit; units are independent of each other.
#pragma once
#include <cstdint>
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/linear/weight_segment.h"

namespace subbyte {

enum class GradInputForm : uint8_t {
  kRows,       // few rows of gy: multiples of decoded weight rows are added up
  kTile,       // many rows: strips of columns are decoded to a float32 panel, then multiplied by a register tile
  kReference,  // linear_grad_input_columns: any dtype, mixed width as a whole
};

// Weight rows whose sum is kept apart by kRows: bounds the chains of additions and gives threads work.
inline constexpr int64_t kGradInputChunk = 512;

struct GradInputTask {
  WeightSegment w;
  const void* gy = nullptr;
  DType dtype = DType::kF32;
  int64_t m = 0;
  int64_t gy_stride = 0;
  // kRows: gy as float32 [M][gy_float_stride]; kTile: [blocks of N][tiles][rows of the block][rows of the tile].
  float* prepared = nullptr;
  const float* gy_float = nullptr;
  int64_t gy_float_stride = 0;
  // kRows. In the order of the fields of each block: the column's group, counted from the block's first group. Null when no
  // group ends inside a block.
  int32_t* group_map = nullptr;
  float* sums = nullptr;  // sums of each chunk [chunks][M][k_padded], on return in stored column order
  int64_t k_padded = 0;
  float* group_sums = nullptr;  // with offsets: [chunks][spans][M][group_stride]
  int64_t group_stride = 0;
  int64_t span_blocks = 0;  // blocks of columns of a unit
  // kTile: out[m, k] for rows [m_begin, m_end), the first rows of tiles (../linear/tile_grid.h) or M, k the segment's column.
  float* out = nullptr;
  int64_t out_stride = 0;
  int64_t m_begin = 0, m_end = 0;
};

struct GradInputKernel {
  const char* name;
  Isa isa;
  GradInputForm form;
  int lanes;
  int tile_rows;  // kTile: rows of gy in a tile
  int64_t max_m;
  // Rows [m_begin, m_end) of the prepared gy; kTile: the tiles that begin there.
  void (*prepare)(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept;
  // kRows: unit = chunk * spans + span. kTile: a unit is a strip of 2 * lanes columns.
  void (*multiply)(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept;
};

std::span<const GradInputKernel> linear_grad_input_kernels();

// Whether the kernel can serve a segment at all: kRows needs groups that do not end inside a lane.
bool linear_grad_input_kernel_serves(const GradInputKernel& kernel, Format format, int64_t group_size, int64_t k, DType dtype);
// The first row of the table that the instruction set has, that serves the segment and whose max_m is not exceeded. A pure
// function; never fails, since the last row is the reference.
const GradInputKernel& select_linear_grad_input_kernel(int64_t m, Format format, int64_t group_size, int64_t k, DType dtype,
                                                       Isa isa);

#define SB_GRAD_INPUT_KERNEL(name, isa, form, lanes, tile_rows, max_m)                     \
  void name##_prepare(const GradInputTask& task, int64_t m_begin, int64_t m_end) noexcept; \
  void name##_multiply(const GradInputTask& task, int64_t unit_begin, int64_t unit_end) noexcept;
#include "subbyte/ops/linear_grad_input/kernels.inc"
#undef SB_GRAD_INPUT_KERNEL

}  // namespace subbyte
