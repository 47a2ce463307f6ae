// linear_grad_input: the exact tile product of ops/linear/tile_cuda.h with the sum over rows of W.
#include "subbyte/ops/linear/tile_cuda.h"
#include "subbyte/ops/linear_grad_input/linear_grad_input_cuda.h"

namespace subbyte::cuda {

int64_t linear_grad_input_workspace_bytes(const LinearGradInputParams&) { return 0; }

void linear_grad_input(const LinearGradInputParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  TileView v{};
  v.a = p.gy;
  v.a_stride = p.gy_stride;
  v.w = p.w;
  v.groups = p.w.groups();
  v.c = p.gx;
  v.c_stride = p.gx_stride;
  v.m = p.m;
  launch_tile<true>(v, p.dtype, stream, "linear_grad_input");
}

}  // namespace subbyte::cuda
