"""Ternary weights: BitLinear and its parts. T in {-1, 0, 1}; a weight is gamma * T, or a sum of such terms.

Sources: Ma et al., "The era of 1-bit LLMs" (2024, BitNet b1.58); Li, Zhang, Liu, "Ternary weight networks" (2016).
"""

import torch

from .. import _library
from ..packed_weight import PackedWeight, _handle

_ops = _library.load()


def activation_quant(x, bits=8, straight_through=True):
    """x [..., K] rounded to `bits` bits a token, as values: s clamp(rint(x / s Q), -Q, Q) / Q.

    s = max(max|x|, 1e-5) over the last axis, Q = 2^(bits - 1) - 1, ties to even. float16 and bfloat16 are computed in float32
    and rounded back to x's dtype; nothing is stored as integers (linear_a8 and BitLinear's packed states do that).

    Args:
        bits: 2 to 24. One bit would leave no level beside 0.
        straight_through: the gradient passes unchanged. False: that of the formula, where rint is flat, so that only the
            largest element of a token gets any.

    Raises:
        ValueError: for other bits, an x without dimensions or of an integer type.
    """
    return _ops.activation_quant(x, bits, straight_through)


def absmax_scale(W, dim=None, keepdim=False):
    """max|W|, of the whole tensor (0-dim) or along `dim`. ValueError where there is nothing to take the maximum of."""
    if (W.numel() if dim is None else W.shape[dim]) == 0:
        raise ValueError(f"absmax_scale: W is {list(W.shape)}, expected elements" + ("" if dim is None else f" along {dim}"))
    return W.abs().amax() if dim is None else W.abs().amax(dim, keepdim=keepdim)


def ternary_quantize(W, threshold=None):
    """sign(W) where |W| > threshold, else 0; in W's dtype.

    threshold: a number or a tensor that broadcasts against W, in units of W, at least 0; None is 0.7 mean|W|. Differentiable
    nowhere; weight_to_ternary also gives the scale.
    """
    W = W.detach()
    if not W.is_floating_point():
        raise ValueError(f"ternary_quantize: W is {W.dtype}, expected floating point")
    if threshold is None:
        threshold = 0.7 * W.abs().mean() if W.numel() else 0.0
    elif not isinstance(threshold, torch.Tensor) and not threshold >= 0:
        raise ValueError(f"ternary_quantize: threshold is {threshold}, expected at least 0")
    return torch.where(W.abs() > threshold, W.sign(), torch.zeros_like(W))


def _terms(op, k):
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{op}: k is {k!r}, expected an integer of at least 1")
    return k


def weight_to_ternary(W, per_channel=True, *, method="threshold", threshold=0.7):
    """W [N, K] -> (T [N, K] in {-1, 0, 1}, gamma), both in W's dtype; gamma [N], or 0-dim without per_channel.

    method "threshold": T = sign(W) where |W| > threshold mean|W|, else 0; gamma = mean of those |W|, the least-squares scale of
    T. method "absmean" (BitNet b1.58): gamma = mean|W|, T = clamp(rint(W / gamma), -1, 1); threshold is not used. Means are of
    a row, or of the matrix without per_channel. No gradient: ternarize has a straight-through one.
    """
    trits, gamma = _ops.ternary_decompose(W.detach(), 1, method, per_channel, threshold)
    gamma = gamma[0].to(W.dtype)
    return trits[0].to(W.dtype), gamma if per_channel else (gamma[0] if gamma.numel() else gamma.new_zeros(()))


def greedy_ternary_decomposition(W, k, *, method="threshold", threshold=0.7):
    """W [N, K] ~ sum_i gammas[i][:, None] T[i]: (T [k, N, K], gammas [k, N]) in W's dtype.

    Each term is weight_to_ternary (a scale a row) of what the terms before it left; under "threshold" the squared error never
    grows with k.
    """
    trits, gammas = _ops.ternary_decompose(W.detach(), _terms("greedy_ternary_decomposition", k), method, True, threshold)
    return trits.to(W.dtype), gammas.to(W.dtype)


def ternarize(W, k=1, *, method="absmean", per_channel=False, threshold=0.7):
    """The sum of W's k ternary terms as dense values of W's dtype, with a straight-through gradient (W gets it unchanged)."""
    return _ops.ternarize(W, _terms("ternarize", k), method, per_channel, threshold)


def check_ternary(W, op="check_ternary"):
    """ValueError unless all of W is -1, 0 or 1. Reads the values, so on CUDA it waits for the device."""
    wrong = (W != -1) & (W != 0) & (W != 1)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: W{where} is {W[tuple(where)].item()}, expected -1, 0 or 1")


def pack_ternary(W_ternary, gamma=None, *, dtype=None, check=True):
    """Ternary values [N, K] or [k, N, K], int8 or floating point, as a 2-bit PackedWeight of [N, K] or [k N, K].

    gamma: [N] or [k, N] (or one number for all), the scale of each row; None: 1. dtype: what the weight calls itself, gamma's
    or float32 when None. check: refuse other values, and a gamma that is NaN or infinite.
    """
    if W_ternary.dim() not in (2, 3):
        raise ValueError(f"pack_ternary: W has {W_ternary.dim()} dimensions, expected [N, K] or [k, N, K]")
    W_ternary = W_ternary.detach()
    if check:
        check_ternary(W_ternary, "pack_ternary")
    codes = (W_ternary.flatten(0, -2).to(torch.int8) + 1).to(torch.uint8)
    shape = W_ternary.shape[:-1]
    if gamma is None:
        gamma = torch.ones((), device=codes.device, dtype=dtype or torch.float32)
    gamma = gamma.detach()
    if gamma.dim() > 0 and gamma.numel() != codes.shape[0]:
        raise ValueError(f"pack_ternary: gamma is {list(gamma.shape)}, expected {list(shape)}")
    if check and not bool(gamma.isfinite().all()):
        raise ValueError(f"pack_ternary: gamma holds {gamma[~gamma.isfinite()].flatten()[0].item()}, expected finite numbers")
    scales = gamma.float() if gamma.dtype == torch.float64 else gamma
    scales = (scales.reshape(-1, 1) if gamma.dim() > 0 else scales.expand(codes.shape[0], 1)).contiguous()
    in_features = W_ternary.shape[-1]
    return PackedWeight(
        _ops.pack(codes, "ternary"),
        scales if in_features else scales[:, :0],
        format="ternary",
        in_features=in_features,
        group_size=max(1, in_features),
        dtype=dtype or gamma.dtype,
    )


def _scaled(op, weight, gammas):
    """The scales of a packed weight times gammas, one a row; connected to gammas."""
    if weight.transposed:
        raise ValueError(f"{op}: W is a transposed view, expected a PackedWeight [N, K]")
    if gammas is None:
        return weight.scales
    if gammas.dim() > 0 and gammas.numel() != weight.shape[0]:
        raise ValueError(f"{op}: gamma is {list(gammas.shape)}, expected one number for each of {weight.shape[0]} packed rows")
    return (weight.scales * gammas.reshape(-1, 1)).to(weight.scales.dtype)


def bitlinear(x, W, gamma=None, bias=None, *, activation_bits=None, check=False):
    """y [..., N] = (x W^T) * gamma + bias, in x's dtype.

    Args:
        x: [..., K]; a single vector [K] gives [N].
        W: [N, K] of -1, 0, 1: floating point, int8, or a PackedWeight, which is computed from its packed form. A packed weight's
            own scales count: W is what it dequantizes to (pack_ternary without gamma: the trits).
        gamma: [N], [1, N] or 0-dim; None (with a packed W): 1.
        bias: [N] or None.
        activation_bits: 8 rounds x to int8 a token and multiplies integers (linear_a8; packed W only).
        check: refuse a dense W with other values (waits for the device).

    Gradients to x, gamma, bias, and to a W that wants one.
    """
    if isinstance(W, PackedWeight):
        scales = _scaled("bitlinear", W, gamma)
        args = (W.codes, scales, *W.packed_args[2:])
        if activation_bits not in (None, 8):
            raise ValueError(f"bitlinear: activation_bits is {activation_bits!r}, expected None or 8")
        if activation_bits == 8:
            return _ops.linear_a8(x, _handle(W), *args, bias)
        return _ops.linear(x, _handle(W), *args, bias)
    if gamma is None:
        raise ValueError("bitlinear: gamma is missing, which only a packed W can do without")
    if activation_bits is not None:
        raise ValueError(f"bitlinear: activation_bits={activation_bits!r} needs a packed W (pack_ternary)")
    if check:
        check_ternary(W, "bitlinear")
    return _ops.bitlinear(x, W, gamma, bias)


def multi_ternary_linear(x, W_ternary, gammas=None, bias=None, *, terms=None, activation_bits=None, check=False):
    """y [..., N] = sum_i (x T_i^T) * gammas[i] + bias, in x's dtype: one product over x for all k terms.

    Args:
        W_ternary: [k, N, K], floating point or int8, or a PackedWeight of [k N, K] (pack_ternary), term after term.
        gammas: [k, N]; with a packed weight None leaves its own scales.
        terms: k, when gammas is None.
        bias, activation_bits, check: as in bitlinear; x is rounded once for all terms.
    """
    if isinstance(W_ternary, PackedWeight):
        terms = gammas.shape[0] if gammas is not None and gammas.dim() == 2 else terms
        if terms is None:
            raise ValueError("multi_ternary_linear: give terms, or gammas [k, N]")
        scales = _scaled("multi_ternary_linear", W_ternary, gammas)
        args = (W_ternary.codes, scales, *W_ternary.packed_args[2:])
        return _ops.multi_ternary_linear(x, _handle(W_ternary), *args, terms, bias, activation_bits or 0)
    if W_ternary.dim() != 3 or gammas is None:
        raise ValueError(
            f"multi_ternary_linear: W is {list(W_ternary.shape)} with gammas "
            f"{None if gammas is None else list(gammas.shape)}, expected [k, N, K] and [k, N], or a PackedWeight"
        )
    if activation_bits is not None:
        raise ValueError(f"multi_ternary_linear: activation_bits={activation_bits!r} needs a packed W (pack_ternary)")
    if check:
        check_ternary(W_ternary, "multi_ternary_linear")
    return _ops.bitlinear(x, W_ternary, gammas, bias)


def pack_ternary_base3(W_ternary):
    """Ternary values of any shape -> (uint8 [ceil(count / 5)], shape): five values a byte, for files. ValueError for others."""
    return _ops.pack_base3(W_ternary.detach()), tuple(W_ternary.shape)


def unpack_ternary_base3(packed, original_shape, *, dtype=torch.float32):
    """The inverse of pack_ternary_base3, in `dtype`."""
    return _ops.unpack_base3(packed, list(original_shape)).to(dtype)


def estimate_memory_savings(in_features, out_features, num_layers=1):
    """Bytes of num_layers layers of [out_features, in_features]: a dict.

    float32_bytes: the float weights. packed_bytes: base-3 trits and a float32 gamma a row, as a file holds them.
    savings_bytes, compression_ratio: from these two. runtime_bytes: the 2-bit form that layers compute from, gamma included.
    """
    for name, value in (("in_features", in_features), ("out_features", out_features), ("num_layers", num_layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"estimate_memory_savings: {name} is {value!r}, expected an integer of at least 0")
    meta = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
    gamma_bytes = 4 * out_features
    float32_bytes = num_layers * 4 * in_features * out_features
    packed_bytes = num_layers * (_ops.pack_base3(meta).numel() + gamma_bytes)
    return {
        "float32_bytes": float32_bytes,
        "packed_bytes": packed_bytes,
        "runtime_bytes": num_layers * (_ops.pack(meta.to(torch.uint8), "ternary").numel() + gamma_bytes),
        "savings_bytes": float32_bytes - packed_bytes,
        "compression_ratio": float32_bytes / packed_bytes if packed_bytes else 1.0,
    }
