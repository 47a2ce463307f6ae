"""bitlinear.quantization."""

from ...functional import absmax_scale, activation_quant, ternary_quantize, weight_to_ternary

__all__ = ["absmax_scale", "activation_quant", "ternary_quantize", "weight_to_ternary"]
