#include "subbyte_torch/device_checks.h"

#include <torch/library.h>

#include "subbyte_torch/convert.h"
#if SB_CUDA
#include "subbyte/base/value_watch.h"
#endif

namespace subbyte {

void raise_device_errors() {
#if SB_CUDA
  translated([] { cuda::throw_watched(); });
#endif
}

void set_device_checks_wait([[maybe_unused]] bool wait) {
#if SB_CUDA
  cuda::set_watch_waits(wait);
#endif
}

// Without tensors to dispatch on: they act on the process, whatever the device.
TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def("raise_device_errors() -> ()", raise_device_errors);
  m.def("set_device_checks_wait(bool wait) -> ()", set_device_checks_wait);
}

}  // namespace subbyte
