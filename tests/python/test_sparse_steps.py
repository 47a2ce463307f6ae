"""subbyte.optim on sparse gradients: tables of which a batch names a few rows."""

import time

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight
from subbyte.optim import PackedAdamW, PackedLion, PackedSGD

V, D = 40, 70
OPTIMIZERS = {
    "adamw": lambda p, **o: PackedAdamW(p, **{"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, **o}),
    "sgd": lambda p, **o: PackedSGD(p, **{"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, **o}),
    "lion": lambda p, **o: PackedLion(p, **{"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, **o}),
}


def table(bits=8, device="cpu", seed=0, v=V, **options):
    torch.manual_seed(seed)
    return torch.nn.Parameter(PackedWeight.from_float(torch.randn(v, D, device=device), bits=bits, group_size=32, **options))


def sparse(rows, values, v=V, device="cpu"):
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (v, D), check_invariants=True).to(device)


def plain_step(name, w, g, state, t):
    """One step of the written rule in float64 on some rows; moments of the rows that are not named rest."""
    m, v = state
    if name == "adamw":
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        return w * (1 - 0.05 * 0.1) - 0.05 * step, (m, v)
    if name == "sgd":
        m = 0.8 * m + g + 0.1 * w
        return w - 0.5 * m, (m, v)
    c, m = 0.8 * m + 0.2 * g, 0.9 * m + 0.1 * g
    return w * (1 - 0.05 * 0.1) - 0.05 * c.sign(), (m, v)


@pytest.mark.parametrize("bits, zero_kind", [(8, "offsets"), (4, "zeros"), (2, "offsets")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_rows_follow_the_written_rule_and_no_other_row_is_touched(name, bits, zero_kind, device):
    w = table(bits, device, zero_kind=zero_kind)
    optimizer = OPTIMIZERS[name]([w], moments="float32")
    zeros = torch.zeros(V, D, dtype=torch.float64)
    state, level = (zeros, zeros.clone()), w.scales.cpu().double().repeat_interleave(32, 1)[:, :D]
    span = level * (2**bits - 1)
    low = w.offsets.cpu().double() if w.offsets is not None else -(w.scales * w.zeros).cpu().double()
    low = low.repeat_interleave(32, 1)[:, :D]
    for t, rows in enumerate(([3, 9, 3], [9], [0, 39, 9, 9], [3, 5]), 1):
        before, codes = w.detach().dequantize().cpu().double(), w.codes.clone()
        values = torch.randn(len(rows), D)
        w.grad = sparse(rows, values, device=device)
        optimizer.step()
        g = torch.zeros(V, D, dtype=torch.float64).index_add_(0, torch.tensor(rows), values.double())
        named, idle = sorted(set(rows)), [v for v in range(V) if v not in rows]
        want, new = plain_step(name, before[named], g[named], [s[named] for s in state], t)
        for whole, part in zip(state, new):
            whole[named] = part
        want = torch.minimum(torch.maximum(want, low[named]), (low + span)[named])
        after = w.detach().dequantize().cpu().double()
        assert bool(((after[named] - want).abs() < level[named] * 1.001 + 1e-5).all())
        assert torch.equal(w.codes[idle], codes[idle])
        torch.testing.assert_close(optimizer.state[w]["m"].cpu().double(), state[0], rtol=1e-5, atol=1e-6)
        if name == "adamw":
            torch.testing.assert_close(optimizer.state[w]["v"].cpu().double(), state[1], rtol=1e-5, atol=1e-6)
        assert int(optimizer.state[w]["step"]) == t


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit", "4bit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sparse_gradient_of_all_rows_has_the_bits_of_a_dense_one(name, moments, device):
    dense, scattered = table(4, device), table(4, device)
    a, b = (OPTIMIZERS[name]([w], moments=moments) for w in (dense, scattered))
    for _ in range(3):
        g = torch.randn(V, D, device=device)
        dense.grad, scattered.grad = g, sparse(list(range(V)), g.cpu(), device=device)
        a.step()
        b.step()
    assert torch.equal(dense.codes, scattered.codes)
    for key, value in a.state[dense].items():
        assert torch.equal(value, b.state[scattered][key]), key


def test_the_mean_of_rounded_sparse_steps_is_the_step(device):
    w = table(4, device)
    codes, values, rows, count = w.codes.clone(), torch.randn(3, D), [2, 7, 30], 600
    before, total = w.detach().dequantize().cpu().double()[rows], torch.zeros(3, D, dtype=torch.float64)
    for seed in range(count):
        w.codes.copy_(codes)
        optimizer = PackedSGD([w], lr=0.01, seed=seed)
        w.grad = sparse(rows, values, device=device)
        optimizer.step()
        total += w.detach().dequantize().cpu().double()[rows]
    level = w.scales.cpu().double().repeat_interleave(32, 1)[:, :D][rows]
    low = w.offsets.cpu().double().repeat_interleave(32, 1)[:, :D][rows]
    want = torch.minimum(torch.maximum(before - 0.01 * values.double(), low), low + 15 * level)
    steps = (want - before) / level
    fraction = (steps - steps.floor()).clamp(0, 1)
    error = 6 * level * (fraction * (1 - fraction) / count).sqrt() + 1e-5
    assert bool(((total / count - want).abs() <= error).all())


def test_duplicates_of_a_batch_are_reduced_exactly(device):
    w = table(4, device)
    indices = torch.tensor([5, 1, 5, 5, 38, 1], device=device)
    # Powers of two that a float32 sum holds exactly only when nothing is rounded in between.
    gy = torch.tensor([2.0**12, 1, 2.0**-11, -(2.0**12), 3, 2.0**-12], device=device)[:, None].expand(6, D).contiguous()
    F.embedding(indices, w, sparse=True).backward(gy)
    assert w.grad.layout == torch.sparse_coo and w.grad._nnz() == 3
    want = torch.zeros(V, D, dtype=torch.float64).index_add_(0, indices.cpu(), gy.cpu().double())
    assert torch.equal(w.grad.to_dense().cpu().double(), want)
    # Uncoalesced by hand: the optimizer sums before it squares.
    optimizer = PackedAdamW([w], moments="float32", betas=(0.0, 0.0))
    w.grad = sparse([5, 5], torch.stack([torch.full((D,), 3.0), torch.full((D,), -2.0)]), device=device)
    optimizer.step()
    assert bool((optimizer.state[w]["v"][5] == 1).all()) and int(optimizer.state[w]["v"].count_nonzero()) == D


@pytest.mark.parametrize("bits", [1, 4])
def test_broken_elements_of_a_sparse_gradient_change_nothing(bits, device):
    w = table(bits, device)
    optimizer = PackedAdamW([w], lr=10.0, weight_decay=0.0)
    before = w.codes.clone()
    values = torch.full((2, D), float("nan"))
    values[1] = float("-inf")
    w.grad = sparse([4, 9], values, device=device)
    optimizer.step()
    assert torch.equal(w.codes, before) and not optimizer.state[w]["m_absmax"].any()


def test_an_ordinary_table_in_the_same_optimizer_follows_sparse_adam(device):
    ours = torch.nn.Parameter(torch.randn(V, D, device=device))
    theirs = torch.nn.Parameter(ours.detach().clone())
    # SparseAdam adds eps before it divides by the correction of v: here it adds nothing.
    a = PackedAdamW([ours], lr=0.1, weight_decay=0.0, eps=1e-20)
    b = torch.optim.SparseAdam([theirs], lr=0.1, eps=1e-20)
    for rows in ([3, 9, 3], [9], [0, 39]):
        values = torch.randn(len(rows), D)
        ours.grad, theirs.grad = sparse(rows, values, device=device), sparse(rows, values, device=device)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for make in (OPTIMIZERS["sgd"], OPTIMIZERS["lion"]):
        p = torch.nn.Parameter(torch.randn(V, D, device=device))
        before = p.detach().clone()
        optimizer = make([p])
        for _ in range(2):
            p.grad = sparse([1, 1, 7], torch.randn(3, D), device=device)
            optimizer.step()
        moved = (p.detach() != before).any(1).nonzero().flatten().tolist()
        assert moved == [1, 7]


def test_a_sparse_run_resumes_bit_for_bit_and_works_in_backward(tmp_path, device):
    def build():
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Embedding(50, 32, sparse=True), torch.nn.Linear(32, 4)).to(device)
        subbyte.quantize_(net, bits=4, group_size=32)
        assert net[0].sparse
        return net

    def train(net, optimizer, first, steps):
        for step in range(first, first + steps):
            g = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 50, (8, 3), generator=g).to(device)
            optimizer.zero_grad()
            net(ids).square().sum().backward()
            optimizer.step()

    net, other, fused = build(), build(), build()
    optimizer, fused_optimizer = PackedAdamW(net.parameters(), lr=1e-2), PackedAdamW(fused.parameters(), lr=1e-2)
    fused_optimizer.update_in_backward()
    train(net, optimizer, 0, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(net, optimizer, 3, 3)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    resumed = PackedAdamW(other.parameters(), lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 3, 3)
    train(fused, fused_optimizer, 0, 6)
    for same in (other, fused):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), same.state_dict().values()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_and_writes_named_rows_alone_whatever_the_size_of_the_table(name, device):
    seconds = {}
    for v in (10**4, 10**6):
        w = torch.nn.Parameter(
            PackedWeight(
                torch.zeros(v, 32, dtype=torch.uint8, device=device), torch.full((v, 1), 0.1, device=device),
                format="uint4", in_features=64, group_size=64,
            )
        )  # fmt: skip
        optimizer = OPTIMIZERS[name]([w])
        rows = torch.randint(0, v, (256,), device=device).unique()
        w.grad = torch.sparse_coo_tensor(rows[None], torch.randn(len(rows), 64, device=device), (v, 64), is_coalesced=True)
        optimizer.step()
        times = []
        for _ in range(9):
            start = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[v] = min(times)
    # One pass over the moments of the large table, 64 MB, would show.
    assert seconds[10**6] < 4 * seconds[10**4] + 2e-3, seconds


def test_the_rows_that_reach_the_update_are_the_named_ones(monkeypatch):
    w, seen = table(), []
    optimizer = PackedAdamW([w])
    step = PackedAdamW._packed_step
    monkeypatch.setattr(
        PackedAdamW,
        "_packed_step",
        lambda self, group, rows, grad, state, *rest: (
            seen.append((rows.codes.shape[0], grad.shape[0], state["m"].shape[0])),
            step(self, group, rows, grad, state, *rest),
        ),
    )
    w.grad = sparse([3, 9, 3], torch.randn(3, D))
    optimizer.step()
    w.grad = sparse([], torch.randn(0, D))  # a batch that names nothing
    optimizer.step()
    assert seen == [(2, 2, 2), (0, 0, 0)]


def test_a_transposed_view_is_refused():
    w = table().detach().t().requires_grad_()
    w.grad = torch.zeros(D, V)
    with pytest.raises(ValueError, match="transposed"):
        PackedAdamW([w]).step()


@pytest.mark.parametrize("optimizer", [PackedAdamW, PackedLion])
def test_rows_of_a_sparse_gradient_step_with_their_residual(optimizer, device):
    values = torch.randn(9, 40, device=device)
    packing = {"bits": 2, "residual_bits": 6, "group_size": 8, "scheme": "midrise"}
    every, named = (torch.nn.Parameter(PackedWeight.from_float(values, **packing)) for _ in range(2))
    rows = torch.tensor([7, 2], device=device)
    gradient = torch.randn(2, 40, device=device)
    before = {name: part.clone() for name, part in named.parts.items()}
    named.grad = torch.sparse_coo_tensor(rows[None], gradient, (9, 40))
    optimizer([named], lr=1e-2).step()
    # The same rows as a table of their own, in the order of their numbers.
    own = PackedWeight.from_float(values, **packing)
    own = torch.nn.Parameter(own._map_parts(lambda part: part.index_select(0, rows.sort()[0])))
    own.grad = gradient.index_select(0, rows.argsort())
    optimizer([own], lr=1e-2).step()
    for name in ("codes", "residual"):
        part = getattr(named, name)
        assert torch.equal(part.index_select(0, rows.sort()[0]), getattr(own, name))
        rest = [n for n in range(9) if n not in (2, 7)]
        assert torch.equal(part[rest], before[name][rest])
    assert not torch.equal(named.residual, before["residual"])
    assert torch.equal(every.codes, before["codes"])
