"""Native checkpoints: safetensors files whose metadata key "subbyte" describes the packed weights in it.

Schema version 1, read and written alike by the C++ library (subbyte/io/checkpoint.h): a packed weight NAME is stored as the
tensors NAME.codes, NAME.scales, NAME.zeros or NAME.offsets, NAME.perm, NAME.residual, and described in the JSON text of the
key as
    {"version": 1, "weights": {NAME: {"format": ..., "in_features": ..., "group_size": ...}}, "tied": {OTHER_NAME: NAME}}
with "residual_bits" where there is a residual; who only runs the model need not read that plane.
"tied" lists names that are the same tensor as another one, which is stored once.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from . import _library
from .nn.packed import _described
from .packed_weight import PackedWeight

_ops = _library.load()
VERSION = 1
_KEY = "subbyte"


class FormatError(ValueError):
    """A file that is not what it says it is: truncated, damaged, of an unknown kind. The text names file, tensor and fault."""


class TensorFile(dict):
    """Tensors of a file by name, each a torch.Tensor or a PackedWeight; `metadata` holds what else the file says."""

    def __init__(self, tensors=(), metadata=None):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def _tensors_of(model_or_tensors):
    """(name, tensor) of a module (parameters and persistent buffers, every name of a shared one) or of a mapping."""
    if not isinstance(model_or_tensors, torch.nn.Module):
        return list(model_or_tensors.items())
    model, found = model_or_tensors, []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}".strip("."), tensor))
    return found


@contextlib.contextmanager
def replacing(path):
    """A file that appears under its name when it is complete, also for what other writers make of it:

        with subbyte.replacing("run.pt") as temporary:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)

    Yields the name of an empty file in the same folder. When the block ends it is synced to the disk and takes the name `path`,
    in one step; a process that is killed before, or an exception, leaves the old file as it was. Only a kill leaves the
    temporary one, `.NAME.` and eight letters, behind.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    # The new name itself reaches the disk with the folder; a system that cannot sync a folder loses nothing by it.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(model_or_tensors, path, metadata=None):
    """Writes a model, or a mapping of names to tensors and PackedWeights, as a native checkpoint.

    The file appears under its name when it is complete; an interrupted run leaves the old file as it was. A tensor under
    several names (tied weights) is stored once. metadata: further text entries, {str: str}.
    """
    path, metadata = Path(path), dict(metadata or {})
    for key, value in metadata.items():
        if key in (_KEY, "format") or not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"save: metadata entry {key!r}: {value!r}: expected text under a name other than 'format' and '{_KEY}'"
            )
    flat, weights, tied, first_name = {}, {}, {}, {}

    def put(name, tensor):
        if name in flat:
            raise ValueError(f"save: two tensors are named '{name}'")
        flat[name] = tensor.detach().to("cpu").contiguous()

    for name, tensor in _tensors_of(model_or_tensors):
        if id(tensor) in first_name:
            tied[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        if isinstance(tensor, PackedWeight):
            if tensor.transposed:
                raise ValueError(f"save: '{name}' is a transposed view of a packed weight")
            for part_name, part in tensor.parts.items():
                put(f"{name}.{part_name}", part)
            weights[name] = _described(tensor)
        else:
            put(name, tensor)
    # Views of one storage become tensors of their own: a file has no views.
    seen = set()
    for name, tensor in flat.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            flat[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    description = {"version": VERSION, "weights": weights, **({"tied": tied} if tied else {})}
    metadata.update({"format": "pt", _KEY: json.dumps(description, sort_keys=True)})
    with replacing(path) as temporary:
        safetensors.torch.save_file(flat, temporary, metadata)


def call_reader(function, *args):
    """Calls one of the library's file operators; its errors about the file as FormatError."""
    try:
        return function(*args)
    except RuntimeError as error:
        raise FormatError(str(error).split("\nException raised from")[0]) from None


def load(path, device="cpu"):
    """Reads a native checkpoint, or any safetensors file: a file, an index of shards, or the folder that holds one.

    Returns a TensorFile: names to tensors and PackedWeights. FormatError for a damaged file or an unknown version, naming
    tensor and byte offset; nothing is returned in part.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"load: {path} does not exist")
    text, tensors = call_reader(_ops.checkpoint_load, path)
    index, tensors = json.loads(text), iter(tensors)
    out = TensorFile(metadata=index["metadata"])
    for told in index["tensors"]:
        packed = told["packed"]
        if packed is None:
            out[told["name"]] = next(tensors).to(device)
        else:
            parts = {name: next(tensors).to(device) for name in packed.pop("parts")}
            out[told["name"]] = PackedWeight(**parts, **packed)
    out.update({name: out[other] for name, other in index["tied"].items()})
    return out


@torch.no_grad()
def load_weights_(model, tensors, strict=True):
    """Puts tensors and PackedWeights (a TensorFile, or any mapping by name) into a model, in place and without a float detour.

    A PackedWeight replaces the weight of a Linear, Embedding, EmbeddingBag or transformers Conv1D, which becomes its packed
    class; dtype of the weight it replaces, and sharing between modules, are kept. Other tensors are copied into the parameter
    or buffer of their name.
    strict: ValueError unless the names are exactly the model's; before anything is changed.
    """
    from .conversion import _KINDS, _kind, _pack_module, packed_kind

    modules = dict(model.named_modules(remove_duplicate=False))
    targets = dict(_tensors_of(model))
    names_of = {}
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)
    unexpected = [name for name in tensors if name not in targets]
    missing = [names[0] for names in names_of.values() if not any(name in tensors for name in names)]
    if strict and (unexpected or missing):
        raise ValueError(
            "load_weights_: "
            + "; ".join(
                f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in (("not in the model", unexpected), ("not given", missing))
                if names
            )
        )
    packed = {}
    for name, tensor in tensors.items():
        if name not in targets:
            continue
        target, owner = targets[name], modules[name.rpartition(".")[0]]
        if isinstance(tensor, PackedWeight):
            kind = packed_kind(owner) or _kind(owner)
            if name.rpartition(".")[2] != "weight" or kind not in _KINDS:
                raise ValueError(f"load_weights_: '{name}' is packed, but {type(owner).__name__} cannot hold a packed weight")
            shape = target.shape[::-1] if kind == "conv1d" else target.shape
            packed[name] = (owner, kind)
        else:
            shape = target.shape
            if isinstance(target, PackedWeight):
                raise ValueError(f"load_weights_: '{name}' is dense, the model's is packed")
        if tensor.shape != shape:
            raise ValueError(f"load_weights_: '{name}' is {list(tensor.shape)}, the model's is {list(shape)}")
    for name, tensor in tensors.items():
        if name not in targets:
            continue
        target = targets[name]
        if name not in packed:
            target.copy_(tensor)
            continue
        parameter = torch.nn.Parameter(tensor.to(device=target.device, dtype=target.dtype), requires_grad=target.requires_grad)
        for other in names_of[id(target)]:
            owner = modules[other.rpartition(".")[0]]
            kind = packed_kind(owner) or _kind(owner)
            if kind not in _KINDS:
                raise ValueError(
                    f"load_weights_: '{name}' is packed and shared with '{other}', which cannot hold a packed weight"
                )
            _pack_module(owner, kind, parameter, getattr(owner, "activation_bits", None))
    return model
