"""GGUF files: tensors in packed form straight from the file's blocks, without a float in between."""

import json

from . import _library
from .checkpoint import FormatError, TensorFile
from .packed_weight import PackedWeight

_ops = _library.load()


def load_gguf(path):
    raise NotImplementedError
