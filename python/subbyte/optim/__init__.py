"""Optimizers that step packed weights as they are, and ordinary parameters beside them."""

from .packed import PackedAdamW, PackedLion, PackedSGD

__all__ = ["PackedAdamW", "PackedLion", "PackedSGD"]
