"""The operations as functions of tensors and packed weights. Formulas and error bounds: the headers subbyte/ops/<op>/<op>.h."""

from .layouts import binary_layout, nibble_layout
from .packed import dequantize, embedding, linear, linear_a8, pack, permute_rows, quantize, unpack
from .quantized import quantized_conv2d, quantized_linear, quantized_matmul

__all__ = [
    "binary_layout",
    "dequantize",
    "embedding",
    "linear",
    "linear_a8",
    "nibble_layout",
    "pack",
    "permute_rows",
    "quantize",
    "quantized_conv2d",
    "quantized_linear",
    "quantized_matmul",
    "unpack",
]
