"""Functions of a PackedWeight."""

import torch
import torch.nn.functional as F

from .. import _library
from ..packed_weight import PackedWeight, _handle

_ops = _library.load()


def _expect_packed(op, weight):
    if not isinstance(weight, PackedWeight) or weight.transposed:
        raise ValueError(
            f"{op}: weight is {type(weight).__name__ if not isinstance(weight, PackedWeight) else 'a transposed view'}, "
            "expected a PackedWeight [N, K]"
        )


def linear(x, weight, bias=None):
    """x [..., K] times weight [N, K] transposed, plus bias [N]: y [..., N] of x's dtype, x kept in its precision.

    Gradients to x, to the weight (dense [N, K]) and to the bias.
    """
    _expect_packed("linear", weight)
    return _ops.linear(x, _handle(weight), *weight.packed_args, bias)


def linear_a8(x, weight, bias=None, x_scale="row"):
    """linear with x rounded to int8 on the way in, and integer products. The gradients are those of linear (straight-through).

    x_scale: "row", one scale a row of x, or "row_group", one a row and weight group.
    """
    _expect_packed("linear_a8", weight)
    return _ops.linear_a8(x, _handle(weight), *weight.packed_args, bias, x_scale)


def embedding(indices, weight, padding_idx=None, sparse=False):
    """Rows indices [...] of a packed table [V, D], [..., D] in the weight's dtype; row padding_idx gets no gradient.

    sparse: the weight's gradient is a sparse COO tensor of the touched rows, so that it costs what was looked up.
    """
    _expect_packed("embedding", weight)
    return F.embedding(indices, weight, padding_idx, sparse=sparse)


def dequantize(weight, dtype=None):
    """The dense values [N, K] of a packed weight as it is deployed, without gradient."""
    if not isinstance(weight, PackedWeight):
        raise ValueError(f"dequantize: weight is {type(weight).__name__}, expected a PackedWeight")
    return weight.dequantize(dtype)


def pack(codes, format):
    """uint8 codes [N, K], one a byte, to canonical code streams [N, row_bytes]."""
    return _ops.pack(codes, format)


def unpack(packed, format, in_features):
    """Canonical code streams [N, row_bytes] to uint8 codes [N, K], one a byte. The inverse of pack."""
    return _ops.unpack(packed, format, in_features)


def quantize(w, *, bits=None, format=None, group_size=64, **options):
    """A float matrix [N, K] as a PackedWeight: PackedWeight.from_float, whose options these are."""
    return PackedWeight.from_float(w, bits=bits, format=format, group_size=group_size, **options)


def permute_rows(weight, rows):
    """The packed weight whose row i is row rows[i] of `weight`: bytes are moved, no value changes."""
    _expect_packed("permute_rows", weight)
    rows = torch.as_tensor(rows, device=weight.device)
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"permute_rows: rows is {rows.dtype} {list(rows.shape)}, expected a vector of integers")
    parts = {name: part if name == "perm" else part.index_select(0, rows) for name, part in weight.parts.items()}
    return PackedWeight(
        **parts,
        format=weight.format,
        in_features=weight.in_features,
        group_size=weight.group_size,
        residual_bits=weight.residual_bits,
        dtype=weight.dtype,
    )
