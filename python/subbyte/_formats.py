"""What the library says about formats, and the defaults of quantization. Nothing here knows how codes lie in memory."""

import functools

import torch

from . import _library

_ops = _library.load()
_SYMMETRIC = ("sign", "ternary")  # formats that have no other use than around their fixed zero


@functools.lru_cache(maxsize=None)
def format_bits(format, in_features=8):
    """Bits a code: an int, or for mixed width the mean over a row of in_features codes as the library lays it out."""
    if "*" in format:
        return (
            8 * _ops.pack(torch.empty(1, in_features, dtype=torch.uint8, device="meta"), format).shape[1] / max(1, in_features)
        )
    return _ops.pack(torch.empty(1, 8, dtype=torch.uint8, device="meta"), format).shape[1]


def resolve_format(bits, format):
    if (bits is None) == (format is None):
        raise ValueError(f"give one of bits and format (bits={bits!r}, format={format!r})")
    if format is None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"bits is {bits!r}, expected an integer from 1 to 8 (ternary is format='ternary')")
        format = "sign" if bits == 1 else f"uint{bits}"
    if "*" not in format:
        format_bits(format)  # raises for an unknown name, listing the known ones
    return format


def resolve_group_size(group_size, in_features):
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ValueError(f"group_size is {group_size!r}, expected a positive integer, or -1 for a whole row")
    return max(1, in_features) if group_size == -1 else group_size


def default_scheme(format, sym, scheme, zero_kind):
    """(scheme, zero_kind) as the op wants them."""
    names = [segment.split("*")[0] for segment in format.split("+")]
    only_symmetric = all(name in _SYMMETRIC for name in names)
    if sym is None:
        sym = only_symmetric if scheme is None else scheme != "minmax"
    if sym and zero_kind not in (None, "fixed"):
        raise ValueError(f"zero_kind is {zero_kind!r} with sym=True, which means the format's fixed zero")
    if not sym and zero_kind == "fixed":
        raise ValueError("zero_kind is 'fixed' with sym=False")
    zero_kind = "fixed" if sym else zero_kind or "offsets"
    if scheme is None:
        scheme = "minmax" if not sym else "absmean" if only_symmetric else "absmax"
    return scheme, zero_kind
