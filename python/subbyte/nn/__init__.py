"""Modules. One file a family of layers; what a family offers to users is listed here."""

from .packed import Embedding, Linear
from .quantized import QuantizedAttention, QuantizedConv2d, QuantizedLinear, QuantizedMatmul

__all__ = ["Embedding", "Linear", "QuantizedAttention", "QuantizedConv2d", "QuantizedLinear", "QuantizedMatmul"]
