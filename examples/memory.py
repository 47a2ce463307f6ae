"""The memory of this process, measured: PyTorch's allocator on a GPU, the resident set on a CPU."""

from pathlib import Path

import torch


class Memory:
    """Bytes held above those that were held when the object was made.

    On a CPU freed blocks count as long as the C library keeps them: glibc gives large ones back at once with
    MALLOC_MMAP_THRESHOLD_=65536 in the environment.
    """

    def __init__(self, device):
        self.on_gpu, self.before = torch.device(device).type == "cuda", 0
        self.before = self.now()

    @staticmethod
    def _status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

    def now(self):
        return (torch.cuda.memory_allocated() if self.on_gpu else self._status("VmRSS")) - self.before

    def forget_peak(self):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS

    def peak(self):
        """The most that was held since forget_peak()."""
        return (torch.cuda.max_memory_allocated() if self.on_gpu else self._status("VmHWM")) - self.before
