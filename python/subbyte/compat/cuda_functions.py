"""bitorch_engine.functions.cuda: packing functions. They run where their input lies, on the CPU as well.

Differences from the original are corrections, each named in docs/porting.md under "Packing functions".
"""

import torch
import torch.nn.functional as F

from ..functional import pack, unpack

_CODES_A_WORD = 16  # fp32toint4: 4-bit codes in an int64
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _packed_rows(codes, format):
    packed = pack(codes.reshape(codes.shape[:-1].numel(), codes.shape[-1]), format)
    return packed.reshape(*codes.shape[:-1], packed.shape[-1])


def _unpacked_rows(packed, format, columns):
    rows = unpack(packed.reshape(packed.shape[:-1].numel(), packed.shape[-1]), format, columns)
    return rows.reshape(*packed.shape[:-1], columns)


def tensor_to_packed_uint8(input):
    """Signs [..., C], packed along the last axis: uint8 [..., ceil(C / 8)], bit i of byte j is 1 where x[8j + i] >= 0.

    Bits past C are 0, as if x were padded with -1.
    """
    if input.dim() == 0 or input.is_complex():
        raise ValueError(f"tensor_to_packed_uint8: input is {input.dtype} {list(input.shape)}, expected real numbers [..., C]")
    return _packed_rows((input.detach() >= 0).to(torch.uint8), "sign")


def unpack_uint8_tensor(input, scale):
    """(2 bit - 1) * scale: [..., 8P] of scale's dtype from uint8 [..., P] and a float scale that broadcasts, e.g. [..., 1]."""
    if input.dtype != torch.uint8 or input.dim() == 0:
        raise ValueError(f"unpack_uint8_tensor: input is {input.dtype} {list(input.shape)}, expected uint8 [..., P]")
    if not scale.is_floating_point():
        raise ValueError(f"unpack_uint8_tensor: scale is {scale.dtype}, expected a floating point tensor")
    bits = _unpacked_rows(input, "sign", 8 * input.shape[-1])
    return (2 * bits.to(scale.dtype) - 1) * scale


def q4_pack_tensor(input, is_transpose=False):
    """4-bit integers [..., C] to int8 [..., ceil(C / 2)]: the even column in the high nibble, the odd one in the low.

    Values are taken modulo 16 (two's complement); an odd C leaves the last low nibble 0. is_transpose swaps the last two axes
    of the values first, so the result is the packed transpose.
    """
    if input.dtype not in _INTEGERS or input.dim() < 1 + int(is_transpose):
        raise ValueError(
            f"q4_pack_tensor: input is {input.dtype} {list(input.shape)}, expected integers (int32) [..., C]"
            + (" of rank 2 or more" if is_transpose else "")
        )
    values = input.transpose(-1, -2) if is_transpose else input
    codes = F.pad(values.remainder(16).to(torch.uint8), (0, values.shape[-1] % 2))
    swapped = codes.unflatten(-1, (codes.shape[-1] // 2, 2)).flip(-1).flatten(-2)
    return _packed_rows(swapped, "uint4").view(torch.int8)


def q4_unpack_tensor(input, is_transpose=False, signed=True):
    """The inverse of q4_pack_tensor: int32 [..., 2P] from int8 [..., P], values -8..7 (signed=False: nibbles 0..15).

    is_transpose swaps the last two axes of the values, so it undoes q4_pack_tensor(..., is_transpose=True).
    """
    if input.dtype not in (torch.int8, torch.uint8) or input.dim() < 1 + int(is_transpose):
        raise ValueError(f"q4_unpack_tensor: input is {input.dtype} {list(input.shape)}, expected int8 [..., P]")
    codes = _unpacked_rows(input.contiguous().view(torch.uint8), "uint4", 2 * input.shape[-1])
    values = codes.unflatten(-1, (codes.shape[-1] // 2, 2)).flip(-1).flatten(-2).to(torch.int32)
    if signed:
        values = torch.where(values > 7, values - 16, values)
    return values.transpose(-1, -2).contiguous() if is_transpose else values


def q4_unpack_and_scaling_tensor(input, scale, is_transpose=False):
    """q4_unpack_tensor(input, is_transpose) * scale, float32; scale is a number or a tensor that broadcasts."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    return q4_unpack_tensor(input, is_transpose).float() * scale


def fp32toint4(input, return_range=False):
    """Affine 4-bit codes over the whole tensor: code = rnd(15 (x - min) / (max - min)), 16 codes an int64, first code lowest.

    Returns int64 [ceil(numel / 16)], flat, zero codes past the end; with return_range, (words, min, max), so that
    x is about min + code * (max - min) / 15. A constant tensor has codes 0.
    """
    if not input.is_floating_point():
        raise ValueError(f"fp32toint4: input is {input.dtype}, expected a floating point tensor")
    x = input.detach().float().reshape(-1)
    if x.numel() == 0:
        words, low, high = x.new_zeros(0, dtype=torch.int64), x.new_zeros(()), x.new_zeros(())
    else:
        low, high = x.aminmax()
        width = high - low
        codes = torch.where(width > 0, (15 * ((x - low) / width)).round(), torch.zeros_like(x)).to(torch.uint8)
        codes = F.pad(codes, (0, -codes.numel() % _CODES_A_WORD)).reshape(1, -1)
        words = pack(codes, "uint4").reshape(-1).view(torch.int64)
    return (words, low, high) if return_range else words
