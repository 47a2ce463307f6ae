"""The operations as functions of tensors and packed weights. Formulas and error bounds: the headers subbyte/ops/<op>/<op>.h."""

from .layouts import binary_layout, nibble_layout
from .packed import dequantize, embedding, linear, linear_a8, pack, permute_rows, quantize, unpack
from .quantized import quantized_conv2d, quantized_linear, quantized_matmul
from .ternary import (
    absmax_scale,
    activation_quant,
    bitlinear,
    check_ternary,
    estimate_memory_savings,
    greedy_ternary_decomposition,
    multi_ternary_linear,
    pack_ternary,
    pack_ternary_base3,
    ternarize,
    ternary_quantize,
    unpack_ternary_base3,
    weight_to_ternary,
)

__all__ = [
    "absmax_scale",
    "activation_quant",
    "binary_layout",
    "bitlinear",
    "check_ternary",
    "dequantize",
    "embedding",
    "estimate_memory_savings",
    "greedy_ternary_decomposition",
    "linear",
    "linear_a8",
    "multi_ternary_linear",
    "nibble_layout",
    "pack",
    "pack_ternary",
    "pack_ternary_base3",
    "permute_rows",
    "quantize",
    "quantized_conv2d",
    "quantized_linear",
    "quantized_matmul",
    "ternarize",
    "ternary_quantize",
    "unpack",
    "unpack_ternary_base3",
    "weight_to_ternary",
]
