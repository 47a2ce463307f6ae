"""bitorch_engine.utils.safe_import and the names of the bitorch_engine package itself."""

import warnings

EXTENSION_PREFIX = "bitorch_engine.extensions."
torch_int_gradients_support = True  # integer parameters receive gradients here, on any PyTorch


def initialize():
    """Does nothing: there is no `bitorch` registry to fill, and nothing to load."""


class _MissingExtension:
    """Stands for an extension module; every attribute raises RuntimeError."""

    def __init__(self, name, reason):
        self.__dict__.update(_name=name, _reason=reason)

    def __getattr__(self, attribute):
        raise RuntimeError(f"{self._name}.{attribute}: {self._reason}")


def import_extension(name, not_yet_implemented=False):
    """A placeholder for an extension module of bitorch_engine, which raises RuntimeError on any attribute access.

    The extensions have no counterpart: layers and functions of this package call subbyte's operators, on CPU and CUDA.
    """
    reason = (
        "this extension was never implemented in bitorch_engine"
        if not_yet_implemented
        else "extension modules of bitorch_engine do not exist here; the layers call torch.ops.subbyte"
    )
    warnings.warn(f"import_extension({name!r}): {reason}", stacklevel=2)
    return _MissingExtension(name, reason)
