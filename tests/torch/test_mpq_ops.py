"""The operations behind subbyte.mpq through the dispatcher: schemas, fake tensors, compilation, errors.

The library is the file that SUBBYTE_TORCH_LIB names; it is loaded without the subbyte package.
"""

import os

import pytest
import torch

LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)
torch.ops.load_library(LIBRARY)
ops = torch.ops.subbyte


def _has_cuda():
    import ctypes

    return torch.cuda.is_available() and bool(ctypes.CDLL(LIBRARY).subbyte_torch_has_cuda())


DEVICES = ["cpu", pytest.param("cuda", marks=[] if _has_cuda() else pytest.mark.skip(reason="no CUDA"))]
FORMATS = [("sign", 70), ("uint2", 33), ("uint3", 40), ("uint4", 64), ("uint8", 5), ("uint8*32+uint3*32+uint2*9", 73)]


def random_words(fmt, k, n, device):
    meta = torch.empty(0, 0, dtype=torch.uint8, device="meta")
    codes = torch.zeros(0, ops.pack(meta.new_empty(0, k), fmt).shape[1], dtype=torch.uint8)
    rows = ops.codes_to_columns(codes, fmt, k).shape[0]
    return torch.randint(-(2**31), 2**31 - 1, (rows, n), dtype=torch.int64).to(torch.int32).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt,k", FORMATS)
def test_words_become_codes_and_come_back(fmt, k, device):
    torch.manual_seed(0)
    words = random_words(fmt, k, 19, device)
    codes = ops.columns_to_codes(words, fmt, k)
    clean = ops.codes_to_columns(codes, fmt, k)
    assert torch.equal(ops.columns_to_codes(clean, fmt, k), codes)
    # A transposed view is read as what it means.
    assert torch.equal(ops.columns_to_codes(words.t().contiguous().t(), fmt, k), codes)
    if "*" in fmt:
        return
    order = torch.randperm(k).to(torch.int32).to(device)
    unpacked = ops.unpack(codes, fmt, k)
    assert torch.equal(ops.unpack(ops.columns_to_codes(words, fmt, k, order), fmt, k), unpacked[:, order.long()])
    ordered = ops.pack(unpacked[:, order.long()], fmt)
    assert torch.equal(ops.codes_to_columns(codes, fmt, k, order), ops.codes_to_columns(ordered, fmt, k))


@pytest.mark.parametrize("device", DEVICES)
def test_the_column_ops_pass_opcheck_and_compile(device):
    words = random_words("uint3", 40, 6, device)
    order = torch.randperm(40).to(torch.int32).to(device)
    codes = ops.columns_to_codes(words, "uint3", 40, order)
    torch.library.opcheck(ops.columns_to_codes, (words, "uint3", 40, order))
    torch.library.opcheck(ops.codes_to_columns, (codes, "uint3", 40))
    compiled = torch.compile(lambda w: ops.codes_to_columns(ops.columns_to_codes(w, "uint3", 40), "uint3", 40), fullgraph=True)
    assert torch.equal(compiled(words), ops.codes_to_columns(ops.columns_to_codes(words, "uint3", 40), "uint3", 40))


def test_the_column_ops_name_what_is_wrong():
    words = torch.zeros(8, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="words is Long"):
        ops.columns_to_codes(words.long(), "uint4", 64)
    with pytest.raises(ValueError, match="order is"):
        ops.columns_to_codes(words, "uint4", 64, torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match="order\\[2\\] is 64"):
        order = torch.arange(64, dtype=torch.int32)
        order[2] = 64
        ops.columns_to_codes(words, "uint4", 64, order)
    with pytest.raises(ValueError, match="codes is"):
        ops.codes_to_columns(torch.zeros(4, 31, dtype=torch.uint8), "uint4", 64)
    with pytest.raises(ValueError, match="mixed format"):
        ops.columns_to_codes(torch.zeros(12, 4, dtype=torch.int32), "uint8*32+uint4*32", 64, torch.arange(64).int())


# These look at what index tensors hold, so they have no fake form and are not compiled; tests/python/test_mpq.py runs them.
CONVERSIONS = (
    "gptq_unpack_zeros", "gptq_pack_zeros", "gptq_import", "exl2_import", "exl2_import_map", "export_columns", "q_groups_of",
    "make_group_map", "rows_of_format", "expand_second_level", "requantize_second_level", "unpack_statistic", "pack_statistic",
)  # fmt: skip


def test_the_conversions_serve_every_device_without_a_gradient():
    for name in CONVERSIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"subbyte::{name}", "CompositeImplicitAutograd"), name
    scales = torch.ones(2, 4, requires_grad=True)
    parts = ops.gptq_import(torch.zeros(8, 4, dtype=torch.int32), scales.detach(), None, None, None, None, 4, 64, 32)
    assert not parts[1].requires_grad and parts[2] is None and parts[6:] == ("uint4", 32)


@pytest.mark.parametrize("device", DEVICES)
def test_the_update_ops_pass_opcheck(device):
    torch.manual_seed(0)
    g = torch.randn(6, 40, device=device)
    m, v = torch.zeros_like(g), torch.zeros_like(g)
    torch.library.opcheck(ops.mpq_moments_, (m, v, g, 0.9, 0.99, 1e-6))
    for kind, moves in (("zeros", True), ("offsets", True), ("offsets", False), ("fixed", True)):
        perm = torch.randperm(40).to(torch.int32).to(device)
        codes, scales, third = ops.quantize(
            torch.randn(6, 40, device=device), "uint4", 16, "absmax" if kind == "fixed" else "minmax", kind, None, perm
        )
        args = (codes, scales, third if kind == "zeros" else None, third if kind == "offsets" else None, perm, "uint4", 40, 16)
        torch.library.opcheck(ops.mpq_apply_, (*args, None, g * 0.1, 0.01, moves, True, 1, "stochastic", 3, 4))
