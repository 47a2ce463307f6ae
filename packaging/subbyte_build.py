"""Build backend of `pip install .`: scikit-build-core, compiled against the PyTorch that is installed where the wheel goes.

pip builds in an isolated environment that hides the target's packages, so the target's PyTorch is looked for with the running
interpreter without pip's variables. Where there is none, the newest supported one that the project is tested with is asked for.

Settings, as pip --config-settings NAME=VALUE or as environment variables:
    cuda   SUBBYTE_CUDA    ON or OFF; default: ON where an nvcc is found and PyTorch is a CUDA build
    torch  SUBBYTE_TORCH   folder of the torch package to build against; default: the target environment's
"""

import os
import shutil
from pathlib import Path

from scikit_build_core import build as _base
from subbyte_torch_location import DEFAULT_TORCH, installed_torch, torch_version

_NVCC_PLACES = ("/usr/local/cuda/bin",)
_ON, _OFF = ("1", "ON", "TRUE", "YES"), ("0", "OFF", "FALSE", "NO")


def _setting(settings, name, variable):
    return (settings or {}).get(name) or os.environ.get(variable)


def _torch_folder(settings):
    named = _setting(settings, "torch", "SUBBYTE_TORCH")
    if named:
        os.environ["SUBBYTE_TORCH"] = named  # for the provider of the dependencies
        if not (Path(named) / "share" / "cmake" / "Torch").is_dir():
            raise SystemExit(f"subbyte: torch={named} is not the folder of a torch package")
        return Path(named)
    return installed_torch()


def _nvcc():
    return shutil.which("nvcc") or next((f"{p}/nvcc" for p in _NVCC_PLACES if os.access(f"{p}/nvcc", os.X_OK)), None)


def _requires(base, settings):
    return base + ([] if _torch_folder(settings) else [DEFAULT_TORCH])


def _with_cmake_settings(settings):
    settings = dict(settings or {})
    folder = _torch_folder(settings)
    if folder is None:
        raise SystemExit(f"subbyte: no PyTorch to build against; install {DEFAULT_TORCH}, or drop --no-build-isolation")
    cuda = _setting(settings, "cuda", "SUBBYTE_CUDA")
    if cuda is None:
        with_cuda = _nvcc() is not None and (folder / "lib" / "libtorch_cuda.so").exists()
    elif cuda.upper() in _ON + _OFF:
        with_cuda = cuda.upper() in _ON
    else:
        raise SystemExit(f"subbyte: cuda={cuda} is neither ON nor OFF")
    for name in ("torch", "cuda"):
        settings.pop(name, None)
    settings.setdefault("cmake.define.Torch_DIR", str(folder / "share" / "cmake" / "Torch"))
    settings.setdefault("cmake.define.SB_BUILD_CUDA", "ON" if with_cuda else "OFF")
    # A folder that stays makes the next build short; what it depends on stands in its name.
    settings.setdefault("build-dir", f"build/wheel-torch-{torch_version(folder)}{'-cuda' if with_cuda else ''}")
    return settings


def get_requires_for_build_wheel(config_settings=None):
    return _requires(_base.get_requires_for_build_wheel(None), config_settings)


def get_requires_for_build_sdist(config_settings=None):
    return _base.get_requires_for_build_sdist(None)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _base.prepare_metadata_for_build_wheel(metadata_directory, _with_cmake_settings(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _base.build_wheel(wheel_directory, _with_cmake_settings(config_settings), metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return _base.build_sdist(sdist_directory, None)
