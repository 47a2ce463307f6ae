// The kernels of linear_a8 and how one is chosen. A kernel is a pair of functions over a job: `prepare` quantizes rows of x
// into the workspace in the order the kernel reads, `run` multiplies rows of the weight. Two shapes of kernel:
//   rowdot  few rows of x: dot products along the packed row, no decoding; x split into 8 / bits streams. 1, 2, 4, 8 bits.
//   panel   any shape: a strip of weight rows decoded to bytes and transposed once, a dense integer tile over all of x
#pragma once
#include <span>

#include "subbyte/base/cpu_features.h"
#include "subbyte/ops/linear_a8/linear_a8.h"

namespace subbyte {

// One uniform part of the row, as kernels see it. Offsets of x and sums are within one row (rowdot) or tile (panel) of x.
struct LinearA8Segment {
  int bits = 8;
  int middle = 128;  // c of linear_a8.h
  int64_t k_begin = 0, k_count = 0;
  int64_t byte_begin = 0, byte_count = 0;    // in a row of codes
  int64_t group_begin = 0, group_count = 0;  // in a row of scales
  float fixed_zero = 0;
  int64_t block_begin = 0;    // rowdot: vectors of packed codes before this segment
  int64_t x_begin_bytes = 0;  // rowdot: bytes of streams before this segment
};

// Everything a kernel reads: the call, its uniform segments, and where things lie in the workspace.
struct LinearA8Job {
  LinearA8Params p;
  LinearA8Segment segments[RowLayout::kMaxSegments];
  int segment_count = 0;
  int64_t group_size = 1;         // at most K
  int64_t padded_group_size = 1;  // panel: group_size rounded up to 4 columns
  int64_t groups = 0;
  bool has_offset = false;  // some weight at the middle code is not 0: the sums of x are needed

  // x, quantized. Rows of x come in tiles of `tile_rows`: 1 for rowdot, 4 for panel. Element (m, g) of `sums` and
  // `group_scales` is [m / tile_rows][g][m % tile_rows], tiles `group_stride` elements apart.
  int64_t tile_rows = 1, tiles = 0, group_stride = 0;
  int8_t* columns = nullptr;  // [M][column_stride] in stored order, zero after K
  int64_t column_stride = 0;
  int8_t* x = nullptr;            // rowdot: [M][stream bytes]; panel: [M/4][padded K / 4][4][4]
  int64_t x_stride_bytes = 0;     // from row to row, or tile to tile
  int32_t* starts = nullptr;      // -c * sum of x: rowdot for each lane [M][blocks][lanes]; panel for each group, as `sums`
  int64_t start_stride = 0;       // elements
  float* sums = nullptr;          // e, times the group's scale of x under kRowGroup
  float* group_scales = nullptr;  // scale of x, under kRowGroup
  float* row_scales = nullptr;    // [M]: xs under kRow, 1 under kRowGroup, NaN for a row that holds NaN or infinity
};

struct LinearA8Kernel {
  const char* name;
  Isa isa;
  enum class Shape : uint8_t { kRowdot, kPanel, kReference } shape;
  int64_t max_m;       // rows of x up to which the kernel is chosen; it serves any number
  int vector_bytes;    // of one packed block (rowdot)
  int rows_of_weight;  // grain of the loop over N
  bool centers_bytes;  // 8-bit codes are taken as code - 128, so their starts are 0
  void (*prepare)(const LinearA8Job& job, int64_t m_begin, int64_t m_end) noexcept;  // m_begin a multiple of tile_rows
  void (*run)(const LinearA8Job& job, int64_t n_begin, int64_t n_end) noexcept;
};

// Best first; the last row is the reference, which serves everything.
std::span<const LinearA8Kernel> linear_a8_kernels();
// Whether a kernel can compute this shape at all (its instruction set aside).
bool serves(const LinearA8Kernel& kernel, const RowLayout& layout, int64_t group_size);
// The first row of the table that `isa` includes, that serves the shape and whose max_m is at least m.
const LinearA8Kernel& select_linear_a8_kernel(int64_t m, const RowLayout& layout, int64_t group_size, Isa isa);

// linear_a8 and its workspace with a given kernel; the caller has checked serves() and the instruction set.
int64_t linear_a8_workspace_bytes(const LinearA8Kernel& kernel, const LinearA8Params& p);
void linear_a8(const LinearA8Kernel& kernel, const LinearA8Params& p);

}  // namespace subbyte
