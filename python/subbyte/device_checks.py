"""Bad values that only the GPU sees: indices outside a table, scales that are NaN or not positive, codes outside their format.

On the CPU an operation refuses them before it computes. On CUDA it would have to wait for the device to look, so it launches the
look and goes on, with a defined, harmless result (rows of NaN, rows left out), and the next subbyte operation on a CUDA tensor
raises the IndexError or ValueError that has been found by then. Nothing asserts on the device; the CUDA context stays usable.
"""

import torch

from . import _library

_ops = _library.load()


def set_device_checks(mode):
    """When CUDA operations raise for bad values: "deferred" (the next operation does) or "wait" (the operation itself, which costs
    a wait for the device in each; also SUBBYTE_DEVICE_CHECKS=wait). A stream under capture is never waited for."""
    if mode not in ("deferred", "wait"):
        raise ValueError(f"set_device_checks: mode is {mode!r}, expected 'deferred' or 'wait'")
    _ops.set_device_checks_wait(mode == "wait")


def raise_device_errors(device=None):
    """Waits for a CUDA device (the current one) and raises the IndexError or ValueError for the first bad value it has found."""
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    _ops.raise_device_errors()
