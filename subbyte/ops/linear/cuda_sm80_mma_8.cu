// Few rows of x on the matrix units, codes of 8 bits: see rows_mma_cuda.h.
#include "subbyte/ops/linear/rows_mma_cuda.h"

namespace subbyte::cuda {

void launch_rows_8(const LinearParams& p, Stream stream) {
  switch (rows_pieces(p.w)) {
    case 1: launch_rows_pieces<8, 1>(rows_view(p), stream); break;
    case 2: launch_rows_pieces<8, 2>(rows_view(p), stream); break;
    default: launch_rows_pieces<8, 4>(rows_view(p), stream); break;
  }
}

}  // namespace subbyte::cuda
