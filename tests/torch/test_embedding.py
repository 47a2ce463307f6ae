"""Packed tables through the dispatcher: look-ups, bags, gradients of touched rows, sparse updates.

The oracles are float64 transcriptions of the formulas in plain PyTorch.
"""

import os

import pytest
import torch

LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)

from subbyte import _library  # noqa: E402
import subbyte.functional  # noqa: E402, F401  (the shape rules of the ops whose result size depends on the data)

ops = torch.ops.subbyte
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and _library.info()["has_cuda"] else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(device)


def randint(high, *shape, device="cpu", seed=2, dtype=torch.int64):
    return torch.randint(high, shape, generator=generator(seed), dtype=dtype).to(device)


def table(v=17, d=20, fmt="sign", group_size=None, zero_kind="fixed", device="cpu", seed=3):
    """The arguments that spell a packed table, and its values in float64."""
    w = randn(v, d, seed=seed, device=device)
    scheme = "absmax" if zero_kind == "fixed" else "minmax"
    codes, scales, third = ops.quantize(w, fmt, group_size or max(1, d), scheme, zero_kind)
    zeros, offsets = (third if zero_kind == name else None for name in ("zeros", "offsets"))
    args = (codes, scales, zeros, offsets, None, fmt, d, group_size or max(1, d))
    return args, ops.dequantize(*args, torch.float32).double()


def handle(v, d, dtype=torch.float32, device="cpu"):
    return torch.zeros((), dtype=dtype, device=device).expand(v, d).detach().requires_grad_()


def pack8(bits):
    """Bit d % 8 of byte d / 8, the padding false."""
    pad = -bits.shape[1] % 8
    b = torch.nn.functional.pad(bits.long(), (0, pad)).reshape(bits.shape[0], (bits.shape[1] + pad) // 8, 8)
    return (b << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)


def unpack8(codes, d):
    return ((codes.unsqueeze(-1).long() >> torch.arange(8, device=codes.device)) & 1).flatten(1)[:, :d].bool()


def dense_gradient(gy, indices, v, padding_idx=-1, factors=None):
    """A [v, D] in float64, look-up by look-up."""
    a = torch.zeros(v, gy.shape[-1], dtype=torch.float64)
    rows = gy.reshape(indices.numel(), gy.shape[-1]).double().cpu()
    for j, i in enumerate(indices.reshape(-1).tolist()):
        if i != padding_idx:
            a[i] += rows[j] if factors is None else factors[j] * rows[j]
    return a.to(gy.device)


def bags_of(indices, offsets):
    if offsets is None:
        return [list(range(b * indices.shape[1], (b + 1) * indices.shape[1])) for b in range(indices.shape[0])]
    ends = offsets.tolist()[1:] + [indices.numel()]
    return [list(range(a, b)) for a, b in zip(offsets.tolist(), ends)]


# ---- gradients of touched rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_rows_of_the_gradient_are_the_sums_over_look_ups(device, dtype, index_type):
    for shape, d, padding_idx in [((7,), 20, -1), ((3, 4), 9, 2), ((2, 3, 5), 8, 16), ((), 5, -1), ((0, 3), 5, -1), ((4,), 0, -1)]:
        indices = randint(17, *shape, device=device, dtype=index_type)
        gy = randn(*shape, d, dtype=dtype, device=device)
        before = gy.clone()
        rows, values = ops.embedding_grad_rows(gy, indices, 17, padding_idx)
        want = dense_gradient(gy, indices, 17, padding_idx)
        touched = torch.unique(indices.long())
        assert torch.equal(rows, touched[touched != padding_idx]) and rows.dtype == torch.int64
        assert values.dtype == dtype and values.shape == (len(rows), d)
        limit = EPS[dtype] * want[rows].abs() + 16 * max(EPS[dtype] ** 2, EPS[torch.float32] if dtype != torch.float64 else 0)
        assert ((values.double() - want[rows]).abs() <= limit).all()
        scales = randn(17, 1, device=device, seed=9)
        packed_rows, bits = ops.embedding_grad_packed(gy, indices, scales, 17, padding_idx)
        assert torch.equal(packed_rows, rows) and bits.shape == (len(rows), (d + 7) // 8)
        assert torch.equal(bits, pack8(scales.double()[rows] * want[rows] >= 0))
        assert torch.equal(gy, before)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_expanded_and_strided_gradients(device):
    indices = randint(6, 3, 4, device=device)
    for gy in (
        torch.ones((), device=device).expand(3, 4, 10),
        randn(4, 3, 10, device=device).transpose(0, 1),
        randn(3, 4, 20, device=device)[..., ::2],
    ):
        rows, values = ops.embedding_grad_rows(gy, indices, 6)
        assert torch.allclose(values.double(), dense_gradient(gy, indices, 6)[rows], atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_many_duplicates_are_added_in_order(device):
    indices = torch.zeros(5000, dtype=torch.int64, device=device)
    gy = randn(5000, 3, device=device)
    _, values = ops.embedding_grad_rows(gy, indices, 4)
    total = torch.zeros(3)
    for row in gy.cpu():
        total += row
    assert torch.equal(values[0].cpu(), total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt, zero_kind", [("sign", "fixed"), ("uint4", "offsets"), ("uint3", "zeros")])
def test_the_sparse_gradients_of_a_look_up_are_the_dense_ones(device, fmt, zero_kind):
    args, _ = table(fmt=fmt, zero_kind=zero_kind, group_size=8, device=device)
    indices = randint(17, 5, 3, device=device)
    gy = randn(5, 3, 20, device=device)
    grads = []
    for sparse in (False, True):
        leaves = [t.clone().requires_grad_() if t is not None else None for t in args[1:4]]
        w = handle(17, 20, device=device)
        ops.embedding(indices, w, args[0], *leaves, *args[4:], 4, sparse).backward(gy)
        grads.append([w.grad] + [t.grad for t in leaves if t is not None])
    assert len(grads[0]) == (2 if zero_kind == "fixed" else 3)
    for dense, sparse in zip(*grads):
        assert sparse.layout == torch.sparse_coo and dense.layout == torch.strided
        assert sparse.shape == dense.shape and 4 not in sparse.coalesce().indices()[0]
        assert torch.allclose(sparse.to_dense(), dense, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_look_up_has_the_dtype_asked_for_and_values_are_formed_in_float32(device):
    args, values = table(fmt="uint4", zero_kind="offsets", device=device)
    narrow = (args[0], args[1].bfloat16(), None, args[3].bfloat16(), *args[4:])
    values = ops.dequantize(*narrow, torch.float32)
    indices = randint(17, 6, device=device)
    for dtype in DTYPES:
        w = handle(17, 20, dtype, device)
        y = ops.embedding(indices, w, *narrow, -1, True, dtype)
        assert torch.equal(y, values[indices].to(dtype))
        y.backward(torch.ones_like(y))
        assert w.grad.dtype == dtype


def test_stray_indices_are_an_index_error():
    args, _ = table()
    for device in DEVICES:
        for bad in (-1, 17):
            indices = torch.tensor([0, bad, 3], device=device)
            gy = randn(3, 20, device=device)
            for call in (
                lambda: ops.embedding_grad_rows(gy, indices, 17),
                lambda: ops.embedding_grad_packed(gy, indices, None, 17),
            ):
                with pytest.raises(IndexError, match=f"index {bad} is outside the table, expected 0 <= index < 17"):
                    call()
    with pytest.raises(IndexError, match="index 17 at position 1"):
        ops.embedding_bag(torch.tensor([[0, 17]]), None, None, *args)
    with pytest.raises(IndexError, match="row 17 at position 0"):
        ops.embedding_update_(args[0], torch.tensor([17]), args[0][:1], 20)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")
def test_on_cuda_a_stray_index_gives_nan_and_an_index_error_but_no_assert():
    args, values = table(device="cuda")
    y = ops.embedding(torch.tensor([1, 17, -5], device="cuda"), None, *args)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"embedding: index (17 at position 1|-5 at position 2) is outside the table"):
        ops.raise_device_errors()
    bags = ops.embedding_bag(torch.tensor([[1, 2], [3, 17]], device="cuda"), None, None, *args)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="embedding_bag: index 17 at position 3 is outside the table"):
        ops.embedding(torch.tensor([1], device="cuda"), None, *args)  # the next operation raises
    assert torch.equal(y[0].double(), values[1]) and y[1:].isnan().all() and not bags[0].isnan().any() and bags[1].isnan().all()


# ---- updates


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [5, 8, 20, 64])
def test_updates_are_their_formulas_on_the_named_rows(device, d):
    codes = pack8(randn(9, d, device=device) >= 0)
    rows = torch.tensor([1, 4, 8], device=device)
    g, m = randn(3, d, seed=4, device=device) >= 0, randn(3, d, seed=5, device=device) >= 0
    old = unpack8(codes, d)
    for mode, rule in [("descent", lambda w: ~g), ("xor", lambda w: w ^ g)]:
        for mask in (None, m):
            new = codes.clone()
            version = new._version
            ops.embedding_update_(new, rows, pack8(g), d, mode, None if mask is None else pack8(mask))
            want = old.clone()
            want[rows] = rule(old[rows]) if mask is None else torch.where(mask, rule(old[rows]), old[rows])
            assert torch.equal(new, pack8(want)) and new._version > version
    momentum = 0.1 * randn(5, d, seed=6, device=device)
    slots = torch.tensor([4, 0, 2], device=device)
    s = momentum[slots].double()
    s = s + (1 - 0.9) * (0.3 * (2 * g.double() - 1) - s)
    want = old.clone()
    want[rows] = s < 0
    other = momentum[[1, 3]].clone()
    ops.embedding_update_(codes, rows, pack8(g), d, "momentum", None, momentum, slots, 0.3, 0.9)
    assert torch.equal(codes, pack8(want))
    assert torch.allclose(momentum[slots].double(), s, atol=1e-7) and torch.equal(momentum[[1, 3]], other)


@pytest.mark.parametrize("device", DEVICES)
def test_an_int8_average_is_that_of_float32_in_the_mean(device):
    d = 4096
    codes = pack8(randn(1, d, device=device) >= 0)
    rows, bits = torch.tensor([0], device=device), pack8(torch.ones(1, d, device=device) > 0)
    momentum = torch.full((1, d), -50, dtype=torch.int8, device=device)
    exact = -50.0
    for step in range(30):
        ops.embedding_update_(codes, rows, bits, d, "momentum", None, momentum, None, 100.0, 0.99, 7, step)
        exact += 0.01 * (100 - exact)
    assert abs(momentum.double().mean().item() - exact) < 6 * (30 * 0.25 / d) ** 0.5
    again = torch.full((1, d), -50, dtype=torch.int8, device=device)
    for step in range(30):
        ops.embedding_update_(codes.clone(), rows, bits, d, "momentum", None, again, None, 100.0, 0.99, 7, step)
    assert torch.equal(again, momentum)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt, zero_kind", [("sign", "fixed"), ("ternary", "fixed"), ("uint4", "offsets"), ("uint7", "zeros")])
def test_adding_to_rows_moves_them_by_that_much_in_the_mean_and_no_other_row(device, fmt, zero_kind):
    args, values = table(d=512, fmt=fmt, zero_kind=zero_kind, group_size=64, device=device)
    rows = torch.tensor([11, 2], device=device)  # any order
    middle = ops.dequantize(*(a[rows] if isinstance(a, torch.Tensor) else a for a in args), torch.float32)
    span = args[1].abs().repeat_interleave(64, 1)[:, :512][rows].double()
    step = 0.1 * span * torch.where(middle > 0, -1.0, 1.0)  # towards the middle, so that nothing clips
    means = torch.zeros_like(values[rows])
    runs = 64
    for seed in range(runs):
        codes = args[0].clone()
        ops.embedding_add_(codes, *args[1:], rows, step.float(), 1.0, "stochastic", seed)
        new = ops.dequantize(codes, *args[1:], torch.float32).double()
        untouched = [r for r in range(17) if r not in (2, 11)]
        assert torch.equal(new[untouched], values[untouched])
        means += new[rows] / runs
    error = (means - (values[rows] + step)) / span
    assert error.mean().abs() < 6 * (0.09 / (runs * error.numel())) ** 0.5
    assert error.abs().max() < 6 * (0.09 / runs) ** 0.5
    codes = args[0].clone()
    ops.embedding_add_(codes, *args[1:], rows, values[rows].float() * 0, 1.0, "nearest")
    assert torch.equal(codes, args[0])


def test_updates_refuse_what_does_not_fit():
    args, _ = table()
    codes, rows, bits = args[0], torch.tensor([1, 3]), args[0][:2].clone()
    before = codes.clone()
    for call, match in [
        (lambda: ops.embedding_update_(codes, rows, bits, 30), "codes is Byte"),
        (lambda: ops.embedding_update_(codes, rows, bits, 20, "up"), "rule 'up' is unknown"),
        (lambda: ops.embedding_update_(codes, rows.int(), bits, 20), "rows is Int"),
        (lambda: ops.embedding_update_(codes, rows, bits[:1], 20), "sign_bits is Byte"),
        (lambda: ops.embedding_update_(codes, rows, bits, 20, "momentum"), "momentum goes with"),
        (lambda: ops.embedding_update_(codes, rows.flip(0), bits, 20), "strictly increasing"),
        (lambda: ops.embedding_update_(codes, rows, bits, 20, "descent", None, None, None, 1.0, 1.0), "beta is 1"),
        (lambda: ops.embedding_add_(*args, rows, torch.zeros(2, 19)), "values is Float"),
        (lambda: ops.embedding_grad_rows(torch.zeros(3, 5), torch.tensor([1.0, 2, 3]), 4), "indices is Float"),
        (lambda: ops.embedding_grad_rows(torch.zeros(3, 5), torch.tensor([1, 2]), 4), "expected the same leading"),
        (lambda: ops.embedding_grad_packed(torch.zeros(2, 5), torch.tensor([1, 2]), torch.zeros(3), 4), "scales is Float"),
        (lambda: ops.embedding_bag(torch.tensor([1, 2]), None, None, *args), "indices has 1 dimensions"),
        (lambda: ops.embedding_bag(torch.tensor([[1, 2]]), None, None, *args, "max"), "mode 'max' is unknown"),
        (lambda: ops.embedding_bag(torch.tensor([1, 2]), torch.tensor([1]), None, *args), "offsets start at 1"),
        (lambda: ops.embedding_bag(torch.tensor([[1, 2]]), None, None, *args, "mean", torch.ones(1, 2)), "mode sum alone"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(IndexError):
        ops.embedding_add_(*args, torch.tensor([1, 17]), torch.zeros(2, 20))
    assert torch.equal(codes, before)


# ---- bags

BAGS = [  # indices, offsets
    (lambda device: randint(17, 4, 5, device=device), None),
    (lambda device: randint(17, 11, device=device, dtype=torch.int32), [0, 0, 4, 5]),
    (lambda device: randint(17, 3, 0, device=device), None),
    (lambda device: randint(17, 0, device=device), [0, 0]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", range(len(BAGS)))
@pytest.mark.parametrize("mode", ["sum", "weighted", "mean", "majority"])
def test_bags_and_their_gradients_are_the_formula(device, case, mode):
    indices, offsets = BAGS[case][0](device), BAGS[case][1]
    offsets = None if offsets is None else torch.tensor(offsets, device=device)
    args, values = table(device=device)
    bits = unpack8(args[0], 20)
    bags = bags_of(indices, offsets)
    flat = indices.reshape(-1).tolist()
    for padding_idx in (-1, flat[2] if flat else 3):
        weights = randn(*indices.shape, device=device, seed=7).requires_grad_() if mode == "weighted" else None
        name = "sum" if mode == "weighted" else mode
        want = torch.zeros(len(bags), 20, dtype=torch.float64, device=device)
        factor = torch.zeros(len(flat), dtype=torch.float64)
        for b, bag in enumerate(bags):
            counted = [j for j in bag if flat[j] != padding_idx]
            for j in counted:
                factor[j] = weights.reshape(-1)[j].item() if weights is not None else 1 / len(counted) if mode == "mean" else 1
            if counted and mode == "majority":
                votes = bits[[flat[j] for j in counted]].sum(0)
                want[b] = torch.where(votes >= (len(counted) + 1) // 2, 1.0, -1.0)
            elif counted:
                want[b] = sum(factor[j].item() * values[flat[j]] for j in counted)
        gy = randn(len(bags), 20, device=device, seed=8)
        spread = torch.stack([gy[b] for b, bag in enumerate(bags) for _ in bag]) if flat else gy[:0]
        gw = dense_gradient(spread, indices, 17, padding_idx, factor.tolist())
        for sparse in (False, True):
            w, scales = handle(17, 20, device=device), args[1].clone().requires_grad_()
            leaf = None if weights is None else weights.detach().clone().requires_grad_()
            y = ops.embedding_bag(indices, offsets, w, args[0], scales, *args[2:], name, leaf, padding_idx, sparse)
            assert torch.allclose(y.detach().double(), want, atol=1e-6)
            y.backward(gy)
            assert torch.allclose(w.grad.to_dense().double(), gw, atol=1e-5)
            if mode == "majority":
                assert scales.grad is None
            else:
                gs = (gw * (bits.double() - 0.5)).sum(1, keepdim=True)
                assert torch.allclose(scales.grad.to_dense().double(), gs, atol=1e-5)
            if leaf is not None and flat:
                dot = (spread.double() * values[indices.reshape(-1).long()]).sum(1)
                dot[indices.reshape(-1) == padding_idx] = 0
                assert torch.allclose(leaf.grad.reshape(-1).double(), dot, atol=1e-5)
        rows, sign_bits = ops.embedding_grad_packed(
            gy, indices, args[1], 17, padding_idx, offsets, name, None if weights is None else weights.detach()
        )
        clear = gw[rows].abs() > 1e-6
        assert torch.equal(unpack8(sign_bits, 20)[clear], (gw[rows] >= 0)[clear])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bags_of_every_format_and_dtype(device, dtype):
    indices = randint(17, 4, 5, device=device)
    for fmt, zero_kind in [("ternary", "fixed"), ("uint3", "zeros"), ("uint8", "offsets")]:
        args, values = table(fmt=fmt, zero_kind=zero_kind, group_size=8, device=device)
        y = ops.embedding_bag(indices, None, None, *args, "mean", None, -1, False, dtype)
        want = values[indices].mean(1)
        assert y.dtype == dtype and ((y.double() - want).abs() <= EPS[dtype] * want.abs() + 1e-6).all()
        with pytest.raises(ValueError, match="format sign"):
            ops.embedding_bag(indices, None, None, *args, "majority")


# ---- dispatcher


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    args, _ = table(device=device)
    indices, gy = randint(17, 4, 3, device=device), randn(4, 3, 20, device=device)
    w = handle(17, 20, device=device)
    rows = torch.tensor([1, 5], device=device)
    bits = args[0][:2].clone()
    for op, call in [
        (ops.embedding, (indices, None, *args, -1, True, torch.float16)),
        (ops.embedding, (indices, w, *args, 1)),
        (ops.embedding_grad_rows, (gy, indices, 17, 2)),
        (ops.embedding_grad_packed, (gy, indices, args[1], 17)),
        (ops.embedding_grad_packed, (gy[:, 0], indices, None, 17, -1, None, "mean")),
        (ops.embedding_update_, (args[0].clone(), rows, bits, 20, "xor")),
        (ops.embedding_update_, (args[0].clone(), rows, bits, 20, "momentum", None, torch.zeros(2, 20, device=device))),
        (ops.embedding_add_, (args[0].clone(), *args[1:], rows, randn(2, 20, device=device))),
        (ops.embedding_bag, (indices, None, None, *args, "majority")),
        (ops.embedding_bag, (indices, None, w, *args, "mean", None, 3)),
        (ops.embedding_bag, (indices[0], torch.tensor([0, 2], device=device), w, *args, "sum", randn(3, device=device))),
    ]:
        torch.library.opcheck(op.default, call)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_bags_and_updates_equal_eager(device):
    args, _ = table(device=device)
    indices = randint(17, 4, 3, device=device)

    def loss(w, scales):
        y = ops.embedding_bag(indices, None, w, args[0], scales, *args[2:], "mean", None, 2)
        z = ops.embedding_bag(indices, None, w, args[0], scales, *args[2:], "majority")
        return (y * z).square().sum() + (ops.embedding(indices, w, *args, -1, False, torch.float64) ** 2).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        w, scales = handle(17, 20, device=device), args[1].clone().requires_grad_()
        function(w, scales).backward()
        grads.append((w.grad, scales.grad))
    for eager, compiled in zip(*grads):
        assert torch.allclose(eager, compiled, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_tables_alone(device):
    args, values = table(device=device)
    with torch.autocast(device, torch.bfloat16):
        assert ops.embedding(torch.tensor([1], device=device), None, *args).dtype == torch.float32
        assert ops.embedding_bag(torch.tensor([[1]], device=device), None, None, *args).dtype == torch.float32
