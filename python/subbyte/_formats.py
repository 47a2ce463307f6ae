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
    if not isinstance(format, str):
        raise ValueError(f"format is {format!r}, expected a name such as 'uint4', or mixed width such as 'uint8*64+uint4*448'")
    if "*" not in format:
        try:
            format_bits(format)  # raises for an unknown name, listing the known ones
        except ValueError as error:
            raise ValueError(str(error).removeprefix("pack: ")) from None
    return format


def resolve_group_size(group_size, in_features):
    is_size = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not is_size or not (1 <= group_size < 2**63 or group_size == -1):
        raise ValueError(f"group_size is {group_size!r}, expected a positive integer, or -1 for a whole row")
    return max(1, in_features) if group_size == -1 else group_size


def _segments(format):
    return [segment.split("*")[0] for segment in format.split("+")]


def check_residual_bits(where, residual_bits, format):
    widest = max(format_bits(name) for name in _segments(format))
    if isinstance(residual_bits, bool) or not isinstance(residual_bits, int) or not 0 <= residual_bits <= 8 - widest:
        raise ValueError(
            f"{where}: residual_bits is {residual_bits!r}, expected 0 (none) to {8 - widest} beside {format}, whose codes have "
            f"{widest} bits"
        )
    return residual_bits


def training_residual_bits(format):
    """The residual that training wants: up to 8 bits together below 4, none from 4 bits on."""
    widest = max(format_bits(name) for name in _segments(format))
    return 8 - widest if widest < 4 else 0


def default_scheme(format, sym, scheme, zero_kind, residual_bits=0):
    """(scheme, zero_kind) as the op wants them."""
    if sym not in (None, True, False) or isinstance(sym, int) and not isinstance(sym, bool):
        raise ValueError(f"sym is {sym!r}, expected True, False or None")
    only_symmetric = all(name in _SYMMETRIC for name in _segments(format))
    if scheme is None and sym is None and zero_kind is None and residual_bits:
        scheme = "midrise"
    if scheme in ("midrise", "fan_in"):
        kind = "fixed" if only_symmetric else "zeros"
        if zero_kind not in (None, kind) or (sym is not None and sym != only_symmetric):
            raise ValueError(
                f"scheme '{scheme}' puts the zero of {format} in the middle of its levels: leave sym and zero_kind out "
                f"(sym={sym!r}, zero_kind={zero_kind!r})"
            )
        return scheme, kind
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


def check_quantize_options(scale_dtype, rounding, seed):
    if scale_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"scale_dtype is {scale_dtype!r}, expected torch.float32, torch.float16, torch.bfloat16 or None")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}, expected 'nearest' or 'stochastic'")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected an integer of 64 bits")


def check_permutation(perm):
    """ValueError unless perm names every column once: kernels would leave the columns that it does not name unwritten."""
    if perm is None or perm.dim() != 1 or perm.is_meta or torch.compiler.is_compiling():
        return  # what is no vector, the op's shape rule names
    if isinstance(perm, torch._subclasses.FakeTensor) or not perm.numel():
        return
    columns = torch.arange(len(perm), device=perm.device)
    if not torch.equal(perm.sort().values.to(columns.dtype), columns):
        raise ValueError(f"perm is no permutation of 0 .. {len(perm) - 1}")
