"""torch.nn.Linear, Embedding and EmbeddingBag with a packed weight: subclasses, so that code finds what it looks for."""

import torch
import torch.nn.functional as F

from .. import functional
from ..packed_weight import PART_NAMES, PackedWeight


class _PackedState:
    """state_dict as plain tensors: weight.codes, weight.scales, weight.zeros or weight.offsets, weight.perm, weight.residual.

    Format, group size and residual bits are no tensors: they go into the state_dict's metadata, and a module loads only what
    fits its own. A residual is part of the state: a checkpoint with one and a module without do not fit (drop_residuals_).
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        parameters = dict(self._parameters)
        packed = {name: p for name, p in parameters.items() if isinstance(p, PackedWeight)}
        for name, weight in packed.items():
            for part_name, part in weight.parts.items():
                destination[f"{prefix}{name}.{part_name}"] = part if keep_vars else part.detach()
            del self._parameters[name]
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters.clear()
            self._parameters.update(parameters)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})["subbyte"] = {
                name: _described(w) for name, w in packed.items()
            }

    def _apply(self, fn, recurse=True):
        # Module._apply swaps tensors, which is refused while a graph (any output that is kept) refers to the weight. On one
        # device the weight takes the new parts instead.
        parameters, done, moved = dict(self._parameters), [], {}
        for name, weight in parameters.items():
            if not isinstance(weight, PackedWeight):
                continue
            with torch.no_grad():
                applied = fn(weight)
                if not isinstance(applied, PackedWeight) or applied.device != weight.device:
                    moved[id(weight)] = applied
                    continue
                if applied is not weight:
                    gradient = None if weight.grad is None else fn(weight.grad)
                    weight.grad = None
                    weight.data = applied
                    weight.grad = gradient
            done.append(name)
            del self._parameters[name]
        try:
            super()._apply(lambda t: moved.pop(id(t)) if id(t) in moved else fn(t), recurse)
        finally:
            rest = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: parameters[name] if name in done else rest[name] for name in parameters})
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        parameters = dict(self._parameters)
        packed = {name: p for name, p in parameters.items() if isinstance(p, PackedWeight)}
        recorded, assign = local_metadata.get("subbyte") or {}, local_metadata.get("assign_to_params_buffers", False)
        ours, replaced = set(), {}
        for name, weight in packed.items():
            key = prefix + name
            given = {part: state_dict[f"{key}.{part}"] for part in PART_NAMES if f"{key}.{part}" in state_dict}
            ours.update([key], (f"{key}.{part}" for part in given))
            if key in state_dict:
                error_msgs.append(
                    f"{key}: the checkpoint holds a dense weight, the module a packed one ({weight.format}, groups of "
                    f"{weight.group_size}). Load it into the float model first, then quantize"
                )
                continue
            missing_keys.extend(f"{key}.{part}" for part in weight.parts if part not in given)
            unexpected_keys.extend(f"{key}.{part}" for part in given if part not in weight.parts)
            if list(given) == list(weight.parts):
                try:
                    replaced[name] = _load_parts(weight, given, recorded.get(name), assign)
                except (ValueError, RuntimeError) as error:
                    error_msgs.append(f"{key}: {error}")
        for name in packed:
            del self._parameters[name]
        try:
            rest = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in ours}
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            loaded = {**parameters, **self._parameters, **replaced}
            self._parameters.clear()
            self._parameters.update({name: loaded[name] for name in parameters})


def _described(weight):
    """What the parts do not say; residual_bits only where there are such, as in files of before there were residuals."""
    described = {"format": weight.format, "in_features": weight.in_features, "group_size": weight.group_size}
    return {**described, "residual_bits": weight.residual_bits} if weight.residual_bits else described


def _load_parts(weight, given, recorded, assign):
    """The weight with the given parts: itself after copying, or with `assign` a new parameter around them."""
    own = _described(weight)
    for what, value in (recorded or {}).items():
        if own.get(what) != value:
            raise ValueError(f"{what} is {value!r} in the checkpoint and {own.get(what)!r} in the module")
    for part, tensor in given.items():
        mine = getattr(weight, part)
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise ValueError(
                f"{part} is {tensor.dtype} {list(tensor.shape)} in the checkpoint and {mine.dtype} {list(mine.shape)} in the "
                f"module ({weight.format}, groups of {weight.group_size})"
            )
    if assign:
        return torch.nn.Parameter(PackedWeight(**given, **own, dtype=weight.dtype), requires_grad=weight.requires_grad)
    with torch.no_grad():
        for part, tensor in given.items():
            getattr(weight, part).copy_(tensor)
    return weight


def check_activation_bits(activation_bits):
    if activation_bits not in (None, 8):
        raise ValueError(f"activation_bits is {activation_bits!r}, expected None (x keeps its precision) or 8")
    return activation_bits


def _packing_repr(weight):
    if not isinstance(weight, PackedWeight):
        return ""
    kind = "zeros" if weight.zeros is not None else "offsets" if weight.offsets is not None else "sym"
    residual = f", residual_bits={weight.residual_bits}" if weight.residual_bits else ""
    return (
        f", format={weight.format}, group_size={weight.group_size}, {kind}{residual}, "
        f"bits_per_weight={weight.bits_per_weight:.4g}"
    )


class Linear(_PackedState, torch.nn.Linear):
    """torch.nn.Linear whose weight [out_features, in_features] is packed.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear; the initial values are the same, rounded.
        bits, format: one of them.
        group_size, sym, scheme, zero_kind, scale_dtype, residual_bits: as in PackedWeight.from_float.
        activation_bits: 8 rounds the input to int8 a row; None keeps it as it is.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        bits=None,
        format=None,
        group_size=64,
        sym=None,
        scheme=None,
        zero_kind=None,
        scale_dtype=None,
        residual_bits=0,
        activation_bits=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._pack(
            activation_bits,
            bits=bits,
            format=format,
            group_size=group_size,
            sym=sym,
            scheme=scheme,
            zero_kind=zero_kind,
            scale_dtype=scale_dtype,
            residual_bits=residual_bits,
        )

    def _pack(self, activation_bits, **packing):
        self.activation_bits = check_activation_bits(activation_bits)
        self.weight = torch.nn.Parameter(
            PackedWeight.from_float(self.weight, **packing), requires_grad=self.weight.requires_grad
        )

    @classmethod
    def from_float(cls, linear, *, activation_bits=None, **packing):
        """A packed copy of a torch.nn.Linear; the bias is shared. packing: the options of PackedWeight.from_float."""
        weight = torch.nn.Parameter(
            PackedWeight.from_float(linear.weight, **packing), requires_grad=linear.weight.requires_grad
        )
        return cls.from_packed(weight, linear.bias, activation_bits=activation_bits).train(linear.training)

    @classmethod
    def from_packed(cls, weight, bias=None, *, activation_bits=None):
        """A module around an existing PackedWeight [N, K]."""
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module.out_features, module.in_features = weight.shape
        module.activation_bits = check_activation_bits(activation_bits)
        module.weight = (
            weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
        )
        module.register_parameter(
            "bias", bias if bias is None or isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)
        )
        return module

    def forward(self, input):
        if self.activation_bits == 8 and isinstance(self.weight, PackedWeight):
            return functional.linear_a8(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self):
        return (
            super().extra_repr()
            + _packing_repr(self.weight)
            + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        )


class Embedding(_PackedState, torch.nn.Embedding):
    """torch.nn.Embedding whose table [num_embeddings, embedding_dim] is packed. A look-up costs what it looks up.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in torch.nn.Embedding.
        sparse: the gradient is a sparse COO tensor of the rows that the batch named, so that a step costs what was looked up:
            torch.optim.SGD and subbyte.optim read and write these rows alone. Otherwise it is dense.
        bits, format, group_size, sym, scheme, zero_kind, scale_dtype, residual_bits: as in Linear.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=None,
        device=None,
        dtype=None,
        *,
        sparse=False,
        bits=None,
        format=None,
        group_size=64,
        sym=None,
        scheme=None,
        zero_kind=None,
        scale_dtype=None,
        residual_bits=0,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, sparse=sparse, device=device, dtype=dtype)
        self._pack(
            bits=bits,
            format=format,
            group_size=group_size,
            sym=sym,
            scheme=scheme,
            zero_kind=zero_kind,
            scale_dtype=scale_dtype,
            residual_bits=residual_bits,
        )

    def _pack(self, **packing):
        self.weight = torch.nn.Parameter(
            PackedWeight.from_float(self.weight, **packing), requires_grad=self.weight.requires_grad
        )

    @classmethod
    def from_float(cls, embedding, **packing):
        """A packed copy of a torch.nn.Embedding without max_norm and scale_grad_by_freq."""
        refuse_embedding_options(embedding)
        weight = torch.nn.Parameter(
            PackedWeight.from_float(embedding.weight, **packing), requires_grad=embedding.weight.requires_grad
        )
        return cls.from_packed(weight, embedding.padding_idx, sparse=embedding.sparse).train(embedding.training)

    @classmethod
    def from_packed(cls, weight, padding_idx=None, *, sparse=False):
        """A module around an existing PackedWeight [V, D]."""
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module.num_embeddings, module.embedding_dim = weight.shape
        module.padding_idx, module.max_norm, module.norm_type = padding_idx, None, 2.0
        module.scale_grad_by_freq, module.sparse = False, sparse
        module.weight = (
            weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
        )
        return module

    def extra_repr(self):
        return super().extra_repr() + _packing_repr(self.weight)


class EmbeddingBag(_PackedState, torch.nn.EmbeddingBag):
    """torch.nn.EmbeddingBag whose table [num_embeddings, embedding_dim] is packed. A bag costs what it looks up.

    Args:
        num_embeddings, embedding_dim, mode, sparse, padding_idx, device, dtype: as in torch.nn.EmbeddingBag; mode is "mean" or
            "sum". With sparse the gradient is a sparse COO tensor of the rows that the batch named.
        bits, format, group_size, sym, scheme, zero_kind, scale_dtype, residual_bits: as in Linear.

    forward(indices, offsets=None, per_sample_weights=None), as torch's; formula: functional.embedding_bag. BinaryEmbeddingBag
    takes majorities of bits.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        *,
        mode="mean",
        sparse=False,
        padding_idx=None,
        device=None,
        dtype=None,
        bits=None,
        format=None,
        group_size=64,
        sym=None,
        scheme=None,
        zero_kind=None,
        scale_dtype=None,
        residual_bits=0,
    ):
        _check_bag_mode(mode)
        super().__init__(
            num_embeddings, embedding_dim, mode=mode, sparse=sparse, padding_idx=padding_idx, device=device, dtype=dtype
        )
        packing = dict(bits=bits, format=format, group_size=group_size, sym=sym, scheme=scheme, zero_kind=zero_kind)
        packing.update(scale_dtype=scale_dtype, residual_bits=residual_bits)
        self.weight = torch.nn.Parameter(PackedWeight.from_float(self.weight, **packing))

    @classmethod
    def from_float(cls, bag, **packing):
        """A packed copy of a torch.nn.EmbeddingBag (sum, mean) without max_norm, scale_grad_by_freq and include_last_offset."""
        refuse_embedding_options(bag)
        weight = torch.nn.Parameter(PackedWeight.from_float(bag.weight, **packing), requires_grad=bag.weight.requires_grad)
        return cls.from_packed(weight, mode=bag.mode, sparse=bag.sparse, padding_idx=bag.padding_idx).train(bag.training)

    @classmethod
    def from_packed(cls, weight, *, mode="mean", sparse=False, padding_idx=None):
        """A module around an existing PackedWeight [V, D]."""
        _check_bag_mode(mode)
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module.num_embeddings, module.embedding_dim = weight.shape
        module.max_norm, module.norm_type, module.scale_grad_by_freq = None, 2.0, False
        module.mode, module.sparse, module.padding_idx, module.include_last_offset = mode, sparse, padding_idx, False
        module.weight = (
            weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
        )
        return module

    def extra_repr(self):
        return super().extra_repr() + _packing_repr(self.weight)


def _check_bag_mode(mode):
    if mode not in ("sum", "mean"):
        raise ValueError(f"EmbeddingBag: mode is {mode!r}, expected 'sum' or 'mean'")


def refuse_embedding_options(embedding):
    """ValueError for options of torch.nn.Embedding and EmbeddingBag that a packed table does not have."""
    for option in ("max_norm", "scale_grad_by_freq", "include_last_offset"):
        if getattr(embedding, option, None):
            raise ValueError(
                f"{type(embedding).__name__}: {option}={getattr(embedding, option)} is not supported by a packed table"
            )
    if isinstance(embedding, torch.nn.EmbeddingBag):
        _check_bag_mode(embedding.mode)
