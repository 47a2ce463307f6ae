"""bitlinear.packing."""

from ...functional import estimate_memory_savings, pack_ternary_base3, unpack_ternary_base3

__all__ = ["estimate_memory_savings", "pack_ternary_base3", "unpack_ternary_base3"]
