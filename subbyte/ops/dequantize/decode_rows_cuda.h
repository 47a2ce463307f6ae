// The kernel that dequantize and embedding share: decoded rows of a packed matrix, in order or picked by index.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/formats/packed_matrix.h"

namespace subbyte::cuda {

// out[i, perm[k]] = value of code k of row r, r = i, or indices[i] when indices are given (an index outside [0, N) makes the
// row NaN). All pointers device pointers, sizes validated. `op` names the caller in errors.
void decode_rows(const PackedMatrix& w, const void* indices, bool indices_are_int64, int64_t count, void* out, DType out_dtype,
                 int64_t out_stride, Stream stream, const char* op);

}  // namespace subbyte::cuda
