"""The packed parameter: a float-typed tensor whose storage is codes of 1 to 8 bits.

`PackedWeight` says float32 [N, K] to PyTorch, so that it may require a gradient, be a parameter and sit in an optimizer, and
holds the parts of a packed matrix instead of values. Three levels of operations, tried in this order:

  __torch_function__  F.linear, F.embedding, F.embedding_bag and products with the transposed weight become one packed op with
                      its own gradient.
  __torch_dispatch__  _HANDLERS: what works on the parts alone (t, detach, clone, to, mm, copy_, mul_ by a number, ...).
  anything else       runs on the dequantized values. Where it writes to the weight, the result is encoded back onto the
                      weight's own grid by stochastic rounding, which lets any optimizer of torch.optim take steps.

With a residual plane a weight is read in two ways. What products, look-ups and every operation that only reads it see is the
deployed value, that of the codes alone. An operation that writes to it reads and writes the fine value, codes and residual.

A view of a packed weight (w[0], w.view(-1)) is a dense copy: writing to it does not reach the weight. w[i] = v does.
"""

import contextlib
import math
import sys

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _library
from ._formats import (
    check_permutation,
    check_quantize_options,
    check_residual_bits,
    default_scheme,
    format_bits,
    resolve_format,
    resolve_group_size,
)

_ops = _library.load()
aten = torch.ops.aten

PART_NAMES = ("codes", "scales", "zeros", "offsets", "perm", "residual")

_rounding_generator = None


def set_rounding_generator(generator):
    """Where the seeds of stochastic rounding come from: a CPU torch.Generator, or None for PyTorch's default one.

    Every in-place update of a packed weight draws one seed, so torch.manual_seed makes a training run repeatable. Ranks of a
    distributed run that seed the default generator differently need a generator of their own here, seeded alike on every rank:
    otherwise they round differently and their weights drift apart. subbyte.distributed sees to that.
    """
    global _rounding_generator
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"set_rounding_generator: the generator is on {generator.device}, expected cpu")
    _rounding_generator = generator


def rounding_generator():
    """The generator of set_rounding_generator, or None."""
    return _rounding_generator


def _draw_seed():
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu", generator=_rounding_generator))


class PackedWeight(torch.Tensor):
    """W [N, K] as packed codes with scales a group: value = scale * (code - zero), or scale * code + offset.

    Args:
        codes: uint8 [N, row_bytes], canonical code streams.
        scales: float32, float16 or bfloat16 [N, G], G = ceil(K / group_size).
        zeros: [N, G] in units of codes, or None.
        offsets: [N, G] in units of values, or None; not together with zeros. With neither, the format's fixed zero holds.
        perm: int32 [K] or None; stored column k is input feature perm[k].
        format: "sign", "ternary", "uint2" .. "uint8", or mixed width such as "uint8*64+uint4*448".
        in_features: K.
        group_size: stored columns that share a scale.
        dtype: what the weight calls itself, and the type of its gradient; the scales' when None. Values are always formed in
            float32 from the parts as they are: changing dtype (w.to(torch.float16)) loses nothing.
        residual: uint8 [N, row bytes of residual_bits], a canonical code stream, or None: bits below those of the codes that
            training keeps. The fine value is that of the code q = code * 2^r + residual with scale / 2^r and zero * 2^r +
            (2^r - 1) / 2, so that value is the middle of the fine ones that share a code.
        residual_bits: r, with r and the bits of a code at most 8; 0 without a residual.
    """

    def __new__(
        cls,
        codes,
        scales=None,
        zeros=None,
        offsets=None,
        perm=None,
        residual=None,
        *,
        format=None,
        in_features=None,
        group_size=None,
        residual_bits=0,
        dtype=None,
        requires_grad=False,
    ):
        if isinstance(codes, PackedWeight) or any(part is None for part in (scales, format, in_features, group_size)):
            raise ValueError(
                f"PackedWeight: codes is {type(codes).__name__}, expected the parts codes, scales, format, in_features and "
                "group_size. w.detach() or w.clone() makes another PackedWeight of w; code that offloads parameters one by one "
                "(accelerate.cpu_offload, disk_offload) cannot hold packed ones"
            )
        in_features, group_size, residual_bits = int(in_features), int(group_size), int(residual_bits)
        given = (codes, scales, zeros, offsets, perm, residual)
        *meta, meta_residual = [None if t is None else t.detach().to("meta") for t in given]
        _ops.dequantize(*meta, format, in_features, group_size)  # the shape rule of the op is the check
        check_permutation(perm)
        if (residual is None) != (residual_bits == 0):
            raise ValueError(
                f"PackedWeight: residual_bits is {residual_bits} {'without' if residual is None else 'with'} a residual"
            )
        if residual is not None:
            _ops.dequantize_fine(*meta, format, in_features, group_size, meta_residual, residual_bits)
        for name, part in zip(PART_NAMES, given):
            if part is not None and part.device != codes.device:
                raise ValueError(f"PackedWeight: {name} is on {part.device}, codes is on {codes.device}")
        parts = [None if t is None else t.detach() for t in given]
        return cls._wrap(
            *parts, format, in_features, group_size, residual_bits, dtype or scales.dtype, requires_grad=requires_grad
        )

    def __init__(self, *args, **kwargs):
        pass

    @classmethod
    def _wrap(
        cls,
        codes,
        scales,
        zeros,
        offsets,
        perm,
        residual,
        format,
        in_features,
        group_size,
        residual_bits,
        dtype,
        transposed=False,
        requires_grad=False,
    ):
        n = codes.shape[0]
        size, stride = ((in_features, n), (1, in_features)) if transposed else ((n, in_features), (in_features, 1))
        # A storage of no bytes: what reads storages without asking (torch.jit.save) finds nothing instead of a null pointer.
        self = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=dtype, device=codes.device, requires_grad=requires_grad, storage_size=0
        )
        self.codes, self.scales, self.zeros, self.offsets, self.perm = codes, scales, zeros, offsets, perm
        self.residual, self.residual_bits = residual, residual_bits
        self.format, self.in_features, self.group_size = format, in_features, group_size
        self.transposed = transposed
        return self

    @classmethod
    def from_float(
        cls,
        w,
        *,
        bits=None,
        format=None,
        group_size=64,
        sym=None,
        scheme=None,
        zero_kind=None,
        scale_dtype=None,
        perm=None,
        residual_bits=0,
        rounding="nearest",
        seed=0,
        dtype=None,
        requires_grad=False,
    ):
        """Quantizes a float matrix [N, K].

        Args:
            bits, format: one of them; bits 1 is "sign", bits b is "uint<b>".
            group_size: columns that share a scale; -1 for a whole row.
            sym: True for the format's fixed zero, False for a zero or an offset a group. None: True for sign and ternary only.
            scheme: how scales are chosen: "minmax", "absmax", "absmean", "midrise" or "fan_in". None: minmax; absmax when sym;
                absmean for sign and ternary; midrise with residual_bits, unless sym or zero_kind are given. "midrise" and
                "fan_in" lay the levels evenly around 0: as wide as fits the group's mean |w|, or as wide as 2 to 4 / sqrt(K),
                which leaves the fresh weights of a torch.nn.Linear room to grow (docs/formats.md).
            zero_kind: "offsets" or "zeros" when not sym.
            scale_dtype: float32, float16 or bfloat16 of scales and offsets; w's when None.
            residual_bits: r more bits a weight for training; w is rounded onto the fine grid.
            rounding: "nearest" or "stochastic" (with seed).
            dtype: of the result; w's when None.
        """
        w = w.detach()
        if isinstance(w, PackedWeight):
            w = w.dequantize_fine()
        if w.dim() != 2 or not w.is_floating_point():
            raise ValueError(
                f"PackedWeight.from_float: w is {w.dtype} {list(w.shape)}, expected a floating point matrix [N, K]"
            )
        format = resolve_format(bits, format)
        group_size = resolve_group_size(group_size, w.shape[1])
        residual_bits = check_residual_bits("PackedWeight.from_float", residual_bits, format)
        scheme, zero_kind = default_scheme(format, sym, scheme, zero_kind, residual_bits)
        check_quantize_options(scale_dtype, rounding, seed)
        check_permutation(perm)
        codes, scales, zeros = _ops.quantize(w, format, group_size, scheme, zero_kind, scale_dtype, perm, rounding, seed)
        residual = None
        if residual_bits:
            residual = _residual_plane(codes.new_zeros(codes.shape[0], w.shape[1]), residual_bits)
        packed = cls._wrap(
            codes,
            scales,
            zeros if zero_kind == "zeros" else None,
            zeros if zero_kind == "offsets" else None,
            perm,
            residual,
            format,
            w.shape[1],
            group_size,
            residual_bits,
            dtype or w.dtype,
            requires_grad=requires_grad,
        )
        if residual_bits:
            packed._encode_(w, rounding, seed)
        return packed

    # ---- what it is

    @property
    def parts(self):
        """The present parts by name: codes, scales, zeros or offsets, perm, residual. They are the storage, not copies."""
        return {name: part for name in PART_NAMES if (part := getattr(self, name)) is not None}

    @property
    def bits(self):
        """Bits of a code, without the residual's; for mixed width the mean over a row, padding included."""
        return format_bits(self.format, self.in_features)

    @property
    def nbytes(self):
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())  # nbytes refuses symbolic sizes

    @property
    def bits_per_weight(self):
        """All stored bits (codes, scales, zeros or offsets, perm, residual) over the number of weights."""
        return 8 * self.nbytes / max(1, self.numel())

    @property
    def packed_args(self):
        """The arguments that spell this weight, as it is deployed, in every torch.ops.subbyte op."""
        return (self.codes, self.scales, self.zeros, self.offsets, self.perm, self.format, self.in_features, self.group_size)

    def block_of_rows(self, begin, end):
        """Rows begin to end as a packed weight that shares this one's storage."""
        return self._map_parts(lambda part: part if part is self.perm else part[begin:end])

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Of a shard, for FSDP2: what goes over the wire is packed."""
        sent = [name for name in PART_NAMES if name != "perm" and getattr(self, name) is not None]
        return tuple(getattr(self, name).contiguous() for name in sent), sent

    def fsdp_post_all_gather(self, gathered, sent, dtype, *, out=None):
        if out is not None:  # its parts are views of the gathered tensors, whose storage was filled anew
            return None
        parts = dict(zip(sent, gathered))
        named = {id(getattr(self, name)): part for name, part in parts.items()}
        whole = self._map_parts(lambda part: named.get(id(part), part), dtype=dtype)
        return whole, tuple(gathered)

    def dequantize(self, dtype=None):
        """The dense values, as a plain tensor of this weight's dtype or another; no gradient. They are those that products
        with this weight use: of the codes alone."""
        dense = _ops.dequantize(*self.packed_args, dtype or self.dtype)
        return dense.t() if self.transposed else dense

    def dequantize_fine(self, dtype=None):
        """The dense values of codes and residual together, which training steps from; without a residual, dequantize()."""
        if self.residual is None:
            return self.dequantize(dtype)
        dense = _ops.dequantize_fine(*self.packed_args, self.residual, self.residual_bits, dtype or self.dtype)
        return dense.t() if self.transposed else dense

    def drop_residual(self):
        """This weight as it is deployed: on the same codes and scales, without the residual."""
        parts = [None if name == "residual" else getattr(self, name) for name in PART_NAMES]
        weight = PackedWeight._wrap(
            *parts, self.format, self.in_features, self.group_size, 0, self.dtype, transposed=self.transposed
        )
        return _as_kind_of(weight, self.requires_grad, getattr(self, "_is_param", False))

    def _encode_(self, dense, rounding, seed):
        """Codes, and the residual where there is one, from dense values [N, K] in stored orientation."""
        if self.residual is not None:
            _ops.encode_fine_(*self.packed_args, self.residual, self.residual_bits, dense, rounding, seed, 0)
        else:
            codes, *grid, format, _, group_size = self.packed_args
            _ops.encode_(codes, dense, *grid, format, group_size, rounding, seed, 0)

    def __repr__(self, *, tensor_contents=None):
        kind = "zeros" if self.zeros is not None else "offsets" if self.offsets is not None else "fixed zero"
        text = (
            f"PackedWeight({list(self.shape)}, format='{self.format}', group_size={self.group_size}, {kind}, "
            f"scales={str(self.scales.dtype)[6:]}, dtype={str(self.dtype)[6:]}, device='{self.device}', "
            # While the compiler traces, sizes are symbols.
            + (f"{self.bits_per_weight:.4g} bits per weight, {self.nbytes} bytes" if type(self.nbytes) is int else "traced")
        )
        return (
            text
            + (", perm" if self.perm is not None else "")
            + (f", residual_bits={self.residual_bits}" if self.residual_bits else "")
            + (", transposed" if self.transposed else "")
            + (", requires_grad=True)" if self.requires_grad else ")")
        )

    # ---- life: flatten for compile, copy, pickle

    def __tensor_flatten__(self):
        names = [name for name in PART_NAMES if getattr(self, name) is not None]
        return names, (self.format, self.in_features, self.group_size, self.residual_bits, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return PackedWeight._wrap(*(inner.get(name) for name in PART_NAMES), *context)

    def _stable_hash_for_caching(self):
        # The compiler's cache across processes: everything that compiled code may depend on.
        names, context = self.__tensor_flatten__()
        described = [
            (name, str(part.dtype), str(part.device), tuple(part.shape), part.stride()) for name, part in self.parts.items()
        ]
        return repr((names, context, described, tuple(self.shape), self.requires_grad))

    def _map_parts(self, function, dtype=None, transposed=None):
        parts = [None if (part := getattr(self, name)) is None else function(part) for name in PART_NAMES]
        return PackedWeight._wrap(
            *parts,
            self.format,
            self.in_features,
            self.group_size,
            self.residual_bits,
            dtype or self.dtype,
            self.transposed if transposed is None else transposed,
        )

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("PackedWeight: only leaves (weights made by the user) can be deep-copied")
        with torch.no_grad():
            copied = self._map_parts(torch.clone)
        result = _as_kind_of(copied, self.requires_grad, getattr(self, "_is_param", False))
        if self.grad is not None:
            result.grad = self.grad.clone()
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol):
        parts = tuple(getattr(self, name) for name in PART_NAMES)
        return _rebuild_packed_weight, (
            parts,
            self.format,
            self.in_features,
            self.group_size,
            self.dtype,
            self.transposed,
            self.requires_grad,
            getattr(self, "_is_param", False),
            self.residual_bits,
        )

    # ---- operations

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if func in _FUNCTIONS:
            result = _FUNCTIONS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled() and args and isinstance(args[0], PackedWeight) and not args[0].is_inference():
                # Inference mode makes no views of ordinary tensors that are wrappers: the result would share their version
                # counter.
                with torch.inference_mode(False), torch.no_grad():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.namespace == "subbyte":  # the handle has done its work in autograd
            args = [None if isinstance(a, PackedWeight) else a for a in args]
            return func(*args, **{k: None if isinstance(v, PackedWeight) else v for k, v in kwargs.items()})
        return _run_dense(func, args, kwargs)


def _residual_plane(values, residual_bits):
    """uint8 [N, K] as the stream of a residual."""
    return _ops.pack(values, "sign" if residual_bits == 1 else f"uint{residual_bits}")


def _as_kind_of(weight, requires_grad, is_param):
    if is_param:
        return torch.nn.Parameter(weight, requires_grad=requires_grad)
    return weight.requires_grad_(requires_grad)


def _rebuild_packed_weight(
    parts, format, in_features, group_size, dtype, transposed, requires_grad, is_param, residual_bits=0
):
    # The same checks as for parts from anywhere: a pickle is a file.
    weight = PackedWeight(
        *parts, format=format, in_features=in_features, group_size=group_size, residual_bits=residual_bits, dtype=dtype
    )
    if transposed:
        weight = weight._map_parts(lambda part: part, transposed=True)
    return _as_kind_of(weight, requires_grad, is_param)


torch.serialization.add_safe_globals([PackedWeight, _rebuild_packed_weight])


# ---- __torch_function__: whole products, with their own gradient ------------------------------------------------------------

_FUNCTIONS = {}


def _overrides(*functions):
    def register(handler):
        for function in functions:
            _FUNCTIONS[function] = handler
        return handler

    return register


def _transformed():
    """Whether torch.func (grad, vmap, jacrev) or forward-mode differentiation is at work.

    They know PyTorch's ops, not the gradients of these; a product then runs through the dispatcher, op by op.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    )


def _handle(weight):
    """The weight where a gradient is wanted; without, the op needs nothing but the parts. A trace may be trained later."""
    return weight if weight.requires_grad and (torch.is_grad_enabled() or torch.jit.is_tracing()) else None


@_overrides(F.linear)
def _function_linear(input, weight, bias=None):
    if not isinstance(weight, PackedWeight) or isinstance(input, PackedWeight) or isinstance(bias, PackedWeight):
        return NotImplemented
    if weight.transposed or _transformed():
        return NotImplemented
    return _ops.linear(input, _handle(weight), *weight.packed_args, bias)


@_overrides(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def _function_matmul(input, other):
    if isinstance(input, PackedWeight) or not isinstance(other, PackedWeight) or not other.transposed or _transformed():
        return NotImplemented
    # `other` is the view w.t() of [N, K]; its own transpose carries the gradient back to w.
    return _ops.linear(input, _handle(other) if not other.requires_grad else _handle(other.t()), *other.packed_args, None)


@_overrides(F.embedding)
def _function_embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if not isinstance(weight, PackedWeight) or weight.transposed or scale_grad_by_freq or _transformed():
        return NotImplemented
    if max_norm is not None:
        raise ValueError("embedding: max_norm rewrites rows of the table, which a packed table does not support")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    padding_idx = -1 if padding_idx is None else padding_idx
    return _ops.embedding(input, _handle(weight), *weight.packed_args, padding_idx, sparse, weight.dtype)


@_overrides(F.embedding_bag)
def _function_embedding_bag(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    if not isinstance(weight, PackedWeight) or weight.transposed or isinstance(per_sample_weights, PackedWeight):
        return NotImplemented
    if max_norm is not None:
        raise ValueError("embedding_bag: max_norm rewrites rows of the table, which a packed table does not support")
    if mode not in ("sum", "mean") or scale_grad_by_freq or include_last_offset:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    padding_idx = -1 if padding_idx is None else padding_idx
    return _ops.embedding_bag(
        input, offsets, _handle(weight), *weight.packed_args, mode, per_sample_weights, padding_idx, sparse, weight.dtype
    )


@_overrides(torch.Tensor.__setitem__)
def _function_setitem(self, index, value):
    if not isinstance(self, PackedWeight):
        return NotImplemented
    with torch.no_grad():
        dense = self.dequantize_fine()
        dense[index] = value.dequantize() if isinstance(value, PackedWeight) else value
        self.copy_(dense)
    return True


@_overrides(torch.Tensor.data.__set__)
def _function_set_data(self, value):
    if not isinstance(self, PackedWeight):
        return NotImplemented
    if self.shape != value.shape:
        raise ValueError(f"PackedWeight: data of shape {list(value.shape)} is assigned to a weight of shape {list(self.shape)}")
    with torch.no_grad():
        if not isinstance(value, PackedWeight):
            self.copy_(value)
            return None
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, value)  # dtype, device and strides
        for name in (*PART_NAMES, "format", "in_features", "group_size", "residual_bits", "transposed"):
            setattr(self, name, getattr(value, name))
    return None


@_overrides(torch.empty_like)
def _function_empty_like(input, *, dtype=None, device=None, **kwargs):
    # With a device it is Module.to_empty, which wants a parameter of the same kind; without, an optimizer's dense state.
    if not isinstance(input, PackedWeight) or device is None:
        return NotImplemented
    with torch.no_grad():
        return input._map_parts(lambda part: torch.empty_like(part, device=device), dtype=dtype)


@_overrides(torch.Tensor.share_memory_)
def _function_share_memory_(self):
    for part in self.parts.values():
        part.share_memory_()
    return self


@_overrides(torch.Tensor.is_shared)
def _function_is_shared(self):
    return all(part.is_shared() for part in self.parts.values())


@_overrides(torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__)
def _function_read(self, *args, **kwargs):
    raise TypeError("a PackedWeight has no array of values; ask for its dequantize() first")


# ---- __torch_dispatch__: what works on the parts ----------------------------------------------------------------------------

_HANDLERS = {}


def _handles(*overloads):
    def register(handler):
        for overload in overloads:
            _HANDLERS[overload] = handler
        return handler

    return register


@_handles(aten.detach.default, aten.alias.default)
def _alias(func, self):
    return self._map_parts(func)


# FSDP2 (subbyte.distributed.fully_shard): while it cuts a weight into shards, and in a shard, rows stay packed. It calls for
# blocks of rows, for zeros to put them into, and for a flat view of a shard, of which it only keeps hold.


_sharding = False


@contextlib.contextmanager
def sharding():
    global _sharding
    before, _sharding = _sharding, True
    try:
        yield
    finally:
        _sharding = before


def _is_shard(weight):
    return isinstance(weight, PackedWeight) and not weight.transposed and (_sharding or getattr(weight, "_shard", False))


def packed_of(parameter):
    """The PackedWeight that a parameter is, or whose rows it holds here (a DTensor of FSDP2); None for others."""
    local = parameter if isinstance(parameter, PackedWeight) else getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, PackedWeight) else None


@_handles(aten.split.Tensor)
def _split(func, self, split_size, dim=0):
    if not _is_shard(self):
        frame = sys._getframe()
        while (frame := frame.f_back) is not None:
            if frame.f_code.co_name == "_init_sharded_param":
                raise RuntimeError(
                    "fully_shard: torch's own would make a dense float copy of a PackedWeight; use "
                    "subbyte.distributed.fully_shard"
                )
        return NotImplemented
    return [self.block_of_rows(i, min(i + split_size, self.shape[0])) for i in range(0, self.shape[0], split_size)]


@_handles(aten.slice.Tensor)
def _slice(func, self, dim=0, start=None, end=None, step=1):
    if not _is_shard(self) or dim != 0 or step != 1:
        return NotImplemented
    begin, end, _ = slice(start, end).indices(self.shape[0])
    return self.block_of_rows(begin, max(begin, end))


@_handles(aten.new_zeros.default)
def _new_zeros(func, self, size, **kwargs):
    if _is_shard(self) and len(size) == 2 and size[1] == self.shape[1]:
        return self._map_parts(lambda part: part if part is self.perm else part.new_zeros(size[0], *part.shape[1:]))
    return _dense_like(func, self, size, **kwargs)


@_handles(aten.as_strided.default)
def _as_strided(func, self, size, stride, storage_offset=None):
    if tuple(size) == self.shape and tuple(stride) == self.stride() and not storage_offset:
        return self._map_parts(aten.alias.default)
    return NotImplemented


@_handles(aten.view.default, aten._unsafe_view.default, aten.expand.default)
def _view(func, self, size, **kwargs):
    if _is_shard(self) and list(size) == [-1]:
        return self._map_parts(aten.alias.default)
    if list(size) in (list(self.shape), [-1, self.shape[1]], [self.shape[0], -1]):
        return self._map_parts(aten.alias.default)
    return NotImplemented


@_handles(aten.t.default)
def _t(func, self):
    return self._map_parts(aten.alias.default, transposed=not self.transposed)


@_handles(aten.transpose.int)
def _transpose(func, self, dim0, dim1):
    return self._map_parts(aten.alias.default, transposed=self.transposed != (dim0 % 2 != dim1 % 2))


@_handles(aten.permute.default)
def _permute(func, self, dims):
    return self._map_parts(aten.alias.default, transposed=self.transposed != ([d % 2 for d in dims] == [1, 0]))


@_handles(aten.clone.default)
def _clone(func, self, memory_format=None):
    return self._map_parts(torch.clone)


@_handles(aten._to_copy.default)
def _to_copy(func, self, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return self._map_parts(
        lambda part: func(part, device=device, pin_memory=pin_memory, non_blocking=non_blocking), dtype=dtype
    )


@_handles(aten._pin_memory.default)
def _pin_memory(func, self, device=None):
    return self._map_parts(func)


@_handles(aten.is_pinned.default)
def _is_pinned(func, self, device=None):
    return self.codes.is_pinned()


@_handles(aten.record_stream.default)
def _record_stream(func, self, stream):
    for part in self.parts.values():
        part.record_stream(stream)


@_handles(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_empty_strided.default,
)
def _dense_like(func, self, *args, **kwargs):
    # Optimizer state and gradients are ordinary dense tensors. Of the template only shape, dtype and device count: one element.
    template = self.scales.new_empty((), dtype=self.dtype).expand(self.shape)
    if "like" in func.__name__:
        kwargs["memory_format"] = torch.contiguous_format
    return func(template, *args, **kwargs)


# Products. A transposed weight is w.t() [K, N]; products that read it along the other side are the gradient's product.


def _times(x, w):
    """x [M, .] @ w."""
    return _ops.linear(x, None, *w.packed_args, None) if w.transposed else _ops.linear_grad_input(x, *w.packed_args)


@_handles(aten.mm.default)
def _mm(func, a, b):
    if isinstance(a, PackedWeight) and isinstance(b, PackedWeight):
        return NotImplemented
    if isinstance(b, PackedWeight):
        return _times(a, b)
    return _times(b.t(), a.t()).t()


@_handles(aten.mv.default)
def _mv(func, a, v):
    if not isinstance(a, PackedWeight) or isinstance(v, PackedWeight):
        return NotImplemented
    return _times(v.unsqueeze(0), a.t()).squeeze(0)


@_handles(aten.addmm.default)
def _addmm(func, bias, a, b, *, beta=1, alpha=1):
    if isinstance(a, PackedWeight) or not isinstance(b, PackedWeight) or isinstance(bias, PackedWeight):
        return NotImplemented
    if b.transposed and beta == 1 and alpha == 1 and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        return _ops.linear(a, None, *b.packed_args, bias)
    return torch.add(bias * beta if beta != 0 else torch.zeros_like(bias), _times(a, b), alpha=alpha)


@_handles(aten.linear.default)
def _linear(func, input, weight, bias=None):
    return _function_linear(input, weight, bias)


@_handles(aten.embedding.default)
def _aten_embedding(func, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    if not isinstance(weight, PackedWeight) or weight.transposed:
        return NotImplemented
    return _ops.embedding(indices, None, *weight.packed_args, padding_idx, False, weight.dtype)


# Writing.


def _same_grid_kind(a, b):
    return (a.format, a.in_features, a.group_size, a.residual_bits, a.transposed, list(a.parts)) == (
        b.format,
        b.in_features,
        b.group_size,
        b.residual_bits,
        b.transposed,
        list(b.parts),
    )


@_handles(aten.copy_.default)
def _copy_(func, self, source, non_blocking=False):
    if (
        isinstance(self, PackedWeight)
        and isinstance(source, PackedWeight)
        and self.shape == source.shape
        and _same_grid_kind(self, source)
    ):
        if self.scales.dtype == source.scales.dtype:
            for name, part in self.parts.items():
                part.copy_(getattr(source, name), non_blocking=non_blocking)
            return self
    return NotImplemented


def _rescale_(weight, factor, divide):
    """Multiplies the grid instead of the values: exact up to one rounding of each scale, and codes stay as they are.

    Scales of 16 bits would swallow a factor near 1, the usual weight decay, so they are rescaled by powers of two alone.
    """
    if isinstance(factor, torch.Tensor):
        if factor.dim() != 0 or isinstance(factor, PackedWeight) or weight.scales.dtype != torch.float32:
            return False
    elif isinstance(factor, (int, float)):
        if weight.scales.dtype != torch.float32 and math.frexp(abs(factor))[0] != 0.5:
            return False
    else:
        return False
    _refuse_tracing(weight)
    for part in (weight.scales, weight.offsets):
        if part is not None:
            part.div_(factor) if divide else part.mul_(factor)
    return True


@_handles(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _mul_(func, self, other):
    if isinstance(self, PackedWeight) and _rescale_(self, other, divide="div" in func.__name__):
        return self
    return NotImplemented


@_handles(aten.add_.Tensor)
def _add_(func, self, other, *, alpha=1):
    """A sparse gradient's step: only the rows that it names are decoded, stepped and rounded."""
    sparse = isinstance(self, PackedWeight) and isinstance(other, torch.Tensor) and other.layout == torch.sparse_coo
    if not sparse or self.transposed or other.sparse_dim() != 1 or other.shape != self.shape:
        return NotImplemented
    _refuse_tracing(self)
    other = other.coalesce()
    _add_rows_(self, other.indices()[0], other.values(), alpha, "stochastic", _draw_seed(), 0)
    return self


def _add_rows_(weight, rows, values, alpha, rounding, seed, offset):
    """weight[rows] += alpha * values, rounded; what subbyte.functional.embedding_add_ says."""
    if weight.residual is None:
        _ops.embedding_add_(*weight.packed_args, rows, values, alpha, rounding, seed, offset)
        return
    of_rows = ("codes", "scales", "zeros", "offsets", "residual")
    parts = {name: part.index_select(0, rows) if name in of_rows else part for name, part in weight.parts.items()}
    touched = PackedWeight._wrap(
        *(parts.get(name) for name in PART_NAMES),
        weight.format,
        weight.in_features,
        weight.group_size,
        weight.residual_bits,
        weight.dtype,
    )
    if values.device.type != "cpu":  # as _store
        values = torch.where(values.isfinite(), values, 0)
    dense = touched.dequantize_fine(torch.float32).add_(values, alpha=alpha)
    arguments = (touched.residual, touched.residual_bits, dense, rounding, seed, offset)
    _ops.encode_fine_(*touched.packed_args, *arguments)
    for name in ("codes", "residual"):
        getattr(weight, name).index_copy_(0, rows, getattr(touched, name))


@_handles(aten.neg_.default)
def _neg_(func, self):
    return self.mul_(-1)


@_handles(aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_div_.Scalar, aten._foreach_div_.Tensor)
def _foreach_mul_(func, tensors, other):
    for tensor in tensors:
        tensor.div_(other) if "div" in func.__name__ else tensor.mul_(other)


def _refuse_tracing(weight):
    if torch.compiler.is_compiling() or isinstance(weight.codes, torch._subclasses.FakeTensor):
        raise RuntimeError(
            "PackedWeight: an in-place update cannot be compiled, its rounding seed would be the same in every step. "
            "Compile forward and backward, and run the optimizer's step outside torch.compile"
        )


_written_arguments = {}


def _writes(func):
    """Positions and names of the arguments that an op writes to."""
    if func not in _written_arguments:
        arguments = func._schema.arguments
        _written_arguments[func] = [
            (i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
    return _written_arguments[func]


def _store(weight, dense):
    """Encodes values onto the weight's grid. A value that is not finite is a ValueError on the CPU and skipped on a GPU, which
    cannot refuse without being waited for."""
    if dense.device.type != "cpu":
        dense = torch.where(dense.isfinite(), dense, weight.dequantize_fine(torch.float32))
    weight._encode_(dense.t() if weight.transposed else dense, "stochastic", _draw_seed())


def _run_dense(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes(func)]
    written = [t for t in tree_flatten(written)[0] if isinstance(t, torch.Tensor)]
    targets = {id(t): t for t in written if isinstance(t, PackedWeight)}
    # Updates are formed in float32: a bfloat16 sum would swallow small steps before stochastic rounding sees them. Where the op
    # also writes ordinary tensors (a fused optimizer its state), all keep their types.
    widen = bool(targets) and all(isinstance(t, PackedWeight) for t in written)
    narrow = {t.dtype for t in targets.values()} - {torch.float64} if widen else set()
    for target in targets.values():
        _refuse_tracing(target)
    fine = any(target.residual is not None for target in targets.values())
    dense = {}

    def plain(t):
        if isinstance(t, PackedWeight):
            if id(t) not in dense:
                read = t.dequantize_fine if fine else t.dequantize
                dense[id(t)] = read(torch.float32 if t.dtype in narrow else None)
            return dense[id(t)]
        if isinstance(t, torch.Tensor) and t.dtype in narrow and t.dtype != torch.float32:
            return t.float()
        return t

    args, kwargs = tree_unflatten([plain(leaf) for leaf in flat], spec)
    result = func(*args, **kwargs)
    if not targets:
        return result
    for key, target in targets.items():
        _store(target, dense[key])
    original = {id(dense[key]): target for key, target in targets.items()}
    leaves, spec = tree_flatten(result)
    return tree_unflatten([original.get(id(leaf), leaf) for leaf in leaves], spec)
