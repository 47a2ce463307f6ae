"""The dispatcher's operations from Python: gradients, schemas, fake tensors, compilation, autocast.

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

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and hasattr(ops, "linear") else [])
UNIFORM = ["sign", "ternary", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"]
MIXED = "uint8*32+uint3*32+sign*13"  # K = 77
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def _has_cuda():
    import ctypes

    return bool(ctypes.CDLL(LIBRARY).subbyte_torch_has_cuda())


if "cuda" in DEVICES and not _has_cuda():
    DEVICES.remove("cuda")


class Packed:
    """A packed weight, the arguments that spell it, and its dense float32 values."""

    def __init__(self, n=12, k=77, fmt="uint4", group_size=32, zero_kind="offsets", perm=False, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        self.n, self.k, self.fmt, self.group_size = n, k, fmt, group_size
        self.dense_source = torch.randn(n, k, generator=g)
        self.perm = torch.randperm(k, generator=g).to(torch.int32).to(device) if perm else None
        scheme = "absmax" if zero_kind == "fixed" else "minmax"
        codes, scales, third = ops.quantize(
            self.dense_source.to(device), fmt, group_size, scheme, zero_kind, None, self.perm
        )
        self.codes, self.scales = codes, scales
        self.zeros = third if zero_kind == "zeros" else None
        self.offsets = third if zero_kind == "offsets" else None

    @property
    def args(self):
        return (self.codes, self.scales, self.zeros, self.offsets, self.perm, self.fmt, self.k, self.group_size)

    def dense(self, dtype=torch.float32):
        return ops.dequantize(*self.args, torch.float32).to(dtype)


def rows(*shape, dtype=torch.float32, device="cpu", seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(device)


def bound(x, w, k, dtype):
    """linear.h's bound, with 4 max|w| for |s (q - c)| + |o| (which does not exceed it on the weights used here). On CUDA, where a
    dense product may be the faster way, weights rounded to x's dtype come on top."""
    x64, w64 = x.double().abs(), w.double().abs()
    y64 = x.double() @ w.double().t()
    scale = w64.max().item() * 4
    sums = x64.sum(-1, keepdim=True) * scale
    eps_acc = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    rounded = EPS[dtype] * (x64 @ w64.t()) if x.is_cuda else 0
    return eps_acc * (k / 8 + 16) * sums + EPS[dtype] * y64.abs() + rounded + (2.0**-24 if dtype == torch.float16 else 0)


# ---- values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", UNIFORM + [MIXED])
def test_unpack_inverts_pack(device, fmt):
    levels = {"sign": 2, "ternary": 3}
    k = 77
    parts = [(p.split("*")[0], int(p.split("*")[1])) for p in fmt.split("+")] if "*" in fmt else [(fmt, k)]
    g = torch.Generator().manual_seed(3)
    codes = torch.cat(
        [torch.randint(levels.get(f) or 2 ** int(f[4:]), (5, c), generator=g, dtype=torch.uint8) for f, c in parts], 1
    ).to(device)
    packed = ops.pack(codes, fmt)
    assert torch.equal(ops.unpack(packed, fmt, k), codes)
    assert torch.equal(ops.unpack(packed[:, None].expand(-1, 1, -1)[:, 0], fmt, k), codes)
    wide = torch.zeros(5, 2 * k, dtype=torch.uint8, device=device)
    wide[:, ::2] = codes
    assert torch.equal(ops.pack(wide[:, ::2], fmt), packed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_kind", ["fixed", "zeros", "offsets"])
@pytest.mark.parametrize("fmt", UNIFORM + [MIXED])
def test_dequantize_is_the_affine_rule(device, fmt, zero_kind):
    p = Packed(fmt=fmt, zero_kind=zero_kind, perm=True, device=device)
    q = ops.unpack(p.codes, fmt, p.k).float()
    group = torch.arange(p.k, device=device) // p.group_size
    s = p.scales[:, group]
    if zero_kind == "offsets":
        w = s * q + p.offsets[:, group]
    elif zero_kind == "zeros":
        w = s * (q - p.zeros[:, group])
    else:
        fixed = {"sign": 0.5, "ternary": 1.0}
        names = sum(([f.split("*")[0]] * int(f.split("*")[1]) for f in fmt.split("+")), []) if "*" in fmt else [fmt] * p.k
        z = torch.tensor([fixed.get(f, 2.0 ** (int(f[4:]) - 1) if f.startswith("uint") else 0) for f in names], device=device)
        w = s * (q - z)
    expected = torch.empty_like(w)
    expected[:, p.perm.long()] = w
    assert torch.equal(p.dense(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(ops.dequantize(*p.args, dtype), expected.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fmt", UNIFORM + [MIXED])
def test_linear_and_its_gradients_equal_the_dense_formula(device, dtype, fmt):
    for zero_kind, perm, shape in [("fixed", False, (77,)), ("offsets", True, (3, 77)), ("zeros", True, (2, 5, 77))]:
        p = Packed(fmt=fmt, zero_kind=zero_kind, perm=perm, device=device)
        x = rows(*shape, dtype=dtype, device=device).requires_grad_()
        bias = rows(p.n, dtype=dtype, device=device, seed=2).requires_grad_()
        weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
        y = ops.linear(x, weight, *p.args, bias)
        gy = rows(*y.shape, dtype=dtype, device=device, seed=5)
        y.backward(gy)
        w = p.dense(torch.float64)
        y64 = x.detach().double() @ w.t() + bias.detach().double()
        limit = bound(x.detach(), w, p.k, dtype) + EPS[dtype] * y64.abs()
        assert ((y.detach().double() - y64).abs() <= limit).all()
        gx64 = gy.double() @ w
        assert ((x.grad.double() - gx64).abs() <= bound(gy, w.t(), p.n, dtype)).all()
        gw64 = gy.reshape(-1, p.n).double().t() @ x.detach().reshape(-1, p.k).double()
        tolerance = 4 * EPS[dtype] * (1 + gw64.abs().max().item())
        assert weight.grad.shape == (p.n, p.k) and weight.grad.dtype == weight.dtype
        assert (weight.grad.double() - gw64).abs().max() <= max(tolerance, 1e-5)
        assert torch.allclose(bias.grad.double(), gy.reshape(-1, p.n).double().sum(0), atol=8 * EPS[dtype] * 8)


@pytest.mark.parametrize("device", DEVICES)
def test_linear_takes_non_contiguous_and_empty_x(device):
    p = Packed(device=device)
    x = rows(6, 2 * p.k, device=device)
    for view in (x[:, : p.k], x[::2, p.k :], x[:, ::2], x[:3].reshape(2, 3, p.k).transpose(0, 1), x.t()[: p.k].t(), x[:1, : p.k].expand(4, p.k)):
        assert torch.equal(ops.linear(view, None, *p.args, None), ops.linear(view.contiguous(), None, *p.args, None))
    for shape in ((0, p.k), (2, 0, p.k)):
        y = ops.linear(rows(*shape, device=device).requires_grad_(), None, *p.args, None)
        assert y.shape == (*shape[:-1], p.n)
        y.sum().backward()
    empty = Packed(n=3, k=0, device=device)
    bias = rows(3, device=device)
    assert torch.equal(ops.linear(rows(2, 0, device=device), None, *empty.args, bias), bias.expand(2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_scale", ["row", "row_group"])
def test_linear_a8_rounds_x_as_its_formula_says(device, x_scale):
    p = Packed(fmt="uint4", zero_kind="zeros", device=device)
    x = rows(5, p.k, device=device)
    size = p.k if x_scale == "row" else p.group_size
    xq = torch.cat([
        (part * (127.0 / part.abs().amax(1, keepdim=True))).round() * (part.abs().amax(1, keepdim=True) / 127.0)
        for part in x.split(size, 1)
    ], 1)
    y64 = xq.double() @ p.dense(torch.float64).t()
    y = ops.linear_a8(x, None, *p.args, None, x_scale)
    assert torch.allclose(y.double(), y64, atol=2e-5 * xq.abs().sum(1).max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_linear_a8_gradient_is_straight_through(device):
    p = Packed(device=device)
    grads = []
    for op in (ops.linear, ops.linear_a8):
        x = rows(5, p.k, device=device).requires_grad_()
        weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
        bias = rows(p.n, device=device).requires_grad_()
        op(x, weight, *p.args, bias).backward(rows(5, p.n, device=device, seed=4))
        grads.append((x.grad, weight.grad, bias.grad))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_embedding_and_its_gradient_equal_the_dense_formula(device, index_type):
    p = Packed(n=20, fmt="uint3", zero_kind="fixed", perm=True, device=device)
    indices = torch.tensor([[3, 3, 0], [19, 7, 3]], device=device, dtype=index_type)
    weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
    out = ops.embedding(indices, weight, *p.args, 7)
    assert torch.equal(out, p.dense()[indices.long()])
    gy = rows(*out.shape, device=device)
    out.backward(gy)
    dense = p.dense().requires_grad_()
    torch.nn.functional.embedding(indices, dense, padding_idx=7).backward(gy)
    assert torch.allclose(weight.grad, dense.grad, atol=1e-6)
    assert weight.grad[7].abs().max() == 0
    assert ops.embedding(indices[:0], None, *p.args).shape == (0, 3, p.k)


@pytest.mark.parametrize("device", DEVICES)
def test_encode_in_place_writes_codes_and_bumps_their_version(device):
    p = Packed(device=device)
    w = rows(p.n, p.k, device=device, seed=9)
    args = (p.scales, p.zeros, p.offsets, p.perm, p.fmt, p.group_size, "stochastic", 11, 3)
    expected = ops.encode(w, *args)
    version = p.codes._version
    ops.encode_(p.codes, w, *args)
    assert torch.equal(p.codes, expected) and p.codes._version > version
    strided = torch.zeros(p.n, 2 * p.codes.size(1), dtype=torch.uint8, device=device)[:, ::2]
    ops.encode_(strided, w, *args)
    assert torch.equal(strided, expected)
    assert not torch.equal(ops.encode(w, *args[:-1], 4), expected)


def test_changing_codes_before_backward_is_an_error():
    p = Packed()
    x = rows(2, p.k).requires_grad_()
    y = ops.linear(x, None, *p.args, None)
    ops.encode_(p.codes, rows(p.n, p.k), p.scales, p.zeros, p.offsets, p.perm, p.fmt, p.group_size)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("perm", [False, True])
def test_gradcheck_of_linear_in_float64(device, perm):
    p = Packed(n=4, k=9, group_size=4, perm=perm, device=device)
    x = rows(3, 9, dtype=torch.float64, device=device).requires_grad_()
    bias = rows(4, dtype=torch.float64, device=device).requires_grad_()
    f = lambda x, bias: ops.linear(x, None, *p.args, bias)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(f, (x, bias))
    gy = rows(3, 4, dtype=torch.float64, device=device).requires_grad_()
    g = lambda gy: ops.linear_grad_input(gy, *p.args)  # noqa: E731
    assert torch.autograd.gradcheck(g, (gy,)) and torch.autograd.gradgradcheck(g, (gy,))
    assert torch.autograd.gradcheck(ops.linear_grad_weight, (gy, x))
    assert torch.autograd.gradgradcheck(ops.linear_grad_weight, (gy, x))
    indices = torch.tensor([1, 0, 1], device=device)
    h = lambda gy: ops.embedding_grad_weight(gy, indices, 3, 0)  # noqa: E731
    assert torch.autograd.gradcheck(h, (gy,)) and torch.autograd.gradgradcheck(h, (gy,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt,zero_kind", [("uint4", "offsets"), ("uint3", "zeros"), ("uint4", "fixed"), (MIXED, "fixed"), ("sign", "fixed")])
def test_gradients_of_scales_zeros_and_offsets_equal_the_dense_formula(device, fmt, zero_kind):
    p = Packed(fmt=fmt, zero_kind=zero_kind, perm=True, device=device)
    leaves = [t for t in (p.scales, p.zeros, p.offsets) if t is not None]
    for t in leaves:
        t.requires_grad_()
    x = rows(5, p.k, device=device)
    gy = rows(5, p.n, device=device, seed=3)
    indices = torch.tensor([0, 3, 3], device=device)

    q = ops.unpack(p.codes, fmt, p.k).double()
    group = torch.arange(p.k, device=device) // p.group_size
    names = sum(([f.split("*")[0]] * int(f.split("*")[1]) for f in fmt.split("+")), []) if "*" in fmt else [fmt] * p.k
    fixed = torch.tensor([{"sign": 0.5, "ternary": 1.0}.get(f) or 2.0 ** (int(f[4:]) - 1) for f in names], device=device)

    def dense():
        s = p.scales.double()[:, group]
        if zero_kind == "offsets":
            w = s * q + p.offsets.double()[:, group]
        else:
            w = s * (q - (p.zeros.double()[:, group] if zero_kind == "zeros" else fixed))
        return w[:, torch.argsort(p.perm.long())]

    pairs = [
        (ops.linear(x, None, *p.args, None), x.double() @ dense().t(), gy),
        (ops.linear_grad_input(gy, *p.args), gy.double() @ dense(), x),
        (ops.dequantize(*p.args), dense(), rows(p.n, p.k, device=device)),
        (ops.embedding(indices, None, *p.args), dense()[indices], rows(3, p.k, device=device)),
    ]
    for ours, theirs, g in pairs:
        got = torch.autograd.grad(ours, leaves, g)
        want = torch.autograd.grad(theirs, leaves, g.double())
        for a, b in zip(got, want):
            assert a.dtype == p.scales.dtype
            assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_second_derivative_reaches_the_weight_handle():
    p = Packed()
    x = rows(5, p.k).requires_grad_()
    weight = torch.zeros(()).expand(p.n, p.k).detach().requires_grad_()
    dense = p.dense().requires_grad_()
    for w, y in ((weight, ops.linear(x, weight, *p.args, None)), (dense, x @ dense.t())):
        (gx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        gx.pow(2).sum().backward(inputs=[w])
    assert torch.allclose(weight.grad, dense.grad, rtol=1e-3, atol=1e-2)


def test_ops_without_gradient_say_so():
    w = rows(4, 8).requires_grad_()
    _, scales, _ = ops.quantize(w, "uint4", 4)
    with pytest.raises(RuntimeError, match="not implemented"):
        scales.sum().backward()
    p = Packed()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.linear(x, None, *p.args, None).sum())(rows(2, p.k))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows(2, p.k), rows(2, p.k))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops.linear(dual, None, *p.args, None)


# ---- schemas, fake tensors, compilation


def opcheck_cases(device):
    p = Packed(device=device)
    f = Packed(fmt=MIXED, zero_kind="fixed", perm=True, device=device)
    x = rows(2, 3, p.k, device=device)
    w = rows(p.n, p.k, device=device)
    handle = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
    codes = torch.randint(0, 16, (p.n, p.k), dtype=torch.uint8, device=device)
    bias = rows(p.n, device=device)
    indices = torch.tensor([[1, 2], [0, 1]], device=device)
    affine = (p.scales, p.zeros, p.offsets, p.perm, p.fmt, p.group_size)
    return {
        "pack": [(codes, "uint4")],
        "unpack": [(p.codes, "uint4", p.k), (f.codes, f.fmt, f.k)],
        "quantize": [(w, "uint4", 32), (w, MIXED, 32, "absmax", "fixed", torch.float16, f.perm, "stochastic", 1, 2)],
        "encode": [(w, *affine), (w, *affine, "stochastic", 5, 6)],
        "encode_": [(p.codes.clone(), w, *affine)],
        "dequantize": [p.args, (*f.args, torch.float16)],
        "linear": [
            (x, None, *p.args, None),
            (x.detach().requires_grad_(), handle, *p.args, bias.detach().requires_grad_()),
            (x.detach().requires_grad_(), None, *f.args, None),
        ],
        "linear_grad_input": [(rows(4, p.n, device=device), *p.args), (rows(4, p.n, device=device).requires_grad_(), *f.args)],
        "linear_grad_weight": [(rows(2, 3, p.n, device=device), x), (rows(2, 3, p.n, device=device).requires_grad_(), x)],
        "linear_a8": [(x, None, *p.args, None), (x.detach().requires_grad_(), handle, *p.args, bias, "row_group")],
        "embedding": [(indices, None, *p.args), (indices, handle, *p.args, 1)],
        "embedding_grad_weight": [(rows(2, 2, p.k, device=device), indices, p.n, 1)],
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(opcheck_cases("cpu")))
def test_opcheck(name, device):
    for case in opcheck_cases(device)[name]:
        torch.library.opcheck(getattr(ops, name).default, case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ["linear", "linear_a8"])
def test_compiled_training_step_equals_eager(device, dynamic, op):
    torch._dynamo.reset()
    p = Packed(device=device)
    weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
    bias = rows(p.n, device=device).requires_grad_()

    def f(x):
        return torch.relu(getattr(ops, op)(x * 2, weight, *p.args, bias)).square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for m in (2, 5, 9):
        results = []
        for g in (f, compiled):
            x = rows(m, 3, p.k, device=device).requires_grad_()
            weight.grad = bias.grad = None
            loss = g(x)
            loss.backward()
            results.append((loss.detach(), x.grad, weight.grad, bias.grad))
        for a, b in zip(*results):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_embedding_dequantize_and_update(device, dynamic):
    torch._dynamo.reset()
    p = Packed(n=20, device=device)
    weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()

    def f(indices):
        return (ops.embedding(indices, weight, *p.args) * 3).sum()

    def update(codes, delta):
        w = ops.dequantize(codes, *p.args[1:]) + delta
        ops.encode_(codes, w, p.scales, p.zeros, p.offsets, p.perm, p.fmt, p.group_size, "stochastic", 7, 1)
        return ops.unpack(codes, p.fmt, p.k)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for count in (3, 4):
        indices = torch.arange(count, device=device)
        weight.grad = None
        compiled(indices).backward()
        got, weight.grad = weight.grad, None
        f(indices).backward()
        assert torch.equal(got, weight.grad)
    delta = 0.1 * rows(p.n, p.k, device=device)
    a, b = p.codes.clone(), p.codes.clone()
    assert torch.equal(update(a, delta), torch.compile(update, fullgraph=True, dynamic=dynamic)(b, delta))
    assert torch.equal(a, b) and not torch.equal(a, p.codes)


def test_export_keeps_the_op():
    p = Packed()

    class M(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", p.codes)
            self.register_buffer("scales", p.scales)
            self.register_buffer("offsets", p.offsets)

        def forward(self, x):
            return ops.linear(x, None, self.codes, self.scales, None, self.offsets, None, p.fmt, p.k, p.group_size, None)

    x = rows(4, p.k)
    exported = torch.export.export(M(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("m", min=2)}})
    assert any("subbyte.linear" in str(n.target) for n in exported.graph.nodes)
    x = rows(7, p.k)
    assert torch.equal(exported.module()(x), ops.linear(x, None, *p.args, None))


# ---- files


def test_gguf_tensors_equal_those_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    import json

    import numpy as np

    path = str(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("block_count", 2)
    writer.add_string("note", 'quote " and \u00e4')
    writer.add_array("words", ["a", "b\n"])
    g = np.random.default_rng(0)
    values = {name: g.standard_normal((6, 64), dtype=np.float32) for name in ("Q4_0", "Q4_1", "Q8_0")}
    for name, w in values.items():
        kind = getattr(gguf.GGMLQuantizationType, name)
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    dense = g.standard_normal((3, 5), dtype=np.float32)
    writer.add_tensor("dense", dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    index = json.loads(ops.gguf_index(path))
    assert index["metadata"]["note"] == 'quote " and \u00e4' and index["metadata"]["words"]["values"] == ["a", "b\n"]
    assert [t["name"] for t in index["tensors"]] == ["Q4_0", "Q4_1", "Q8_0", "dense"]
    for t in index["tensors"][:3]:
        parts = ops.gguf_tensor(path, t["name"])
        packed = t["packed"]
        assert t["shape"] == [6, 64] and len(parts) == (3 if packed["zero_kind"] == "offsets" else 2)
        offsets = parts[2] if len(parts) == 3 else None
        w = ops.dequantize(parts[0], parts[1], None, offsets, None, packed["format"], 64, packed["group_size"], torch.float32)
        kind = getattr(gguf.GGMLQuantizationType, t["name"])
        expected = gguf.quants.dequantize(gguf.quants.quantize(values[t["name"]], kind), kind)
        assert torch.equal(w, torch.from_numpy(expected))
    assert index["tensors"][3]["packed"] is None
    assert torch.equal(ops.gguf_tensor(path, "dense")[0], torch.from_numpy(dense))
    with pytest.raises(ValueError, match="no tensor 'other'"):
        ops.gguf_tensor(path, "other")
    with open(path, "r+b") as f:
        f.truncate(100)
    with pytest.raises(RuntimeError, match="at byte"):
        ops.gguf_index(path)
    with pytest.raises(RuntimeError):
        ops.gguf_index(path + ".missing")


# ---- autocast and errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear", "linear_a8"])
def test_autocast_computes_in_the_lower_precision(device, dtype, op):
    p = Packed(device=device)
    x = rows(3, p.k, device=device).requires_grad_()
    bias = rows(p.n, device=device).requires_grad_()
    weight = torch.zeros((), device=device).expand(p.n, p.k).detach().requires_grad_()
    with torch.autocast(device, dtype):
        y = getattr(ops, op)(x, weight, *p.args, bias)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert torch.equal(y, getattr(ops, op)(x.to(dtype), None, *p.args, bias.to(dtype)))


def test_mistakes_of_the_caller_are_value_errors():
    p = Packed()
    x = rows(3, p.k)
    with pytest.raises(ValueError, match="linear: x has 76 features, the weight expects 77"):
        ops.linear(x[:, 1:], None, *p.args, None)
    with pytest.raises(ValueError, match=r"linear: scales is \[12, 2\], expected"):
        ops.linear(x, None, p.codes, p.scales[:, :2], None, p.offsets, None, p.fmt, p.k, p.group_size, None)
    with pytest.raises(ValueError, match="format 'uint9' is unknown"):
        ops.linear(x, None, p.codes, p.scales, None, p.offsets, None, "uint9", p.k, p.group_size, None)
    with pytest.raises(ValueError, match="group_size is 0"):
        ops.linear(x, None, p.codes, p.scales, None, p.offsets, None, p.fmt, p.k, 0, None)
    with pytest.raises(ValueError, match="zeros and offsets are both given"):
        ops.linear(x, None, p.codes, p.scales, p.offsets, p.offsets, None, p.fmt, p.k, p.group_size, None)
    with pytest.raises(ValueError, match="perm"):
        bad = torch.full((p.k,), p.k, dtype=torch.int32)
        ops.linear(x, None, p.codes, p.scales, None, p.offsets, bad, p.fmt, p.k, p.group_size, None)
    with pytest.raises(ValueError, match="expected float32, float16, bfloat16 or float64"):
        ops.linear(x.int(), None, *p.args, None)
    with pytest.raises(ValueError, match="bias"):
        ops.linear(x, None, *p.args, rows(p.n, dtype=torch.float16))
    with pytest.raises(ValueError, match="weight"):
        ops.linear(x, torch.zeros(3, p.k, requires_grad=True), *p.args, None)
    with pytest.raises(ValueError, match="x is float64|Double|double"):
        ops.linear_a8(x.double(), None, *p.args, None)
    with pytest.raises(ValueError, match="x_scale 'column' is unknown"):
        ops.linear_a8(x, None, *p.args, None, "column")
    with pytest.raises(ValueError, match="code 16"):
        ops.pack(torch.full((1, 3), 16, dtype=torch.uint8), "uint4")
    with pytest.raises(ValueError, match="scheme"):
        ops.quantize(x, "uint4", 32, "minmin")
    with pytest.raises(ValueError, match="expected finite values"):
        ops.quantize(torch.full((2, 3), float("nan")), "uint4", 32)
    with pytest.raises(ValueError, match="scheme minmax needs zeros or offsets"):
        ops.quantize(x, "uint4", 32, "minmax", "fixed")
    with pytest.raises(IndexError, match="index 12 at position 1"):
        ops.embedding(torch.tensor([0, 12]), None, *p.args)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device, or a library without CUDA")
def test_parts_on_two_devices_are_named():
    p = Packed(device="cuda")
    with pytest.raises(ValueError, match="linear: codes is on cuda:0, x is on cpu"):
        ops.linear(rows(2, p.k), None, *p.args, None)
