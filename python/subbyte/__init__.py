"""subbyte: neural networks with 1- to 8-bit packed weights, run and trained on stock PyTorch.

model = ...                                   any torch.nn model
print(subbyte.quantize_(model, bits=4))       pack its weights in place
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)     they train as they are
subbyte.save(model, "model.safetensors")
"""

from . import _library
from ._library import info  # noqa: E402

_library.load()
__version__ = info()["version"]

from . import distributed, functional, mpq, nn, optim  # noqa: E402
from .checkpoint import FormatError, TensorFile, load, load_weights_, replacing, save  # noqa: E402
from .conversion import LayerReport, QuantizeReport, drop_residuals_, quantize_  # noqa: E402
from .device_checks import raise_device_errors, set_device_checks  # noqa: E402
from .doctor import doctor  # noqa: E402
from .gguf import load_gguf  # noqa: E402
from .packed_weight import PackedWeight, set_rounding_generator  # noqa: E402
from .transformers_gguf import llama_tensors, model_from_gguf  # noqa: E402

__all__ = [
    "FormatError",
    "LayerReport",
    "PackedWeight",
    "QuantizeReport",
    "TensorFile",
    "distributed",
    "doctor",
    "drop_residuals_",
    "functional",
    "info",
    "llama_tensors",
    "load",
    "load_gguf",
    "load_weights_",
    "model_from_gguf",
    "mpq",
    "nn",
    "optim",
    "quantize_",
    "raise_device_errors",
    "replacing",
    "save",
    "set_device_checks",
    "set_rounding_generator",
]
