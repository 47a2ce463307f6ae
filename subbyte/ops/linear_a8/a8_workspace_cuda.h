// What the kernels of linear_a8 share: the workspace that holds the quantized x. Included by .cu files only.
#pragma once
#include "subbyte/base/cuda_launch.h"
#include "subbyte/ops/linear_a8/linear_a8_cuda.h"

namespace subbyte::cuda {

// xq int8 [M, groups, group_pitch] (a group padded with zeros to a multiple of 16), scales float [M, groups], group sums of xq
// int32 [M, groups]; offsets in bytes from the workspace's start.
struct A8Workspace {
  int64_t groups = 0, group_pitch = 0, row_pitch = 0;
  int64_t scales_at = 0, sums_at = 0, bytes = 0;
};
inline A8Workspace a8_workspace(const LinearA8Params& p) {
  A8Workspace ws;
  ws.groups = p.w.groups();
  ws.group_pitch = round_up(min_i64(p.w.group_size, max_i64(p.w.k, 1)), 16);
  ws.row_pitch = ws.groups * ws.group_pitch;
  ws.scales_at = round_up(p.m * ws.row_pitch, 64);
  ws.sums_at = ws.scales_at + round_up(p.m * ws.groups * 4, 64);
  ws.bytes = ws.sums_at + round_up(p.m * ws.groups * 4, 64);
  return ws;
}

// The product on the matrix units; rows_pieces(p.w) != 0, groups below 65536 columns, codes 16-byte aligned.
void launch_a8_rows(const LinearA8Params& p, const A8Workspace& ws, Stream stream);

}  // namespace subbyte::cuda
