"""Layouts in which other libraries store sign and 4-bit weights."""

from .. import _library

_ops = _library.load()

_ONE_BIT = ("sign", "pack8", "cpp_col", "bstc", "bstc_truncated", "btc", "conv_cpp", "conv_cutlass")
_FOUR_BIT = ("uint4", "q4", "q4_conv")


def _expect_layout(op, argument, name, known):
    if name not in known:
        raise ValueError(f"{op}: {argument} is {name!r}, expected one of {', '.join(known)}")


def binary_layout(codes, from_layout, to_layout, n, k, missing=None):
    """Sign weights of a matrix [n, k] from one packed layout to another.

    Layouts, with the place of element (n, k) in the bytes (subbyte/io/foreign_layout.h; a 1 bit is +1):

    "sign", "pack8"    [n, ceil(k/8)]: bit k%8 of byte k//8 of row n. What subbyte computes with
    "cpp_col"          byte (k//8)*N + n, bit k%8
    "bstc"             32-bit big-endian words, word (k//32)*R + n, bit 31 - k%32; R = N rounded up to 32
    "bstc_truncated"   the first N*K//8 bytes of it, as the original files hold it
    "btc"              tiles of 8 x 128; exists for N % 8 == 0 and K % 128 == 0 only
    "conv_cpp", "conv_cutlass"  one stream of N*K bits over [O, C, kh, kw] in row-major order (n = O, k = C*kh*kw)

    Args:
        codes: uint8 or int8 of any shape with the bytes of from_layout.
        missing: 0 or 1 (-1 or +1) for weights that a truncated buffer lacks. None: lacking weights are a ValueError.

    Returns uint8, [n, ceil(k/8)] for "sign" and "pack8", else a vector. Spare bits are 0.
    """
    _expect_layout("binary_layout", "from_layout", from_layout, _ONE_BIT)
    _expect_layout("binary_layout", "to_layout", to_layout, _ONE_BIT)
    return _ops.relayout(codes, from_layout, to_layout, n, k, missing)


def nibble_layout(codes, from_layout, to_layout, n, k):
    """4-bit weights of a matrix [n, k] from one packed layout to another.

    "uint4"    [n, ceil(k/2)], canonical: low four bits first, code = value + 8
    "q4"       [n, ceil(k/2)], two's complement, even k in the high four bits
    "q4_conv"  one stream of q4 bytes over [O, C, kh, kw] in row-major order (n = O, k = C*kh*kw)

    Returns uint8; view it as int8 where a file wants that.
    """
    _expect_layout("nibble_layout", "from_layout", from_layout, _FOUR_BIT)
    _expect_layout("nibble_layout", "to_layout", to_layout, _FOUR_BIT)
    return _ops.relayout(codes, from_layout, to_layout, n, k, None)
