"""bitorch_engine.utils.quant_operators: the quantizers and the layout functions, on stock PyTorch tensors of any device.

Differences from the original are corrections, each named in docs/porting.md under "Quantizer operators".
"""

import math

import numpy
import torch

from .. import _library
from ..functional import pack

_ops = _library.load()

_NOTHING = 2.0**-24  # nv_tensor_quant: a largest absolute value up to here counts as 0
_WORD_TYPES = {8: "<u1", 16: "<u2", 32: "<u4", 64: "<u8"}


def nv_tensor_quant(inputs, amax=None, num_bits=8, unsigned=False, narrow_range=True):
    """outputs = clamp(rnd(inputs * scale), lower, B) with B = 2^(num_bits - 1 + unsigned) - 1 and scale = B / amax.

    Args:
        inputs: a float tensor of any shape. The arithmetic is float32; outputs has inputs' dtype and holds whole numbers.
        amax: a tensor of inputs' rank that broadcasts against it, or a number; None: max |inputs| over all elements.
        unsigned: lower is 0, and inputs may hold no negative value.
        narrow_range: lower is -B, otherwise -B - 1.

    Returns:
        (outputs, scale), scale float32 of amax's shape. Where amax is at most 2^-24, outputs is 0 and scale is 1.

    Raises:
        ValueError: amax has another rank than inputs, or is negative. TypeError: unsigned with negative inputs.
    """
    values = inputs.detach().float() if not inputs.requires_grad else inputs.float()
    if amax is None:
        amax = values.abs().amax() if values.numel() else values.new_zeros(())
    elif isinstance(amax, torch.Tensor):
        if amax.dim() != inputs.dim():
            raise ValueError(f"nv_tensor_quant: amax has rank {amax.dim()}, expected the rank of inputs, {inputs.dim()}")
        amax = amax.to(values.device, torch.float32)
    else:
        amax = values.new_tensor(float(amax))
    if amax.numel() and amax.min() < 0:
        raise ValueError(f"nv_tensor_quant: amax holds {amax.min().item()}, expected nothing negative")
    if unsigned and values.numel() and values.min() < 0:
        raise TypeError("nv_tensor_quant: unsigned is True and inputs holds negative values")
    bound = 2.0 ** (num_bits - 1 + int(unsigned)) - 1
    lower = 0.0 if unsigned else -bound if narrow_range else -bound - 1
    nothing = amax <= _NOTHING
    scale = bound / torch.where(nothing, torch.ones_like(amax), amax)
    outputs = torch.where(nothing, torch.zeros_like(values), (values * scale).round().clamp(lower, bound))
    return outputs.to(inputs.dtype), torch.where(nothing, torch.ones_like(scale), scale)


def _quantized(name, input, scale_a, eps, low, high, divisor):
    x = input.float()
    eps = 1e-5 if eps is None else eps
    eps = torch.as_tensor(eps, dtype=torch.float32, device=x.device)
    scale = 2 * x.abs().mean() / divisor if scale_a is None else torch.as_tensor(scale_a, dtype=torch.float32, device=x.device)
    if scale.numel() != 1 and scale.dim() > x.dim():
        raise ValueError(f"{name}: scale_a is {list(scale.shape)}, expected a scalar or what broadcasts to {list(x.shape)}")
    scale = torch.where(scale > eps, scale, eps)
    quantized = (x / scale).round().clamp(low, high)
    return (quantized, scale) if scale_a is None else quantized


def q8_quantization(input, scale_a=None, eps=None):
    """q = clamp(rnd(x / s), -128, 127) as float32 whole numbers, s = max(scale_a, eps), rounding half to even.

    Without scale_a, s = max(2 mean|x| / sqrt(127), eps) and the result is (q, s); with it, q alone. eps None is 1e-5.
    """
    return _quantized("q8_quantization", input, scale_a, eps, -128, 127, 11.269)


def q4_quantization(input, scale_a=None, eps=None):
    """q8_quantization with [-8, 7] and, without scale_a, s = max(2 mean|x| / 5.6345, eps)."""
    return _quantized("q4_quantization", input, scale_a, eps, -8, 7, 5.6345)


def bit_set(var, pos, val):
    """var with the bits of val, moved up by pos, set: var | (val << pos). bit_set(0b0010, 2, 1) is 0b0110."""
    return var | (val << pos)


def _signs(values, count):
    flat = torch.as_tensor(values).detach().reshape(-1)
    if flat.numel() < count:
        raise ValueError(f"{count} signs wanted, {flat.numel()} values given")
    return (flat[:count] >= 0).to(torch.uint8)


def _words_into(signs, target, bits_per_binary_word):
    """Packs 0/1 bytes, LSB first, into words of that many bits and writes them to the front of `target`."""
    if bits_per_binary_word not in _WORD_TYPES:
        raise ValueError(f"bits_per_binary_word is {bits_per_binary_word}, expected one of {sorted(_WORD_TYPES)}")
    count = math.ceil(signs.numel() / bits_per_binary_word)
    if len(target) < count:
        raise ValueError(f"the output has {len(target)} words, {signs.numel()} signs need {count}")
    padded = torch.nn.functional.pad(signs, (0, count * bits_per_binary_word - signs.numel())).reshape(1, -1)
    words = pack(padded, "sign").cpu().numpy().reshape(-1).view(_WORD_TYPES[bits_per_binary_word])
    if isinstance(target, torch.Tensor):
        dtype = torch.empty(0, dtype=target.dtype).numpy().dtype
        target.reshape(-1)[:count] = torch.from_numpy(words.astype(dtype)).to(target.device)
    elif isinstance(target, numpy.ndarray):
        target[:count] = words.astype(target.dtype)
    else:
        target[:count] = words.tolist()
    return target


def get_binary_row(nd_row, binary_row, nd_size, bits_per_binary_word):
    """Packs the signs of nd_size values: bit j of word i is 1 where nd_row[i * w + j] >= 0. Fills and returns binary_row.

    Words have w = 8, 16, 32 or 64 bits; a short last word ends in zero bits. binary_row: tensor, numpy array or list.
    """
    return _words_into(_signs(nd_row, nd_size), binary_row, bits_per_binary_word)


def get_binary_col(nd_col, binary_col, dim_n, dim_k, bits_per_binary_word):
    """Packs the signs of a [dim_n, dim_k] matrix down its columns: word y * dim_k + x, bit j is element (y * w + j, x).

    dim_n must be a multiple of w. Fills and returns binary_col. This is the layout of BinaryLinearCPP.qweight, on the
    transposed weight.
    """
    w = bits_per_binary_word
    if dim_n % w:
        raise ValueError(f"get_binary_col: dim_n is {dim_n}, expected a multiple of {w}, the bits of a word")
    columns = _signs(nd_col, dim_n * dim_k).reshape(dim_n // w, w, dim_k).transpose(1, 2)
    return _words_into(columns.reshape(-1), binary_col, w)
