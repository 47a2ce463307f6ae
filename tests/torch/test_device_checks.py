"""Bad values in CUDA tensors: every one is an error by the next operation, names argument, value and expectation, and leaves the
context usable. On the CPU the same calls raise at once."""

import pytest
import torch

import subbyte
from subbyte import functional

CUDA = torch.cuda.is_available() and subbyte.info()["has_cuda"]
DEVICES = ["cpu", pytest.param("cuda", marks=[] if CUDA else pytest.mark.skip(reason="no CUDA device, or a library without CUDA kernels"))]


def _table(device, bits=4):
    w = torch.randn(10, 24, device=device)
    return torch.nn.Parameter(subbyte.PackedWeight.from_float(w, bits=bits, group_size=8))


def _look_up(device, indices):
    return torch.nn.functional.embedding(torch.tensor(indices, device=device), _table(device))


def _bag(device):
    return functional.embedding_bag(torch.tensor([[1, 10]], device=device), _table(device, 1))


def _update(device):
    w = _table(device, 1)
    return torch.ops.subbyte.embedding_update_(w.codes, torch.tensor([3, 12], device=device), w.codes[:2], 24)


def _binary(device, scale):
    x, w = torch.randn(3, 16, device=device), torch.randn(5, 16, device=device)
    one = torch.ones((), device=device)
    return torch.ops.subbyte.binary_linear(x, w, None, None, torch.tensor(scale, device=device), one, None)


def _step(device, step):
    x = torch.randn(3, 16, device=device)
    return functional.quantized_matmul(x, x, torch.tensor(step, device=device), torch.ones((), device=device))


def _pack(device):
    codes = torch.tensor([[0, 1, 9]], dtype=torch.uint8, device=device)
    return torch.ops.subbyte.pack(codes, "uint3")


def _quantize(device):
    w = torch.zeros(2, 8, device=device)
    w[1, 3] = float("nan")
    return subbyte.PackedWeight.from_float(w, bits=4, group_size=8)


CASES = {
    "index": (lambda d: _look_up(d, [0, 10]), IndexError, r"embedding: index 10 at position 1 is outside the table, expected 0 <= index < 10"),
    "negative index": (lambda d: _look_up(d, [-1]), IndexError, r"embedding: index -1 at position 0 is outside the table"),
    "bag": (_bag, IndexError, r"embedding_bag: index 10 at position 1 is outside the table"),
    "row": (_update, IndexError, r"embedding_update_?: row 12 at position 1"),
    "scale 0": (lambda d: _binary(d, 0.0), ValueError, r"binary_linear: scale_a is 0, expected a finite number above 0"),
    "scale NaN": (lambda d: _binary(d, float("nan")), ValueError, r"binary_linear: scale_a is nan, expected a finite number above 0"),
    "step": (lambda d: _step(d, float("nan")), ValueError, r"nan.*, expected (a )?finite number"),
    "code": (_pack, ValueError, r"pack: code 9 at \[0, 2\] is outside"),
    "weight": (_quantize, ValueError, r"quantize: w\[1, 3\] is nan, expected finite values"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_are_named(device, case):
    call, error, text = CASES[case]
    with pytest.raises(error, match=text):
        call(device)
        subbyte.raise_device_errors()
    subbyte.raise_device_errors()  # said once
    assert _look_up(device, [3]).isfinite().all()


@pytest.mark.skipif(not CUDA, reason="no CUDA device, or a library without CUDA kernels")
def test_the_next_operation_raises_or_on_request_the_operation_itself():
    _look_up("cuda", [99])
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="index 99"):
        _look_up("cuda", [1])
    subbyte.set_device_checks("wait")
    try:
        with pytest.raises(IndexError, match="index 98"):
            _look_up("cuda", [98])
    finally:
        subbyte.set_device_checks("deferred")
    assert _look_up("cuda", [1]).isfinite().all()


@pytest.mark.skipif(not CUDA, reason="no CUDA device, or a library without CUDA kernels")
def test_backward_of_a_stray_index_writes_nothing_outside():
    gy = torch.randn(3, 4, device="cuda")
    got = torch.ops.subbyte.embedding_grad_weight(gy, torch.tensor([1, 7, -3], device="cuda"), 5)
    want = torch.zeros(5, 4, device="cuda")
    want[1] = gy[0]
    assert torch.equal(got, want)


def test_modes_are_checked():
    with pytest.raises(ValueError, match="set_device_checks: mode is 'now', expected 'deferred' or 'wait'"):
        subbyte.set_device_checks("now")
