// What every CUDA op needs around a launch. Included by .cu files only.
#pragma once
#include <cuda_runtime.h>

#include "subbyte/base/error.h"
#include "subbyte/base/int_math.h"
#include "subbyte/base/stream.h"

namespace subbyte::cuda {

inline cudaStream_t stream_of(Stream s) { return static_cast<cudaStream_t>(s.handle); }

// Throws DeviceError with the runtime's own text.
void check(cudaError_t status, const char* op);
// After a launch: reports a refused launch, and an earlier asynchronous error of the same context. Does not wait.
inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

// What selection asks of a device.
struct DeviceInfo {
  int multiprocessors = 0;
  int capability = 0;              // 90 for compute capability 9.0
  int shared_bytes_per_block = 0;  // the limit a kernel may be raised to
};
// Of the calling thread's current device; asked once per device and kept.
const DeviceInfo& device_info();

// A launch over `rows` rows of `runs` columns each: blocks of 256 threads, a thread keeps its column and steps through rows
// (row = blockIdx.y * blockDim.y + threadIdx.y, step gridDim.y * blockDim.y), so that what depends on the column alone is
// computed once. About rows_per_thread rows fall to a thread.
struct RowGrid {
  dim3 grid, block;
};
inline RowGrid row_grid(int64_t rows, int64_t runs, int64_t rows_per_thread) {
  unsigned bx = 1;
  while (bx < 256 && bx < runs) bx *= 2;
  const unsigned by = 256 / bx;
  const int64_t gy = max_i64(1, min_i64(ceil_div(rows, by * rows_per_thread), 65535));
  return {dim3(unsigned(min_i64(ceil_div(runs, bx), 0x7fffffff)), unsigned(gy)), dim3(bx, by)};
}

}  // namespace subbyte::cuda
