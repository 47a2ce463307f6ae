"""Finds and loads libsubbyte_torch.so, the library with the operations, and checks that it fits the PyTorch in use.

Where it is looked for: $SUBBYTE_TORCH_LIB (a file), then beside this module, where a wheel puts it. The library calls PyTorch's
C++ interface, which changes with every minor version, so it must have been built against the minor version that is imported.
"""

import ctypes
import os
from pathlib import Path

import torch

LIBRARY_NAME = "libsubbyte_torch.so"


class LibraryError(ImportError):
    """The compiled library is missing, or was built for another PyTorch."""


def find():
    """Path of the library. Raises LibraryError naming the places looked at."""
    named = os.environ.get("SUBBYTE_TORCH_LIB")
    if named:
        if not os.path.isfile(named):
            raise LibraryError(f"subbyte: SUBBYTE_TORCH_LIB names {named}, which is not a file")
        return Path(named).resolve()
    packaged = Path(__file__).resolve().parent / LIBRARY_NAME
    if packaged.is_file():
        return packaged
    raise LibraryError(
        f"subbyte: {packaged} does not exist. Install the package ('pip install .' in its source folder builds the "
        f"library), or build it with CMake and set SUBBYTE_TORCH_LIB to the path of {LIBRARY_NAME}"
    )


def _text(library, function):
    symbol = getattr(library, function)
    symbol.restype = ctypes.c_char_p
    return symbol().decode()


def _minor(version):
    return version.split("+")[0].split(".")[:2]


class _Loaded:
    """What is known of the loaded library."""

    path = None
    built_with = None
    version = None
    has_cuda = False


def load():
    """torch.ops.subbyte, after loading the library on the first call."""
    if _Loaded.path is None:
        path = find()
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            # Symbols of another PyTorch do not resolve, so the version cannot be asked for; it stands beside the library.
            raise LibraryError(_mismatch(path, _recorded_version(path), str(error))) from None
        built_with = _text(library, "subbyte_torch_built_with")
        if _minor(built_with) != _minor(torch.__version__):
            raise LibraryError(_mismatch(path, built_with))
        torch.ops.load_library(str(path))
        library.subbyte_torch_has_cuda.restype = ctypes.c_int
        _Loaded.path, _Loaded.built_with, _Loaded.version = path, built_with, _text(library, "subbyte_version")
        _Loaded.has_cuda = bool(library.subbyte_torch_has_cuda())
    return torch.ops.subbyte


def _recorded_version(path):
    """The version in <library>.torch_version, which the build writes; None when there is none."""
    try:
        return Path(f"{path}.torch_version").read_text().strip()
    except OSError:
        return None


def _mismatch(path, built_with, why=None):
    built = f"was built with PyTorch {built_with}" if built_with else "does not load"
    fits = built_with is not None and _minor(built_with) == _minor(torch.__version__)
    advice = "Reinstall it for the PyTorch that is here: pip install --force-reinstall --no-deps <subbyte source folder>" + (
        "" if built_with is None or fits else f", or install PyTorch {'.'.join(_minor(built_with))}"
    )
    return (
        f"subbyte: {path} {built}, and this is PyTorch {torch.__version__}. The library works "
        f"with the minor version it was built with alone. {advice}." + (f" ({why})" if why else "")
    )


def info():
    """Path, version, PyTorch version built against, and whether CUDA kernels are inside."""
    load()
    return {
        "path": str(_Loaded.path),
        "version": _Loaded.version,
        "built_with": _Loaded.built_with,
        "has_cuda": _Loaded.has_cuda,
    }
