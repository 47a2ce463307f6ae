#include <mutex>

#include "subbyte/base/cuda_launch.h"

namespace subbyte::cuda {

void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) [[likely]]
    return;
  throw DeviceError(
      detail::concat(op, ": CUDA error ", int(status), " (", cudaGetErrorName(status), "): ", cudaGetErrorString(status)));
}

const DeviceInfo& device_info() {
  static constexpr int kDevices = 64;
  static DeviceInfo known[kDevices];
  static std::once_flag once[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "device query");
  if (device >= kDevices) throw DeviceError("device query: more than 64 devices");
  std::call_once(once[device], [&] {
    DeviceInfo info;
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device query");
    check(cudaDeviceGetAttribute(&info.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "device query");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device query");
    info.capability = 10 * major + minor;
    known[device] = info;
  });
  return known[device];
}

}  // namespace subbyte::cuda
