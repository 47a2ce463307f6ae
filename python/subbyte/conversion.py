"""quantize_: packs the weights of any torch.nn model in place."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from . import nn
from .nn.packed import check_activation_bits, refuse_embedding_options
from ._formats import resolve_format, training_residual_bits
from .packed_weight import PackedWeight

_WEIGHT_OPTIONS = (
    "bits", "format", "group_size", "sym", "scheme", "zero_kind", "scale_dtype", "residual_bits", "rounding", "seed"
)  # fmt: skip
_OPTIONS = (*_WEIGHT_OPTIONS, "activation_bits")
# A progress bar shows after this long.
_PATIENCE_S = 2.0


@dataclass
class LayerReport:
    name: str  # of the module; a shared weight is listed under its first
    shape: tuple
    format: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    error: float  # |W - packed W| / |W|, Frobenius norms
    tied: tuple = ()  # further modules that use the same weight


@dataclass
class QuantizeReport:
    """What quantize_ did: `layers`, a LayerReport each, and `left`, modules left alone with the reason. str() is a table."""

    layers: list = field(default_factory=list)
    left: dict = field(default_factory=dict)

    @property
    def bytes_before(self):
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self):
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self):
        return 8 * self.bytes_after / max(1, sum(layer.shape[0] * layer.shape[1] for layer in self.layers))

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)

    def __str__(self):
        rows = [("layer", "shape", "format", "bits/weight", "MB before", "MB after", "rel. error")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name + "".join(f" = {name}" for name in layer.tied),
                    "x".join(map(str, layer.shape)),
                    layer.format,
                    f"{layer.bits_per_weight:.2f}",
                    f"{layer.bytes_before / 1e6:.2f}",
                    f"{layer.bytes_after / 1e6:.2f}",
                    f"{layer.error:.4f}",
                )
            )
        rows.append(
            (
                "total",
                "",
                "",
                f"{self.bits_per_weight:.2f}",
                f"{self.bytes_before / 1e6:.2f}",
                f"{self.bytes_after / 1e6:.2f}",
                "",
            )
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.insert(-1, lines[1])
        return "\n".join(lines + [f"left: {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()])


def packed_kind(module):
    """The kind of a module that is of a packed class; None of others."""
    classes = {nn.Linear: "linear", nn.Embedding: "embedding", nn.EmbeddingBag: "bag"}
    return next((kind for packed, kind in classes.items() if isinstance(module, packed)), None)


def _kind(module):
    """How a module can be packed: "linear", "embedding", "bag", "conv1d" (transformers' transposed linear), None; or why not."""
    kind = type(module)
    if packed_kind(module) is not None:
        return "already packed"
    if isinstance(module._parameters.get("weight"), torch.nn.parameter.UninitializedTensorMixin):
        return "its weight is not initialized yet"
    if isinstance(module, torch.nn.Linear):
        return "linear" if kind.forward is torch.nn.Linear.forward else f"{kind.__name__} has a forward of its own"
    for table, name in ((torch.nn.Embedding, "embedding"), (torch.nn.EmbeddingBag, "bag")):
        if isinstance(module, table):
            if kind.forward is not table.forward:
                return f"{kind.__name__} has a forward of its own"
            try:
                refuse_embedding_options(module)
            except ValueError as error:
                return str(error)
            return name
    if kind.__name__ == "Conv1D" and hasattr(module, "nf") and kind.__module__.startswith("transformers."):
        return "conv1d"
    return None


_KINDS = ("linear", "embedding", "bag", "conv1d")


def _matching(pattern, names):
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _check_options(where, options):
    if not isinstance(options, Mapping):
        raise ValueError(f"quantize_: {where} is {options!r}, expected a dict of options")
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"quantize_: {where}: '{name}' is unknown, expected one of {', '.join(_OPTIONS)}")


def _pack_module(module, kind, weight, activation_bits):
    """Turns the module into its packed class where it stands, so that hooks and other references to it stay good."""
    if kind in ("embedding", "bag"):
        module.__class__ = nn.Embedding if kind == "embedding" else nn.EmbeddingBag
    else:
        module.__class__ = nn.Linear
        module.activation_bits = activation_bits
        if kind == "conv1d":
            module.out_features, module.in_features = weight.shape
            if "bias" not in module._parameters:
                module.register_parameter("bias", None)
    module.weight = weight


@torch.no_grad()
def quantize_(
    model,
    *,
    bits=None,
    format=None,
    group_size=64,
    sym=None,
    scheme=None,
    zero_kind=None,
    scale_dtype=None,
    residual_bits=None,
    activation_bits=None,
    training=False,
    rounding="nearest",
    seed=0,
    skip=(),
    overrides=None,
    progress=True,
):
    """Packs the weight of every Linear, Embedding, EmbeddingBag and transformers Conv1D of a model, in place, one at a time.

    Args:
        model: any torch.nn.Module.
        bits, format: one of them: 1 .. 8, or "sign", "ternary", "uint2" .. "uint8", mixed width. bits 1 is "sign".
        group_size, sym, scheme, zero_kind, scale_dtype, rounding, seed: as in PackedWeight.from_float.
        residual_bits: more bits a weight for training, below those of the codes; 0 for none. None: none, unless `training`.
        training: True for a model that is to be trained: weights below 4 bits get the residual that fills a byte (7 bits beside
            sign, 6 beside 2 bits and ternary, 5 beside 3), the others none. drop_residuals_ removes it afterwards.
        activation_bits: 8 lets the packed linear layers round their input to int8.
        skip: module names or shell patterns ("lm_head", "*.mlp.*") that stay as they are.
        overrides: {name or pattern: {option: value}}: other options for the modules that match; a later one wins.
        progress: show a progress bar when it takes more than two seconds.

    A weight that several modules share stays shared: it is packed once, left alone when one of them is skipped, and refused
    when their options differ. Other modules (convolutions, norms, subclasses with a forward of their own) stay as they are.
    scheme="fan_in" is a rule for layers whose fresh weights shrink with their input: tables need another one.
    Returns a QuantizeReport; print it for a table. ValueError for a wrong option, a pattern that matches nothing, or a weight
    that is not finite, before anything is changed.
    """
    base = {
        "bits": bits,
        "format": format,
        "group_size": group_size,
        "sym": sym,
        "scheme": scheme,
        "zero_kind": zero_kind,
        "scale_dtype": scale_dtype,
        "residual_bits": residual_bits,
        "rounding": rounding,
        "seed": seed,
        "activation_bits": activation_bits,
    }
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"quantize_: model is of type {type(model).__name__}, expected a torch.nn.Module")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(pattern, str) for pattern in overrides):
        raise ValueError(f"quantize_: overrides is {overrides!r}, expected a dict of names or patterns to options")
    skip = () if skip is None else skip
    if isinstance(skip, Iterable) and not isinstance(skip, str):
        skip = list(skip)
    if not isinstance(skip, list) or not all(isinstance(pattern, str) for pattern in skip):
        raise ValueError(f"quantize_: skip is {skip!r}, expected a list of names or patterns")
    report = QuantizeReport()
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {name: kind for name, module in modules.items() if (kind := _kind(module)) is not None}
    candidates = [name for name, kind in kinds.items() if kind in _KINDS]

    # A pattern may name a module or anything around it: "encoder" stands for "encoder.*".
    def select(pattern, what):
        chosen = set(_matching(pattern, candidates)) | {
            n for n in candidates for around in _matching(pattern, modules) if around and n.startswith(around + ".")
        }
        if not chosen:
            near = [n for n in candidates if pattern.strip("*.") and pattern.strip("*.").split(".")[-1] in n][:3] or candidates[
                :3
            ]
            raise ValueError(
                f"quantize_: {what} '{pattern}' matches no layer that can be packed; there are, for example, "
                f"{', '.join(near) or 'none'}"
            )
        return chosen

    skipped = {name: f"skip '{pattern}'" for pattern in skip for name in select(pattern, "skip")}
    options = {name: base for name in candidates}
    for pattern, changes in overrides.items():
        _check_options(f"overrides['{pattern}']", changes)
        if "bits" in changes or "format" in changes:
            changes = {"bits": None, "format": None, **changes}
        for name in select(pattern, "overrides"):
            options[name] = {**options[name], **changes}

    # Weights, each with all modules that use it: (module, its name, its kind).
    users, elsewhere = {}, {}
    for name, module in modules.items():
        for parameter_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if name in kinds and kinds[name] in _KINDS and parameter_name == "weight":
                users.setdefault(id(parameter), []).append(name)
            else:
                elsewhere[id(parameter)] = f"{name}.{parameter_name}".strip(".")
    work = []
    for key, names in users.items():
        weight = modules[names[0]].weight
        reason = next((skipped[n] for n in names if n in skipped), None)
        if reason is None and key in elsewhere:
            reason = f"its weight is also {elsewhere[key]}, which cannot be packed"
        if reason is None and len({kinds[n] == "conv1d" for n in names}) > 1:
            reason = "its weight is shared between a Conv1D and another layer"
        if reason is None and not weight.is_floating_point():
            reason = f"its weight is {weight.dtype}"
        if reason is not None:
            report.left.update(
                {
                    n: reason if n in skipped or not any(m in skipped for m in names) else f"tied to a layer left by {reason}"
                    for n in names
                }
            )
            continue
        first = options[names[0]]
        for name in names[1:]:
            different = [o for o in _WEIGHT_OPTIONS if options[name][o] != first[o]]
            if different:
                raise ValueError(
                    f"quantize_: {names[0]} and {name} share their weight, but {different[0]} is "
                    f"{first[different[0]]!r} for one and {options[name][different[0]]!r} for the other"
                )
        packing = {o: first[o] for o in _WEIGHT_OPTIONS}
        if packing["residual_bits"] is None:
            format_ = resolve_format(first["bits"], first["format"])
            packing["residual_bits"] = training_residual_bits(format_) if training else 0
        if packing["scheme"] == "fan_in" and any(kinds[n] in ("embedding", "bag") for n in names):
            raise ValueError(
                f"quantize_: {names[0]} is a table, whose weights do not shrink with its columns, and scheme is 'fan_in'; "
                "skip it, or give it another scheme in overrides"
            )
        for name in names:
            check_activation_bits(options[name]["activation_bits"])
        _check_packing(names[0], weight, kinds[names[0]], packing)
        work.append((names, packing))
    for name, kind in kinds.items():
        if kind not in _KINDS and kind != "already packed":
            report.left[name] = kind
    if not work and not report.left:
        resolve_format(bits, format)

    for names, packing in tqdm(work, desc="quantize", unit="layer", delay=_PATIENCE_S, disable=not progress):
        kind, old = kinds[names[0]], modules[names[0]].weight
        dense = old.detach().t() if kind == "conv1d" else old.detach()
        try:
            packed = PackedWeight.from_float(dense, **packing)
        except ValueError as error:
            raise ValueError(f"quantize_: {names[0]}: {error}") from None
        parameter = torch.nn.Parameter(packed, requires_grad=old.requires_grad)
        seen = set()
        for name in names:
            if id(modules[name]) not in seen:
                _pack_module(modules[name], kinds[name], parameter, options[name]["activation_bits"])
                seen.add(id(modules[name]))
        report.layers.append(
            LayerReport(
                names[0],
                tuple(packed.shape),
                packed.format,
                packed.bits_per_weight,
                old.numel() * old.element_size(),
                packed.nbytes,
                _relative_error(dense, packed),
                tuple(names[1:]),
            )
        )
    return report


def _check_packing(name, weight, kind, options):
    """ValueError, naming the layer, for options or values that from_float would refuse."""
    resolve_format(options["bits"], options["format"])  # without the layer's name: mostly the call's own
    try:
        template = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        PackedWeight.from_float(template.t() if kind == "conv1d" else template, **{o: options[o] for o in _WEIGHT_OPTIONS})
        if not weight.is_meta and weight.numel() and not all(torch.isfinite(end) for end in weight.detach().aminmax()):
            at = (~weight.detach().isfinite()).nonzero()[0].tolist()
            raise ValueError(f"weight{at} is {weight[tuple(at)].item()}, expected finite values")
    except ValueError as error:
        raise ValueError(f"quantize_: {name}: {error}") from None


@torch.no_grad()
def drop_residuals_(model):
    """Makes the model what is deployed: every packed weight loses its residual plane, in place. No output changes.

    Parameters become new ones (an optimizer that holds the old ones is done); weights that modules share stay shared.
    Returns the number of bytes that this frees.
    """
    dropped, freed = {}, 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, PackedWeight) and parameter.residual is not None:
                if id(parameter) not in dropped:
                    dropped[id(parameter)] = (parameter, parameter.drop_residual())
                    freed += parameter.residual.nbytes
                module._parameters[name] = dropped[id(parameter)][1]
    return freed


def _relative_error(dense, packed):
    if dense.is_meta:
        return float("nan")
    difference = torch.linalg.vector_norm(packed.dequantize(torch.float32) - dense.float())
    return float(difference / torch.linalg.vector_norm(dense.float()).clamp_min(1e-30))
