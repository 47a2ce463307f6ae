#include "subbyte/base/value_watch.h"

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "subbyte/base/cuda_launch.h"

namespace subbyte::cuda {
namespace {

enum class Kind : int { kIndex, kFiniteScale, kPositiveScale, kFiniteValue, kCode };

// In pinned host memory, one a device. The host counts generations; the first device thread of a generation to find a bad value
// fills the report and publishes it under that number. Claims are made in device memory: atomics on host memory need not work.
struct Report {
  unsigned generation;  // written by the host
  unsigned published;   // written by the device
  Kind kind;
  const char *op, *name;
  int64_t row, column, integer, limit;
  double number;
};

__device__ unsigned claimed_generation = 0;

__device__ void fill(Report* to, const Report& found) {
  const unsigned generation = *static_cast<volatile unsigned*>(&to->generation);
  if (atomicMax(&claimed_generation, generation) >= generation) return;
  to->kind = found.kind;
  to->op = found.op;
  to->name = found.name;
  to->row = found.row;
  to->column = found.column;
  to->integer = found.integer;
  to->limit = found.limit;
  to->number = found.number;
  __threadfence_system();
  *static_cast<volatile unsigned*>(&to->published) = generation;
}

// Position i of `count`; a row of a matrix where columns > 0.
template <class Bad>
__global__ void __launch_bounds__(256) watch_kernel(Bad bad, int64_t count, Report* report, Report what) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    if (bad(i, what)) return fill(report, what);
}

__device__ bool is_finite(double v) { return fabs(v) <= 1.7976931348623157e308; }

struct BadIndex {
  const void* indices;
  bool are_int64;
  __device__ bool operator()(int64_t i, Report& what) const {
    const int64_t v = are_int64 ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
    what.row = i;
    what.integer = v;
    return v < 0 || v >= what.limit;
  }
};

struct BadNumber {
  const void* values;
  DType dtype;
  int64_t columns, stride;
  __device__ bool operator()(int64_t i, Report& what) const {
    what.row = i / columns;
    what.column = i % columns;
    what.number = load_double(values, dtype, what.row * stride + what.column);
    return !is_finite(what.number);
  }
};

struct BadScale {
  WatchedScale scales[2];
  bool positive;
  __device__ bool operator()(int64_t i, Report& what) const {
    const WatchedScale& s = scales[i];
    what.name = s.name;
    what.number = load_double(s.value, s.dtype, 0);
    return !is_finite(what.number) || (positive && what.number <= 0);
  }
};

struct BadCode {
  const uint8_t* codes;
  int64_t columns, stride;
  __device__ bool operator()(int64_t i, Report& what) const {
    what.row = i / columns;
    what.column = i % columns;
    what.integer = codes[what.row * stride + what.column];
    return what.integer >= what.limit;
  }
};

constexpr int kDevices = 64;

// kDevices reports.
Report* report_memory() {
  static Report* const memory = [] {
    // The first op of a process may run while a stream is being captured, when allocating is otherwise refused.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "value watch");
    void* p = nullptr;
    const cudaError_t status = cudaHostAlloc(&p, kDevices * sizeof(Report), cudaHostAllocPortable | cudaHostAllocMapped);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "value watch");
    check(status, "value watch");
    Report* const reports = static_cast<Report*>(p);
    for (int i = 0; i < kDevices; ++i) {
      reports[i] = Report{};
      reports[i].generation = 1;
    }
    return reports;
  }();
  return memory;
}

std::atomic<bool>& waits() {
  static std::atomic<bool> value{[] {
    const char* said = std::getenv("SUBBYTE_DEVICE_CHECKS");
    if (said == nullptr || *said == 0 || std::strcmp(said, "deferred") == 0) return false;
    check_arg(std::strcmp(said, "wait") == 0, "SUBBYTE_DEVICE_CHECKS is '", said, "', expected deferred or wait");
    return true;
  }()};
  return value;
}

// The devices on which something has been watched, a bit each: a process without a GPU never touches CUDA here.
std::atomic<uint64_t> watched_devices{0};

template <class Bad>
void launch(const Bad& bad, int64_t count, Kind kind, int64_t limit, const char* op, const char* name, Stream stream) {
  if (count <= 0) return;
  int device = 0;
  check(cudaGetDevice(&device), op);
  if (device >= kDevices) throw DeviceError("device query: more than 64 devices");
  Report* const report = report_memory() + device;
  watched_devices.fetch_or(uint64_t(1) << device, std::memory_order_release);
  Report what{};
  what.kind = kind;
  what.op = op;
  what.name = name;
  what.limit = limit;
  const unsigned blocks = unsigned(min_i64(ceil_div(count, 256), 4096));
  watch_kernel<<<blocks, 256, 0, stream_of(stream)>>>(bad, count, report, what);
  check(cudaGetLastError(), op);
  if (!watch_waits()) return;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(stream), &capturing), op);
  if (capturing != cudaStreamCaptureStatusNone) return;
  check(cudaStreamSynchronize(stream_of(stream)), op);
  throw_watched();
}

}  // namespace

void watch_indices(const void* indices, bool are_int64, int64_t count, int64_t limit, const char* op, const char* name,
                   Stream stream) {
  launch(BadIndex{indices, are_int64}, count, Kind::kIndex, limit, op, name, stream);
}

void watch_scales(const WatchedScale& first, const WatchedScale& second, ScaleRange range, const char* op, Stream stream) {
  const bool positive = range == ScaleRange::kPositive;
  launch(BadScale{{first, second}, positive}, second.value != nullptr ? 2 : 1,
         positive ? Kind::kPositiveScale : Kind::kFiniteScale, 0, op, first.name, stream);
}

void watch_finite(const void* values, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, const char* op,
                  const char* name, Stream stream) {
  launch(BadNumber{values, dtype, max_i64(1, columns), row_stride}, rows * columns, Kind::kFiniteValue, 0, op, name, stream);
}

void watch_codes(const uint8_t* codes, int64_t rows, int64_t columns, int64_t row_stride, int levels, const char* op,
                 const char* name, Stream stream) {
  if (levels >= 256) return;
  launch(BadCode{codes, max_i64(1, columns), row_stride}, rows * columns, Kind::kCode, levels, op, name, stream);
}

namespace {

// The report of a device, taken once.
bool take(Report& report, Report& out) {
  std::atomic_ref<unsigned> published(report.published);
  std::atomic_ref<unsigned> generation(report.generation);
  if (published.load(std::memory_order_acquire) != generation.load(std::memory_order_relaxed)) return false;
  static std::mutex one_reader;
  const std::lock_guard lock(one_reader);
  const unsigned now = generation.load(std::memory_order_relaxed);
  if (published.load(std::memory_order_acquire) != now) return false;
  out = report;
  generation.store(now + 1, std::memory_order_release);
  return true;
}

}  // namespace

void throw_watched() {
  uint64_t devices = watched_devices.load(std::memory_order_acquire);
  Report r{};
  for (;; devices &= devices - 1) {
    if (devices == 0) return;
    if (take(report_memory()[std::countr_zero(devices)], r)) break;
  }
  const char* const found = " (found on the GPU, which reports when the work is done)";
  switch (r.kind) {
    case Kind::kIndex:
      throw std::out_of_range(detail::concat(r.op, ": ", r.name, " ", r.integer, " at position ", r.row,
                                             " is outside the table, expected 0 <= index < ", r.limit, found));
    case Kind::kFiniteScale:
    case Kind::kPositiveScale:
      throw std::invalid_argument(detail::concat(
          r.op, ": ", r.name, " is ", r.number,
          r.kind == Kind::kPositiveScale ? ", expected a finite number above 0" : ", expected a finite number", found));
    case Kind::kFiniteValue:
      throw std::invalid_argument(
          detail::concat(r.op, ": ", r.name, "[", r.row, ", ", r.column, "] is ", r.number, ", expected finite values", found));
    case Kind::kCode:
      throw std::invalid_argument(detail::concat(r.op, ": ", r.name, " ", r.integer, " at [", r.row, ", ", r.column,
                                                 "] is outside the format, expected below ", r.limit, found));
  }
}

void set_watch_waits(bool value) { waits().store(value); }
bool watch_waits() { return waits().load(std::memory_order_relaxed); }

}  // namespace subbyte::cuda
