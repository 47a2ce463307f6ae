// Bad values that only the GPU sees (subbyte/base/value_watch.h): indices outside a table, scales that are NaN or not positive,
// codes outside their format. A CUDA op does not wait for the device to look at them; the next subbyte op on a CUDA tensor
// throws the IndexError or ValueError that is found by then.
#pragma once

namespace subbyte {

// Throws what the devices have found so far. Does not wait: synchronise first to be sure of everything queued.
void raise_device_errors();
// true: every op waits for its own checks and throws before it computes (also: SUBBYTE_DEVICE_CHECKS=wait). For debugging.
void set_device_checks_wait(bool wait);

}  // namespace subbyte
