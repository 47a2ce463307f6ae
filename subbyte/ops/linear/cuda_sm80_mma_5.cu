// Few rows of x on the matrix units, codes of 5 bits: see rows_mma_cuda.h.
#include "subbyte/ops/linear/rows_mma_cuda.h"

namespace subbyte::cuda {

void launch_rows_5(const LinearParams& p, Stream stream) { launch_rows_pieces<5, 1>(rows_view(p), stream); }

}  // namespace subbyte::cuda
