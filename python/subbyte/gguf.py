"""GGUF files: tensors in packed form straight from the file's blocks, without a float in between."""

import json
import os

from . import _library
from .checkpoint import TensorFile, call_reader
from .packed_weight import PackedWeight

_ops = _library.load()


def load_gguf(path):
    """The tensors of a GGUF file by name, and its metadata.

    Q4_0, Q4_1 and Q8_0 matrices become PackedWeights that stand for exactly the file's values; F32, F16, BF16, F64 and integer
    tensors become ordinary ones. FormatError for a damaged file, or a tensor of another type (named, with its type).

    Returns a TensorFile: a dict with `metadata`, in which a long array (a tokenizer's words) is left out but for
    {"type": ..., "count": ..., "values": None}, and `types`, the file's type of each tensor.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"load_gguf: {path} does not exist")
    index = json.loads(call_reader(_ops.gguf_index, path))
    out = TensorFile(metadata=index["metadata"])
    out.types = {told["name"]: told["type"] for told in index["tensors"]}
    for told in index["tensors"]:
        parts = call_reader(_ops.gguf_tensor, path, told["name"])
        packed = told["packed"]
        if packed is None:
            out[told["name"]] = parts[0]
            continue
        zeros = {} if packed["zero_kind"] == "fixed" else {packed["zero_kind"]: parts[2]}
        out[told["name"]] = PackedWeight(
            parts[0], parts[1], **zeros, format=packed["format"], in_features=told["shape"][-1], group_size=packed["group_size"]
        )
    return out
