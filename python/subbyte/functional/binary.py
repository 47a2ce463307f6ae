"""Products of signs: sign(v) = +1 for v >= 0 (also -0), else -1. Sums are exact integers until they are scaled.

Formulas of the values: subbyte/ops/binary_matmul/binary_matmul.h and subbyte/ops/binary_conv2d/binary_conv2d.h; of the gradients:
subbyte_torch/ops/binary.h. A scale or clip is a floating-point tensor of one element on the device of the operands; it is never
read back. One that is not above 0, or not finite, is a ValueError (on CUDA deferred, see subbyte.set_device_checks). Source: Rastegari et al., XNOR-Net (2016); Hubara et al., Binarized Neural Networks (2016).
"""

import torch

from .. import _library

_ops = _library.load()


def binary_matmul(x, z, x_clip, z_clip):
    """y = x_clip * z_clip * (sign(x) @ sign(z).T) over the last two dimensions.

    Args:
        x: [..., M, K]; z: [..., N, K], of the same floating dtype. Leading dimensions broadcast.
        x_clip, z_clip: one element each.

    Returns [..., M, N] of x's dtype. With U = z_clip (G @ sign(z)), summed over broadcast dimensions, the gradients are
    1[|x / x_clip| <= 1] U to x and sum(U sign(x)) / sqrt(x.numel()) to x_clip, and the same for z.
    """
    return _ops.binary_matmul(x, z, x_clip, z_clip)


def binary_linear(x, weight, scale_a, scale_w, *, shift=None, bias=None, codes=None):
    """y = scale_a * scale_w * (sign(x + shift) @ sign(weight).T) + bias.

    Args:
        x: [..., K], any floating dtype.
        weight: floating point [N, K] of any dtype (only signs are read), or None where codes are given.
        scale_a, scale_w: one element each.
        shift: [K] or None; bias: [N] or None; cast to x's dtype.
        codes: pack_signs(weight); with both, the codes give the values and weight only receives the gradient.

    Returns [..., N] of x's dtype. With X = x + shift, U = scale_w (G @ sign(W)), V = scale_a (G.T @ sign(X)) the gradients are
    1[|X / scale_a| <= 1] U to x (shift: its sum over rows), V to weight, sum(U sign(X)) / sqrt(X.numel()) to scale_a and
    sum(V sign(W)) / sqrt(W.numel()) to scale_w.
    """
    return _ops.binary_linear(x, weight, codes, shift, scale_a, scale_w, bias)


def binary_conv2d(
    x,
    weight,
    scale_a,
    scale_w,
    *,
    shift=None,
    bias=None,
    codes=None,
    kernel_size=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    pad_value=0,
):
    """y = scale_a * scale_w * conv2d(sign(x + shift), sign(weight)) + bias.

    Args:
        x: [B, C, H, W], any floating dtype, NCHW or channels_last; the result has the same memory format.
        weight: floating point [O, C/groups, KH, KW] of any dtype, or None where codes are given.
        scale_a, scale_w: one element each.
        shift: [C] or None; bias: [O] or None; cast to x's dtype.
        codes: pack_signs(weight); needs kernel_size where weight is None.
        stride, padding, dilation: a number or (vertical, horizontal).
        pad_value: what a position outside the image counts as: 0 (no contribution), -1 or 1.

    Returns [B, O, OH, OW] of x's dtype. Gradients as in binary_linear with convolutions for products; the border of pad_value
    counts in those to weight and scale_a.
    """
    if kernel_size is None:
        if weight is None:
            raise ValueError("binary_conv2d: kernel_size is missing, expected it where the weight is given as codes alone")
        kernel_size = weight.shape[2:]
    return _ops.binary_conv2d(
        x, weight, codes, shift, scale_a, scale_w, bias, kernel_size, stride, padding, dilation, groups, pad_value
    )


def pack_signs(weight):
    """uint8 [N, ceil(K/8)]: bit k%8 of byte k//8 of a row is 1 where weight[n].flatten()[k] >= 0. Spare bits are 0."""
    if weight.dim() < 2:
        raise ValueError(f"pack_signs: weight is {list(weight.shape)}, expected [N, ...]")
    return _ops.pack((weight.detach().flatten(1) >= 0).to(torch.uint8), "sign")


def init_binary_weight(weight):
    """(int8 weight, scale): the starting point of a binary weight in integers.

    scale = mean|W|; W' = W - mean(W); the integers are round(127 W' / max|W'|), with 0 replaced by the sign of W' (+1 for 0).
    """
    weight = weight.detach().float()
    if weight.numel() == 0:
        return weight.to(torch.int8), weight.new_zeros(())
    centred = weight - weight.mean()
    largest = centred.abs().amax()
    levels = torch.round(centred * 127.0 / largest.clamp_min(torch.finfo(torch.float32).tiny)).clamp(-127, 127)
    signs = torch.where(centred >= 0, 1.0, -1.0)
    return torch.where(levels == 0, signs, levels).to(torch.int8), weight.abs().mean()
