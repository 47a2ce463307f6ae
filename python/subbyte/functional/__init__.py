"""The operations as functions of tensors and packed weights. Formulas and error bounds: the headers subbyte/ops/<op>/<op>.h."""

from .packed import dequantize, embedding, linear, linear_a8, pack, permute_rows, quantize, unpack

__all__ = ["dequantize", "embedding", "linear", "linear_a8", "pack", "permute_rows", "quantize", "unpack"]
