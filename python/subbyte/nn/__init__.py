"""Modules. One file a family of layers; what a family offers to users is listed here."""

from .packed import Embedding, Linear

__all__ = ["Embedding", "Linear"]
