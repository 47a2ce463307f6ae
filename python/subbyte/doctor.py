"""What this installation is and can do, as text: `python -m subbyte`, or subbyte.doctor()."""

import os
import platform
import time

import torch

from . import _library
from .packed_weight import PackedWeight


def _kernels_work(device):
    """One product and its gradient on `device`, held against the dense values. Returns what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    weight = (
        PackedWeight.from_float(torch.randn(48, 96, generator=generator), bits=4, group_size=32).to(device).requires_grad_()
    )
    x = torch.randn(5, 96, generator=generator).to(device)
    y = torch.nn.functional.linear(x, weight)
    y.sum().backward()
    expected = x @ weight.detach().dequantize().t()
    if not torch.allclose(y.detach(), expected, atol=1e-4):
        return f"linear is off by {float((y.detach() - expected).abs().max()):.2g}"
    if not torch.allclose(weight.grad, x.sum(0).expand(48, 96), atol=1e-4):
        return "the gradient of linear is off"
    return None


def doctor():
    """Versions, threads, instruction sets, devices, and whether the kernels give right results, as printable text."""
    info = _library.info()
    lines = [
        f"subbyte   {info['version']}, {info['path']}",
        f"PyTorch   {torch.__version__} (library built with {info['built_with']}), Python {platform.python_version()}",
        f"CPU       {platform.machine()}, {torch.get_num_threads()} threads, "
        f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
    ]
    forced = os.environ.get("SUBBYTE_FORCE_ISA")
    if forced:
        lines.append(f"          SUBBYTE_FORCE_ISA={forced}")
    devices = ["cpu"]
    if not torch.cuda.is_available():
        lines.append("CUDA      no device" + ("" if info["has_cuda"] else "; the library was built without CUDA kernels"))
    elif not info["has_cuda"]:
        lines.append(
            f"CUDA      {torch.cuda.get_device_name()}, but the library was built without CUDA kernels: "
            "install it where nvcc is found"
        )
    else:
        devices.append("cuda")
        lines.append(
            f"CUDA      {torch.cuda.get_device_name()}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}"
        )
    for device in devices:
        begin = time.perf_counter()
        try:
            problem = _kernels_work(device)
        except Exception as error:  # whatever it is, the report should say it
            problem = f"{type(error).__name__}: {error}"
        lines.append(f"check     {device}: {problem or 'results are right'} ({time.perf_counter() - begin:.2f} s)")
    return "\n".join(lines)
