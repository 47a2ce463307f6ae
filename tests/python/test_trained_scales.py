"""subbyte.optim with scales and zeros or offsets that train by their gradient, or are chosen anew every few steps."""

import math

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight
from subbyte.optim import PackedAdamW, PackedLion, PackedSGD

N, K, SIZE = 6, 100, 32
OPTIMIZERS = {
    "adamw": lambda p, **o: PackedAdamW(p, **{"lr": 1e-2, **o}),
    "sgd": lambda p, **o: PackedSGD(p, **{"lr": 0.1, "momentum": 0.9, **o}),
    "lion": lambda p, **o: PackedLion(p, **{"lr": 3e-3, **o}),
}
MODES = {"trained": dict(scales="trained"), "reestimated": dict(scales="reestimated", reestimate_every=2)}


def weight(device, bits=4, seed=0, **options):
    torch.manual_seed(seed)
    return torch.nn.Parameter(PackedWeight.from_float(torch.randn(N, K, device=device), bits=bits, group_size=SIZE, **options))


def spread(t):
    return t.detach().cpu().double().repeat_interleave(SIZE, 1)[:, :K]


def codes_of(w):
    return torch.ops.subbyte.unpack(w.codes, w.format, K).cpu().double()


def adam(m, v, g, t, betas, eps=1e-8):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return m, v, m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


@pytest.mark.parametrize("kind", ["fixed", "zeros", "offsets"])
def test_a_step_is_that_of_plain_pytorch_on_codes_scales_and_shifts(kind, device):
    """Scale and shift by AdamW on the gradients that autograd gives them, then the codes on the moved grid."""
    sym = {"sym": True} if kind == "fixed" else {"zero_kind": kind}
    w = weight(device, **sym)
    lr, factor, betas, decay = 0.02, 0.5, (0.8, 0.9), 0.1
    options = dict(lr=lr, betas=betas, weight_decay=decay, moments="float32", scales="trained", scale_lr=factor)
    optimizer = PackedAdamW([w], **options)
    s = w.scales.cpu().double()
    shift = None if kind == "fixed" else (w.zeros if kind == "zeros" else w.offsets).cpu().double()
    state = [torch.zeros_like(s) for _ in range(4)] + [torch.zeros(N, K, dtype=torch.float64) for _ in range(2)]
    for t in range(1, 6):
        q, g = codes_of(w), torch.randn(N, K, generator=torch.Generator().manual_seed(t))
        leaf, moved = s.clone().requires_grad_(), torch.zeros_like(s).requires_grad_()
        zero = 8.0 if kind == "fixed" else spread(shift) if kind == "zeros" else 0.0
        dense = leaf.repeat_interleave(SIZE, 1)[:, :K] * (q - zero) + moved.repeat_interleave(SIZE, 1)[:, :K]
        (dense * g.double()).sum().backward()
        state[0], state[1], step_s = adam(state[0], state[1], leaf.grad, t, betas)
        state[2], state[3], step_a = adam(state[2], state[3], moved.grad, t, betas)
        old = s
        change = lr * factor * 2 / 15 * step_s
        s = s - torch.minimum(change.abs(), s.abs() / 2) * change.sign()
        if kind == "offsets":
            shift = shift - lr * factor * step_a
        elif kind == "zeros":
            shift = shift + lr * factor * step_a / old
        w.grad = g.to(device)
        optimizer.step()
        torch.testing.assert_close(w.scales.cpu().double(), s, rtol=1e-4, atol=1e-6)
        if kind != "fixed":
            now = (w.zeros if kind == "zeros" else w.offsets).cpu().double()
            torch.testing.assert_close(now, shift, rtol=1e-4, atol=1e-4)
        state[4], state[5], r = adam(state[4], state[5], g.double(), t, betas)
        zero = 8.0 if kind == "fixed" else spread(now) if kind == "zeros" else -spread(now) / spread(w.scales)
        want = (q - lr * decay * (q - zero) - lr * r / spread(w.scales)).clamp(0, 15)
        assert bool(((codes_of(w) - want).abs() < 1 + 1e-3).all())
        # From here on the exact values are those that the optimizer keeps: float32 ones.
        s = w.scales.cpu().double()
        shift = None if kind == "fixed" else now


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grid_that_does_not_fit_is_put_right(name, mode, device):
    """Scales a quarter of what the task needs: with fixed ones the weights press against the ends of their grid."""

    def run(**options):
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(32, 8, bias=False))
        subbyte.quantize_(net, bits=3, group_size=32)
        net.to(device)
        net[0].weight.detach().mul_(0.25)
        x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1)).to(device)
        y = x @ (torch.randn(32, 8, generator=torch.Generator().manual_seed(2)) * 0.3).to(device)
        optimizer = OPTIMIZERS[name](net.parameters(), **options)
        for _ in range(250):
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert run(**MODES[mode]) < 0.6 * run(), mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_sparse_and_in_backward_runs_have_the_same_bits(name, mode, tmp_path, device):
    def build():
        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Embedding(20, 32), torch.nn.Linear(32, 20))
        subbyte.quantize_(net, bits=4, group_size=32, scale_dtype=torch.float16)
        return net.to(device)

    def train(net, optimizer, first, steps):
        for step in range(first, first + steps):
            ids = torch.randint(0, 20, (64,), generator=torch.Generator().manual_seed(step)).to(device)
            optimizer.zero_grad()
            F.cross_entropy(net(ids), (ids + 1) % 20).backward()
            optimizer.step()

    net, other, fused = build(), build(), build()
    optimizer, in_backward = (OPTIMIZERS[name](m.parameters(), **MODES[mode]) for m in (net, fused))
    in_backward.update_in_backward()
    train(net, optimizer, 0, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(net, optimizer, 3, 4)
    train(fused, in_backward, 0, 7)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    second = OPTIMIZERS[name](other.parameters(), **MODES[mode])
    second.load_state_dict(saved["optimizer"])
    train(other, second, 3, 4)
    for same in (other, fused):
        for (key, a), b in zip(net.state_dict().items(), same.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
    start = build()
    assert not torch.equal(start[0].weight.scales, net[0].weight.scales)
    # A sparse gradient that names every row is the dense one.
    a, b = weight(device), weight(device)
    first, second = (OPTIMIZERS[name]([p], **MODES[mode]) for p in (a, b))
    for t in range(4):
        a.grad = torch.randn(N, K, generator=torch.Generator().manual_seed(t)).to(device)
        b.grad = a.grad.to_sparse(1)
        first.step()
        second.step()
    assert all(torch.equal(x, y) for x, y in zip(a.parts.values(), b.parts.values()))
    # Rows that are not named keep their grid.
    before = {k: v.clone() for k, v in b.parts.items()}
    b.grad = torch.sparse_coo_tensor([[1]], torch.randn(1, K), (N, K), check_invariants=False).to(device)
    for _ in range(2):
        second.step()
    idle = [0, 2, 3, 4, 5]
    assert all(torch.equal(b.parts[k][idle], v[idle]) for k, v in before.items())
    assert not torch.equal(b.scales[1], before["scales"][1])


@pytest.mark.parametrize("bits, options", [(2, {}), (4, dict(zero_kind="zeros")), (4, dict(sym=True)), (8, {})])
def test_a_chosen_grid_follows_weights_that_leave_the_old_one(bits, options, device):
    """A gradient of one sign: fixed grids stop at their end, chosen ones follow, and nothing is lost on average."""
    steps, lr = 60, 0.05
    moved = {}
    for scales in ("fixed", "reestimated"):
        w = weight(device, bits, **options)
        start = w.detach().dequantize().cpu().double()
        optimizer = PackedAdamW([w], lr=lr, weight_decay=0.0, scales=scales, reestimate_every=1)
        for _ in range(steps):
            w.grad = torch.full((N, K), -1.0, device=device)
            optimizer.step()
        moved[scales] = (w.detach().dequantize().cpu().double() - start).mean().item()
    # A zero that is a whole code moves the ends of its grid by up to half a level, and values at an end with it.
    lost = 0.15 if "zero_kind" in options else 0.05
    assert abs(moved["reestimated"] / (steps * lr) - 1) < lost and moved["fixed"] < 0.8 * steps * lr, moved


def test_between_two_choices_steps_are_those_of_a_fixed_grid_and_the_choice_is_unbiased(device):
    a, b = weight(device), weight(device)
    first = PackedAdamW([a], scales="reestimated", reestimate_every=3)
    second = PackedAdamW([b])
    for t in range(3):
        a.grad = b.grad = torch.randn(N, K, generator=torch.Generator().manual_seed(t)).to(device)
        first.step()
        second.step()
        same = all(torch.equal(x, y) for x, y in zip(a.parts.values(), b.parts.values()))
        assert same == (t < 2)
        # Moments do not know of the grid, but for the random bits of their rounding.
        assert first.state[a]["m_absmax"].allclose(second.state[b]["m_absmax"])
    start = weight(device)
    g, count = torch.randn(N, K, generator=torch.Generator().manual_seed(9)), 400
    total = torch.zeros(N, K, dtype=torch.float64)
    for seed in range(count):
        w = weight(device)
        optimizer = PackedSGD([w], lr=0.1, scales="reestimated", reestimate_every=1, seed=seed)
        w.grad = g.to(device)
        optimizer.step()
        total += w.detach().dequantize().cpu().double()
    want = start.detach().dequantize().cpu().double() - 0.1 * g.double()
    level = spread(start.scales) + 2 * 0.1 * g.abs().max() / 15  # no new level is wider
    # Half a level is the largest deviation of a rounded value; a cell of the fine grid what a range may be off.
    assert bool(((total / count - want).abs() <= 6 * level / 2 / math.sqrt(count) + level / 64).all())


def test_trained_scales_take_the_stated_state_and_wrong_options_are_refused(device):
    for dtype, planes in ((torch.float32, 4), (torch.float16, 6)):
        w = weight(device, scale_dtype=dtype)
        optimizer = PackedAdamW([w], scales="trained")
        w.grad = torch.randn(N, K, device=device)
        optimizer.step()
        assert optimizer.state[w]["affine"].nbytes == 4 * planes * w.scales.numel()
    for options, text in (
        (dict(scales="free"), "scales is 'free'"),
        (dict(scale_lr=-1), "scale_lr is -1"),
        (dict(scales="reestimated", reestimate_every=0), "reestimate_every is 0"),
    ):
        for make in OPTIMIZERS.values():
            with pytest.raises(ValueError, match=text):
                make([w], **options)
    with pytest.raises(ValueError, match="minmax"):
        symmetric = weight(device, sym=True)
        optimizer = PackedAdamW([symmetric], scales="reestimated", reestimate_every=1, scheme="minmax")
        symmetric.grad = torch.randn(N, K, device=device)
        optimizer.step()


def test_a_grid_under_a_residual_is_not_chosen_anew():
    packed = PackedWeight.from_float(torch.randn(4, 16), bits=2, residual_bits=6, group_size=8, scheme="midrise")
    w = torch.nn.Parameter(packed)
    w.grad = torch.randn(4, 16)
    with pytest.raises(ValueError, match="scales is 'reestimated', expected 'fixed' or 'trained' for a weight with a residual"):
        PackedAdamW([w], scales="reestimated", reestimate_every=1).step()
