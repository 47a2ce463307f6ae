"""Modules. One file a family of layers; what a family offers to users is listed here."""

from .binary import BinaryAttention, BinaryConv2d, BinaryLinear, BinaryMatmul
from .binary_embedding import BinaryEmbedding, BinaryEmbeddingBag
from .mpq import MPQLinear
from .packed import Embedding, EmbeddingBag, Linear
from .quantized import QuantizedAttention, QuantizedConv2d, QuantizedLinear, QuantizedMatmul
from .ternary import BitLinear, MultiTernaryLinear, convert_linear_to_bitlinear

__all__ = [
    "BinaryAttention",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryEmbeddingBag",
    "BinaryLinear",
    "BinaryMatmul",
    "BitLinear",
    "Embedding",
    "EmbeddingBag",
    "Linear",
    "MPQLinear",
    "MultiTernaryLinear",
    "QuantizedAttention",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedMatmul",
    "convert_linear_to_bitlinear",
]
