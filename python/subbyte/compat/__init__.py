"""The names of bitorch_engine (0.2.6) and of BitLinear (0.1.0) on top of subbyte, for code that was written against them.

import subbyte.compat
subbyte.compat.install()
from bitorch_engine.layers.qlinear.nbit.cuda import MPQLinearCuda      works from here on

docs/porting.md lists every path with what takes its place, and what differs.
"""

import importlib
import sys
import types

from .paths import BITLINEAR_PATHS, BITORCH_ENGINE_PATHS

__all__ = ["install", "uninstall"]

_MARK = "__subbyte_compat__"
_installed = {}  # path -> the module put into sys.modules


def _refuse_foreign(root, advice):
    present = sys.modules.get(root)
    if present is not None and not hasattr(present, _MARK):
        where = getattr(present, "__file__", None) or "a module without a file"
        raise ImportError(f"subbyte.compat.install: {root} is imported already, from {where}. {advice}")


def _make_modules(paths):
    modules = {}
    for path, names in paths.items():
        module = types.ModuleType(path, f"{path}, served by subbyte.compat (docs/porting.md).")
        module.__path__ = []  # a package: what lies below it is in sys.modules, or is not there
        setattr(module, _MARK, True)
        for name, source in names.items():
            where, _, attribute = source.partition(":")
            setattr(module, name, getattr(importlib.import_module(where, __package__), attribute or name))
        if names:
            module.__all__ = [name for name in names if not name.startswith("__")]
        modules[path] = module
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(modules[parent], name, module)
    return modules


def install(bitlinear=False):
    """Makes `import bitorch_engine...` find subbyte's implementation, under every path of the original. Idempotent.

    Args:
        bitlinear: also make `import bitlinear` find subbyte.compat.bitlinear. Off, because an unrelated package on PyPI has the
            same name.

    Raises:
        ImportError: the real package is imported already; its classes and these would be mixed.
    """
    _refuse_foreign("bitorch_engine", "Call install() before anything imports it, or uninstall the package.")
    if bitlinear:
        _refuse_foreign("bitlinear", "Import subbyte.compat.bitlinear instead.")
    wanted = {**BITORCH_ENGINE_PATHS, **(BITLINEAR_PATHS if bitlinear else {})}
    missing = {path: names for path, names in wanted.items() if path not in _installed}
    if missing:
        modules = _make_modules(missing)
        sys.modules.update(modules)
        _installed.update(modules)


def uninstall():
    """Takes back what install() put into sys.modules. Objects made meanwhile keep working."""
    for path, module in _installed.items():
        if sys.modules.get(path) is module:
            del sys.modules[path]
    _installed.clear()
