// Few rows of x on the matrix units, codes of 3 bits: see rows_mma_cuda.h.
#include "subbyte/ops/linear/rows_mma_cuda.h"

namespace subbyte::cuda {

void launch_rows_3(const LinearParams& p, Stream stream) { launch_rows_pieces<3, 1>(rows_view(p), stream); }

}  // namespace subbyte::cuda
