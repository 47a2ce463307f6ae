"""The operations as functions of tensors and packed weights. Formulas and error bounds: the headers subbyte/ops/<op>/<op>.h."""

from .binary import binary_conv2d, binary_linear, binary_matmul, init_binary_weight, pack_signs
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
    "binary_conv2d",
    "binary_layout",
    "binary_linear",
    "binary_matmul",
    "bitlinear",
    "check_ternary",
    "dequantize",
    "embedding",
    "estimate_memory_savings",
    "greedy_ternary_decomposition",
    "init_binary_weight",
    "linear",
    "linear_a8",
    "multi_ternary_linear",
    "nibble_layout",
    "pack",
    "pack_signs",
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
