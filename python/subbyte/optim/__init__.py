"""Optimizers that step packed weights as they are, and ordinary parameters beside them."""

from .diode_mix import DiodeMix
from .galore import GaLoreProjector
from .packed import PackedAdamW, PackedLion, PackedSGD

__all__ = ["DiodeMix", "GaLoreProjector", "PackedAdamW", "PackedLion", "PackedSGD"]
