"""Layouts of GPTQ, GBA ("MPQ") and EXL2 ("MBWQ") checkpoints as packed weights, and back.

Codes move as bits and scales as values: nothing passes through dequantized weights. All functions take CPU and CUDA tensors and
read index tensors (g_idx, q_perm, q_groups) on the CPU. Written for loading and saving.

    words      int32 [W, N]   a column holds the codes of an output feature along K, least significant bit first
    scales     [Gr, N]        one row a group, transposed against PackedWeight.scales
    qzeros     int32 [Gr, .]  fields along N that hold z - 1 (GPTQ v1, GBA) or z (GPTQ v2): w = scale * (code - z)
    zeros      [Gr, N]        GBA: already multiplied by the scale, w = scale * code - zero

A PackedWeight has one group_size along its stored columns. Groups of different lengths (EXL2, an irregular g_idx) are cut into
pieces of their largest common divisor; `parent` [G'] then names the group of the file that each piece belongs to.
"""

import math
from typing import NamedTuple, Optional

import torch

from . import _library
from .packed_weight import PackedWeight

_ops = _library.load()


class Imported(NamedTuple):
    """A PackedWeight, and the file's group of each of its groups (int64 [G']; None: the same groups)."""

    weight: PackedWeight
    parent: Optional[torch.Tensor]


class Exported(NamedTuple):
    """qweight int32 [W, N]; scales [groups, N]; zeros [groups, N]; row_groups int32 [K], the group of each row of qweight."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    row_groups: torch.Tensor


def _imported(parts, in_features, dtype):
    codes, scales, zeros, offsets, perm, parent, format, group_size = parts
    weight = PackedWeight(
        codes, scales, zeros, offsets, perm, format=format, in_features=in_features, group_size=group_size, dtype=dtype
    )
    return Imported(weight, parent)


def gptq_import(
    qweight, scales, *, bits, in_features, qzeros=None, zeros=None, g_idx=None, q_perm=None, group_size=-1, v2=False, dtype=None
):
    """GPTQ rows as a PackedWeight.

    Args:
        qweight: int32 [ceil(K * bits / 32), N] (int64 is cast).
        scales: float [Gr, N].
        bits: 1 to 8.
        in_features: K.
        qzeros: int32 [Gr, ceil(N * bits / 32)], packed integer zeros; or zeros, float [Gr, N], multiplied by the scale;
            neither: the format's fixed zero 2^(bits-1).
        g_idx: group of each row (input feature), in any order, [K]; None: k // group_size, or with group_size -1 as many rows a
            group as Gr asks for. Rows out of order become a PackedWeight with `perm`.
        q_perm: row i of qweight is input feature q_perm[i]; all zero means none.
        v2: qzeros hold z, not z - 1.

    Returns Imported. ValueError for contradicting shapes, a q_perm that is no permutation, a group out of range, scales or
    zeros that are not finite.
    """
    parts = _ops.gptq_import(
        qweight, scales, zeros, qzeros, g_idx, q_perm, int(bits), int(in_features), int(group_size), 0 if v2 else 1
    )
    return _imported(parts, in_features, dtype)


def export(weight, *, asym, input_order=True, parent=None, groups=None):
    """The word matrix, scales and zeros of a PackedWeight; lossless.

    Args:
        asym: zeros are integers in units of codes (as values; pack them with pack_zeros), else multiplied by the scale.
        input_order: rows stand in the order of input features (GPTQ, where row_groups is g_idx); False: in stored order, and
            weight.perm is q_perm (MBWQ, EXL2).
        parent, groups: as gptq_import and exl2_import returned them; None: as many as the weight has.

    Returns Exported.
    """
    if not isinstance(weight, PackedWeight):
        raise ValueError(f"export: weight is {type(weight).__name__}, expected a PackedWeight")
    if groups is None:
        groups = weight.scales.shape[1] if parent is None else int(parent.max()) + 1 if parent.numel() else 0
    return Exported(*_ops.export_columns(*weight.packed_args, parent, groups, asym, input_order))


class GPTQTensors(NamedTuple):
    """What a GPTQ checkpoint holds of a layer."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


def gptq_export(weight, *, bits, v2=False, parent=None, groups=None):
    """GPTQ rows of a PackedWeight with integer zeros (or the fixed zero), lossless.

    ValueError when a zero is no integer of 1 .. 2^bits (v1) or 0 .. 2^bits - 1 (v2), or the weight has offsets.
    """
    words, scales, zeros, g_idx = export(weight, asym=True, parent=parent, groups=groups)
    if not torch.equal(zeros, zeros.round()):
        raise ValueError("gptq_export: zeros has fractions, the layout holds integers")
    return GPTQTensors(words, pack_zeros(zeros, bits, v2=v2), scales, g_idx)


def exl2_import(qweight, q_groups, scales, zeros=None, q_perm=None, *, in_features, dtype=None):
    """Words of mixed width as a PackedWeight.

    Args:
        qweight: int32 [W, N], the widths in the order of q_groups; a column of each width is its own stream of whole words.
        q_groups: [2 Gr], pairs (bits, first row of qweight).
        scales, zeros: float [Gr, N]; zeros multiplied by the scale, or None for the fixed zero 2^(bits-1).
        q_perm: stored row i is input feature q_perm[i]; all zero or None: none.
        in_features: K.

    Returns Imported. ValueError as gptq_import.
    """
    return _imported(_ops.exl2_import(qweight, q_groups, scales, zeros, q_perm, int(in_features)), in_features, dtype)


class EXL2Tensors(NamedTuple):
    """What an MBWQ checkpoint holds of a layer with mixed widths."""

    qweight: torch.Tensor
    q_groups: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    q_perm: torch.Tensor


def exl2_export(weight, *, parent=None, groups=None):
    """Words of mixed width of a PackedWeight, lossless; the inverse of exl2_import.

    ValueError where a group does not begin on a word.
    """
    words, scales, zeros, row_groups = export(weight, asym=False, input_order=False, parent=parent, groups=groups)
    perm = weight.perm if weight.perm is not None else torch.arange(weight.in_features, device=weight.device)
    return EXL2Tensors(words, _ops.q_groups_of(row_groups, weight.format), scales, zeros, perm.to(torch.int32))


def make_group_map(q_groups, num_qrows):
    """int16 [2 K]: for each row of the weight its group, and how many rows of that group are left, this one included.

    q_groups: pairs (bits, first row of the word matrix); num_qrows: rows of the word matrix.
    """
    return _ops.make_group_map(q_groups, int(num_qrows))


def rows_of_format(format, in_features):
    """Seven integers: where the codes of 8, 6, 5, 4, 3, 2 bits end along K, and a mask with bit b - 1 set for each width b."""
    return list(_ops.rows_of_format(format, in_features))


def unpack_zeros(qzeros, bits, out_features, *, v2=False):
    """int32 [Gr, N]: the fields of packed zeros plus 1 (v2: as they are), not wrapped: 2^bits - 1 reads as 2^bits."""
    return _ops.gptq_unpack_zeros(qzeros, int(bits), int(out_features), 0 if v2 else 1)


def pack_zeros(zeros, bits, *, v2=False, wrap=False):
    """[Gr, N] -> int32 [Gr, ceil(N * bits / 32)] of (z - 1) (v2: z), fractions rounded to nearest.

    wrap: modulo 2^bits, as the original layout writes a zero it cannot say; otherwise that is a ValueError.
    """
    return _ops.gptq_pack_zeros(zeros, int(bits), 0 if v2 else 1, wrap)


# ---- second level -----------------------------------------------------------------------------------------------------------


def expand_second_level(codes, zeros, scales, out_features, dq_group_size):
    """Quantized scales (or zeros) as values [Gr, N]: (code - zero) * scale in the type of `scales`.

    Args:
        codes: uint8 [Gr, B, dq_group_size] or [Gr, N]; codes past N are padding.
        zeros, scales: [Gr, B, 1], a value a block of dq_group_size columns; [1, N, 1] or [Gr, N, 1], a value a column.
    """
    return _ops.expand_second_level(codes, zeros, scales, int(out_features), int(dq_group_size))


def requantize_second_level(values, levels, dq_group_size, *, per_column=False, kept=None):
    """Values [Gr, N] as (codes uint8 [Gr, B, dq_group_size], zeros, scales [Gr, B, 1]), B = ceil(N / dq_group_size).

    per_column: zeros and scales [1, N, 1], for all groups; dq_group_size is then 1.
    kept: (zeros, scales) as a file had them. Blocks that these say exactly keep them, so that what was loaded is written back
    byte for byte; the others take the range of their values.
    """
    zeros, scales = kept if kept is not None else (None, None)
    return _ops.requantize_second_level(values, int(levels), int(dq_group_size), per_column, zeros, scales)


def unpack_statistic(qstatistic):
    """(scale codes, zero codes) of statistic bytes: high and low nibble."""
    return _ops.unpack_statistic(qstatistic)


def pack_statistic(scale_codes, zero_codes):
    """uint8: scale code in the high nibble, zero code in the low one."""
    return _ops.pack_statistic(scale_codes, zero_codes)


# ---- parameters with the attributes of the original MPQWeightParameter ------------------------------------------------------


def _attribute(qweight, name, default=None):
    return getattr(qweight, name, default)


def import_parameter(qweight):
    """Imported of any object with the attributes of an MPQWeightParameter: `data` (int32 words), scales, zeros, g_idx, w_bit,
    asym, group_size, layer_type, q_perm, q_group_map, rows.

    layer_type 1 (MPQLinear): asym with packed zeros, or symmetric with zeros multiplied by the scale; groups by g_idx, or of
    K / Gr rows with q_perm. layer_type 2 (MBWQLinear): rows in stored order with q_perm; mixed widths when q_group_map is
    there.
    ValueError without layer_type, NotImplementedError for another.
    """
    layer_type, bits = _attribute(qweight, "layer_type", -1), _attribute(qweight, "w_bit", -1)
    scales, zeros, q_perm = qweight.scales, qweight.zeros, _attribute(qweight, "q_perm")
    if layer_type in (None, -1):
        raise ValueError("MPQ weight: layer_type is not set, expected 1 (MPQLinear) or 2 (MBWQLinear)")
    if layer_type not in (1, 2):
        raise NotImplementedError(f"MPQ weight: layer_type is {layer_type}, expected 1 (MPQLinear) or 2 (MBWQLinear)")
    words, group_map = qweight.data, _attribute(qweight, "q_group_map")
    scales = scales if scales.dim() == 2 else scales.reshape(-1, words.shape[1])
    g_idx = _attribute(qweight, "g_idx")
    if layer_type == 2 and group_map is not None:
        in_features = group_map.numel() // 2
        rows = [int(v) for v in _attribute(qweight, "rows")]
        parts = _ops.exl2_import_map(words, group_map, rows, scales, zeros, q_perm, in_features)
        return _imported(parts, in_features, scales.dtype)
    in_features = next((t.numel() for t in (g_idx, q_perm) if t is not None), words.shape[0] * 32 // bits)
    packed = layer_type == 1 and _attribute(qweight, "asym", False) and not zeros.is_floating_point()
    if layer_type == 1 and _attribute(qweight, "asym", False) and not packed:
        raise ValueError(f"MPQ weight: zeros is {zeros.dtype} with asym, expected packed int32")
    return gptq_import(
        words,
        scales,
        bits=bits,
        in_features=in_features,
        qzeros=zeros if packed else None,
        zeros=None if packed else zeros,
        g_idx=g_idx if layer_type == 1 else None,
        q_perm=q_perm if layer_type == 2 or g_idx is None else None,
        group_size=_attribute(qweight, "group_size", -1) if layer_type == 2 else -1,
    )


def unpack_qweight(qweight):
    """Dense values [K, N] of a parameter (see import_parameter), in the scales' dtype.

    asym: w = scale[g] * (code - z[g]); symmetric: w = code * scale[g] - zero[g]; rows of the word matrix go to their input
    features by q_perm. Values are formed in float32 and rounded once.
    """
    return import_parameter(qweight).weight.dequantize().t()


def pack_fp_weight(weight, qweight, unpacked_zeros=None):
    """Dense weight [K, N] -> int32 words on the grid of a parameter: asym code = clamp(rnd(w / scale + z)), symmetric
    clamp(rnd((w + zero) / scale)), ties to even; mixed widths too. The inverse of unpack_qweight for values on the grid.

    unpacked_zeros: [Gr, N] instead of the parameter's zeros (asym: integers or fractions; symmetric: multiplied by the scale).
    """
    packed, parent = import_parameter(qweight)
    if unpacked_zeros is not None:
        zeros = unpacked_zeros.to(packed.scales.dtype)
        zeros = (zeros if parent is None else zeros.index_select(0, parent)).t().contiguous()
        if packed.zeros is not None:
            packed.zeros = zeros
        else:
            packed.offsets = -zeros
    if list(weight.shape) != [packed.in_features, packed.shape[0]]:
        raise ValueError(
            f"pack_fp_weight: weight is {list(weight.shape)}, expected [K, N] = {[packed.in_features, packed.shape[0]]}"
        )
    codes = _ops.encode(
        weight.detach().t(), packed.scales, packed.zeros, packed.offsets, packed.perm, packed.format, packed.group_size
    )
    order = None
    if packed.perm is not None and _attribute(qweight, "layer_type") == 1 and _attribute(qweight, "g_idx") is not None:
        order = torch.argsort(packed.perm).to(torch.int32)
    return _ops.codes_to_columns(codes, packed.format, packed.in_features, order)


def gptq_style_unpacking(qweight):
    """(weights [K, N], zeros) of a parameter of one width.

    zeros: asym int32 [Gr, N], the fields plus 1; symmetric with q_perm and without g_idx the zeros of each row, [K, N] in
    stored order; symmetric otherwise [Gr, N].
    """
    weights = unpack_qweight(qweight)
    zeros = qweight.zeros
    if not zeros.is_floating_point():
        return weights, unpack_zeros(zeros, qweight.w_bit, weights.shape[1])
    if _attribute(qweight, "g_idx") is None:
        rows = -(-weights.shape[0] // zeros.shape[0])
        zeros = zeros.repeat_interleave(rows, 0)[: weights.shape[0]]
    return weights, zeros


# ---- training ---------------------------------------------------------------------------------------------------------------


def mpq_update_(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    *,
    lr=1e-4,
    weight_decay=0.0,
    betas=(0.99, 0.9999),
    eps=1e-6,
    correct_bias=True,
    project_back=None,
    parent=None,
    zeros_every=5,
    integer_zeros=True,
    zeros_low=1,
    rounding="stochastic",
    seed=0,
    offset=None,
):
    """One step of the MPQ rule on a PackedWeight, in place: Adam-like moments, a step of the values, codes encoded again.

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  r = project_back(m / (sqrt(v) + eps))
        eta = lr * sqrt(1 - beta2^t) / (1 - beta1^t) if correct_bias else lr
        W <- W - eta r;  W <- W - lr * weight_decay * W
        every `zeros_every` steps: offsets <- offsets - mean(eta r), or zeros <- round(zeros + mean(eta r) / scale), the mean
        over each group; then codes <- W on the scales and the new zeros

    Args:
        weight: PackedWeight [N, K], of one or mixed widths, permuted or not.
        grad, exp_avg, exp_avg_sq: [N, K], or the shape a projector makes of it. The moments change in place, in their
            own dtype.
        step: t as an integer, 1 at the first call.
        project_back: takes r to [N, K] (GaLoreProjector.project_back).
        parent: of an import, for groups of different lengths.
        zeros_every: 0 keeps zeros as they are. integer_zeros False lets them take fractions. zeros_low: smallest integer zero
            that the layout says, 1 for GPTQ v1 and GBA, 0 for GPTQ v2.
        rounding: "stochastic", unbiased, with seed and offset (None: the step) as its only source of randomness; or "nearest",
            which drops every step below half a level.

    ValueError names an argument that does not fit, before anything changes. A NaN or infinite gradient is one on the CPU; on a
    GPU, which is not waited for, such an element keeps its moments and has no step.
    """
    if not isinstance(weight, PackedWeight):
        raise ValueError(f"mpq_update_: weight is {type(weight).__name__}, expected a PackedWeight")
    if weight.residual is not None:
        raise ValueError("mpq_update_: weight has a residual, which the MPQ rule does not know: use drop_residual() first")
    step = int(step)
    if step < 1:
        raise ValueError(f"mpq_update_: step is {step}, expected at least 1")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"mpq_update_: {name} is {value}, expected a number of at least 0")
    if zeros_every < 0:
        raise ValueError(f"mpq_update_: zeros_every is {zeros_every}, expected at least 0")
    beta1, beta2 = betas
    with torch.no_grad():
        finite = grad.isfinite()
        if grad.device.type == "cpu":
            if not finite.all():
                at = (~finite).nonzero()[0].tolist()
                raise ValueError(f"mpq_update_: grad{at} is {float(grad[tuple(at)])}, expected finite numbers")
            r = _ops.mpq_moments_(exp_avg, exp_avg_sq, grad, beta1, beta2, eps)
        else:
            kept = exp_avg.clone(), exp_avg_sq.clone()
            r = _ops.mpq_moments_(exp_avg, exp_avg_sq, grad, beta1, beta2, eps)
            for moment, before in zip((exp_avg, exp_avg_sq), kept):
                moment.copy_(torch.where(finite, moment, before))
            r = torch.where(finite, r, 0)
        if project_back is not None:
            r = project_back(r)
        eta = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if correct_bias else lr
        _ops.mpq_apply_(
            *weight.packed_args,
            parent,
            r * eta,
            lr * weight_decay,
            zeros_every != 0 and step % zeros_every == 0,
            integer_zeros,
            zeros_low,
            rounding,
            seed,
            step if offset is None else offset,
        )
