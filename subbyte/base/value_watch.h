// Values that only a device sees. The CPU entry of an op refuses an index outside the table or a scale that is NaN before
// anything is written. A CUDA entry cannot look without waiting, so it launches a kernel that looks, and goes on; what the op
// makes of a bad value is defined and harmless (rows of NaN, rows left out). The first bad value is left in pinned host memory
// and thrown
//   * by throw_watched(), which looks without waiting: the LibTorch layer calls it at the start of every CUDA op, so that the
//   op
//     after the bad one throws; C++ programs call it after they have waited for the stream, or
//   * by the op itself, before it computes, after set_watch_waits(true) or with SUBBYTE_DEVICE_CHECKS=wait in the environment.
//   A
//     stream that is being captured into a graph is never waited for.
// Errors: std::out_of_range for an index, std::invalid_argument for any other value; the text names op, argument, value,
// position and expectation, and says that a device found it. One report is kept; bad values found before it is thrown are not
// added. Threads: any. Cost: one launch of a few microseconds an argument.
#pragma once
#include <cstdint>

#include "subbyte/base/dtype.h"
#include "subbyte/base/stream.h"

namespace subbyte::cuda {

enum class ScaleRange : uint8_t { kFinite, kPositive };  // kPositive: finite and above 0

// `op` and `name` are string literals: their addresses travel through the device.
// 0 <= indices[i] < limit.
void watch_indices(const void* indices, bool are_int64, int64_t count, int64_t limit, const char* op, const char* name,
                   Stream stream);
// One number each, on the device. Two of them are one launch; `second.value` may be null.
struct WatchedScale {
  const void* value = nullptr;
  DType dtype = DType::kF32;
  const char* name = nullptr;
};
void watch_scales(const WatchedScale& first, const WatchedScale& second, ScaleRange range, const char* op, Stream stream);
// Every value of rows of `columns` numbers is finite.
void watch_finite(const void* values, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, const char* op,
                  const char* name, Stream stream);
// Every byte of rows of `columns` codes is below `levels`.
void watch_codes(const uint8_t* codes, int64_t rows, int64_t columns, int64_t row_stride, int levels, const char* op,
                 const char* name, Stream stream);

// Throws what a device has reported so far, and forgets it.
void throw_watched();
void set_watch_waits(bool waits);
bool watch_waits();

}  // namespace subbyte::cuda
