"""Fixtures of the tests of the old names. The library comes from $SUBBYTE_TORCH_LIB."""

import pytest
import torch

import subbyte
import subbyte.compat


def devices():
    cuda = torch.cuda.is_available() and subbyte.info()["has_cuda"]
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
def installed():
    """The old paths, in every test of this folder."""
    subbyte.compat.install()
    yield
    subbyte.compat.uninstall()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)
