// The queue a device op is put on. Opaque here, so that headers of the core need no CUDA header.
#pragma once

namespace subbyte {

// handle is a cudaStream_t; nullptr is the legacy default stream. The caller keeps it alive.
struct Stream {
  void* handle = nullptr;
};

}  // namespace subbyte
