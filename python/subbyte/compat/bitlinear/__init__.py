"""BitLinear 0.1.0: its names on top of subbyte's ternary layers. Submodules functional, layers, quantization and packing."""

from . import functional, layers, packing, quantization
from .functional import activation_quant, bitlinear_python, greedy_ternary_decomposition, multi_ternary_linear_python
from .layers import BitLinear, MultiTernaryLinear, convert_linear_to_bitlinear
from .packing import estimate_memory_savings, pack_ternary_base3, unpack_ternary_base3
from .quantization import absmax_scale, ternary_quantize, weight_to_ternary

__all__ = [
    "BitLinear",
    "MultiTernaryLinear",
    "absmax_scale",
    "activation_quant",
    "bitlinear_python",
    "convert_linear_to_bitlinear",
    "estimate_memory_savings",
    "functional",
    "greedy_ternary_decomposition",
    "layers",
    "multi_ternary_linear_python",
    "pack_ternary_base3",
    "packing",
    "quantization",
    "ternary_quantize",
    "unpack_ternary_base3",
    "weight_to_ternary",
]
