// Few rows of x on the matrix units, codes of 2 bits: see rows_mma_cuda.h.
#include "subbyte/ops/linear/rows_mma_cuda.h"

namespace subbyte::cuda {

void launch_rows_2(const LinearParams& p, Stream stream) {
  if (rows_pieces(p.w) == 1) launch_rows_pieces<2, 1>(rows_view(p), stream);
  else launch_rows_pieces<2, 2>(rows_view(p), stream);
}

}  // namespace subbyte::cuda
