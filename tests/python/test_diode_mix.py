"""DiodeMix and GaLoreProjector: the rules against transcriptions in float64, state, checkpoints, training."""

import copy
import io
import math
import warnings

import pytest
import torch

import subbyte
from subbyte import PackedWeight
from subbyte.optim import DiodeMix, GaLoreProjector


def adam_in_float64(w, grads, lr, betas, eps, weight_decay, correct_bias, first=0):
    """The ordinary rule, as written."""
    (beta1, beta2), w = betas, w.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1 + first):
        g = g.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        eta = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) if correct_bias else lr
        w = w - eta * m / (v.sqrt() + eps)
        if weight_decay > 0:
            w = w - lr * weight_decay * w
    return w


def steps(optimizer, parameter, grads):
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the ordinary rule


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_ordinary_rule_is_its_formula_over_several_steps(device, shape, correct_bias, weight_decay):
    options = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-3, weight_decay=weight_decay, correct_bias=correct_bias)
    start = torch.randn(shape, device=device)
    grads = [torch.randn(shape, device=device) for _ in range(6)]
    expected = adam_in_float64(start, grads, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        p = torch.nn.Parameter(start.to(dtype))
        steps(DiodeMix([p], dtype=dtype, **options), p, [g.to(dtype) for g in grads])
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_the_defaults_are_those_of_the_original(device):
    p = torch.nn.Parameter(torch.randn(4, device=device))
    grads = [torch.randn(4, device=device) for _ in range(3)]
    expected = adam_in_float64(p.detach(), grads, 1e-4, (0.99, 0.9999), 1e-6, 0.0, True)
    optimizer = DiodeMix([p])
    assert optimizer.dtype == torch.float
    steps(optimizer, p, grads)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_half_parameters_compute_in_the_dtype_of_their_group(device):
    start = torch.randn(64, device=device).bfloat16()
    grads = [torch.randn(64, device=device).bfloat16() for _ in range(3)]
    p = torch.nn.Parameter(start.clone())
    optimizer = DiodeMix([dict(params=[p], dtype=torch.float32)], lr=0.1, dtype=torch.bfloat16)
    steps(optimizer, p, grads)
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["exp_avg_l"].dtype == torch.float32
    w = start.double()
    state = dict(m=torch.zeros(64, dtype=torch.float64), v=torch.zeros(64, dtype=torch.float64))
    for t, g in enumerate(grads, 1):
        g = g.double().cpu()
        state["m"] = 0.99 * state["m"] + 0.01 * g
        state["v"] = 0.9999 * state["v"] + 0.0001 * g * g
        eta = 0.1 * math.sqrt(1 - 0.9999**t) / (1 - 0.99**t)
        w = (w.cpu() - eta * state["m"] / (state["v"].sqrt() + 1e-6)).bfloat16().double()  # rounded once a step
    torch.testing.assert_close(p.detach().cpu().double(), w, rtol=2**-7, atol=1e-6)


def test_options_out_of_range_are_refused_and_leave_no_group(device):
    p = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    for options, name in (
        (dict(lr=-1.0), "lr"),
        (dict(betas=(1.0, 0.9)), "betas"),
        (dict(betas=(0.9, -0.1)), "betas"),
        (dict(eps=-1e-9), "eps"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(dtype=torch.int32), "dtype"),
        (dict(rounding="up"), "rounding"),
        (dict(state_bits=4), "state_bits"),
    ):
        with pytest.raises(ValueError, match=f"DiodeMix: {name} is"):
            DiodeMix([p], **options)
    optimizer = DiodeMix([torch.nn.Parameter(torch.zeros(2))])
    for extra, text in (
        (dict(rank=2), "update_proj_gap, scale, proj_type is missing"),
        (dict(rank=0, update_proj_gap=1, scale=1.0, proj_type="std"), "rank is 0"),
        (dict(rank=1, update_proj_gap=1, scale=1.0, proj_type="up"), "proj_type is 'up'"),
        (dict(rule="ternary"), "rule is 'ternary'"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group(dict(params=[p], **extra))
    assert len(optimizer.param_groups) == 1


def test_step_returns_the_loss_of_its_closure_and_skips_what_has_no_gradient(device):
    used, unused = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = DiodeMix([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and optimizer.step() is None
    assert used.max() < 1 and torch.equal(unused.detach(), torch.ones(3, device=device)) and unused not in optimizer.state


def test_sparse_gradients_of_ordinary_parameters_are_refused(device):
    p = torch.nn.Parameter(torch.ones(4, 3, device=device))
    p.grad = torch.ones(4, 3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        DiodeMix([p]).step()


# ---- binary parameters


def sign_weight(n=6, k=21, device="cpu", perm=None, **options):
    w = torch.randn(n, k, device=device)
    return PackedWeight.from_float(w, format="sign", group_size=8, perm=perm, requires_grad=True, **options)


def signs_of(p):
    values = p.dequantize() if isinstance(p, PackedWeight) else p.detach()
    return torch.where(values >= 0, 1.0, -1.0).double()


def binary_in_float64(signs, s, grads, lr, beta1, beta2):
    average = torch.zeros_like(s)
    for g in grads:
        average = average + (1 - beta1) * (g.double() - average)
        s = s + (1 - beta2) * (lr * average.sign() - s)
        u = torch.where(-s.sign() == 0, 1.0, -s.sign()).double()
        signs = torch.where(u != signs, -signs, signs)
    return signs, s


@pytest.mark.parametrize("kind", ["packed", "permuted", "float", "int8"])
def test_the_binary_rule_is_its_formula(device, kind):
    n, k = 6, 21
    if kind in ("packed", "permuted"):
        perm = torch.randperm(k).to(torch.int32).to(device) if kind == "permuted" else None
        p = sign_weight(n, k, device, perm)
        order = perm.long() if perm is not None else torch.arange(k, device=device)
    else:
        data = torch.randn(n, k, device=device)
        data[0, 0] = 0  # counts as +1
        p = torch.nn.Parameter(data) if kind == "float" else HeldGrad((data * 50).round().to(torch.int8))
        order = torch.arange(k, device=device)
    magnitude = (p.dequantize() if isinstance(p, PackedWeight) else p.detach()).abs().clone()
    optimizer = DiodeMix([dict(params=[p], rule="binary")], lr=0.5, betas=(0.6, 0.9), dtype=torch.float64)
    start = signs_of(p)
    grads = [torch.randn(n, k, device=device) for _ in range(12)]
    p.grad = grads[0].clone()
    optimizer.step()
    s = optimizer.state[p]["exp_avg_s"]
    assert s.shape == (n, k)
    # The random start is not known from outside: it follows from the first step.
    s0 = (s - 0.1 * 0.5 * grads[0].double()[:, order].sign()) / 0.9
    assert ((-s0).sign() * start[:, order] >= 0).all() and s0.abs().max() < 1.001e-3 and s0.abs().max() > 5e-4
    steps(optimizer, p, grads[1:])
    inverse = torch.argsort(order)
    expected, s_expected = binary_in_float64(start, s0[:, inverse], grads, 0.5, 0.6, 0.9)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_s"][:, inverse], s_expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(signs_of(p), expected) and not torch.equal(expected, start)
    after = (p.dequantize() if isinstance(p, PackedWeight) else p.detach()).abs()
    if kind == "int8":
        magnitude[0, 0] = after[0, 0]
    torch.testing.assert_close(after.float(), magnitude.float(), rtol=0, atol=1e-30)


class HeldGrad(torch.nn.Parameter):
    """An integer parameter with a float gradient."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)

    @property
    def grad(self):
        return getattr(self, "_held", None)

    @grad.setter
    def grad(self, value):
        self._held = value


def test_O1_binary_tables_take_sparse_gradients_and_only_touched_rows_move(device):
    for bits in (32, 16, 8):
        table = PackedWeight.from_float(torch.randn(9, 20, device=device), format="sign", group_size=20, requires_grad=True)
        optimizer = DiodeMix([table], lr=0.5, betas=(0.9, 0.2), state_bits=bits)
        before = signs_of(table)
        rows = torch.tensor([[4, 1, 4]], device=device)
        values = torch.randn(3, 20, device=device)
        table.grad = torch.sparse_coo_tensor(rows, values, (9, 20))
        optimizer.step()
        g = torch.zeros(9, 20, device=device).index_add_(0, rows[0], values)
        after = signs_of(table)
        # One step of (1 - beta2) = 0.8 carries s to the gradient's sign: each weight goes against its gradient.
        assert torch.equal(after[[1, 4]], -g[[1, 4]].sign().double())
        rest = [0, 2, 3, 5, 6, 7, 8]
        assert torch.equal(after[rest], before[rest])
        state = optimizer.state[table]
        assert state["exp_avg_s"].dtype == {32: torch.float32, 16: torch.bfloat16, 8: torch.int8}[bits]
        assert "exp_avg_l" not in state
        again = saved(optimizer.state_dict())
        fresh = DiodeMix([table], lr=0.5, betas=(0.9, 0.2), state_bits=bits)
        fresh.load_state_dict(again)
        assert torch.equal(fresh.state[table]["exp_avg_s"], state["exp_avg_s"])
        table.grad = torch.sparse_coo_tensor(rows[:, :0], values[:0], (9, 20))
        optimizer.step()
        assert torch.equal(signs_of(table), after)


def test_binary_training_brings_the_loss_down(device):
    w = torch.randn(8, 32, device=device).sign()
    x = torch.randn(128, 32, device=device)
    for bits in (32, 8):
        layer = subbyte.nn.Linear(32, 8, bias=False, format="sign", group_size=32).to(device)
        with torch.no_grad():
            layer.weight.scales.fill_(2.0)
        optimizer = DiodeMix(layer.parameters(), lr=1e-3, betas=(0.9, 0.95), state_bits=bits)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - x @ w.t()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0], (bits, losses[0], losses[-1])


def test_O7_weight_decay_of_binary_parameters_warns_and_of_n_bit_ones_acts(device):
    p = sign_weight(device=device)
    optimizer = DiodeMix([p], weight_decay=0.1)
    p.grad = torch.ones(6, 21, device=device)
    with pytest.warns(UserWarning, match="weight_decay has no effect on binary"):
        optimizer.step()
    q = PackedWeight.from_float(torch.randn(4, 16, device=device), bits=8, group_size=16, requires_grad=True)
    before = q.dequantize()
    q.grad = torch.zeros(4, 16, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiodeMix([q], lr=1.0, weight_decay=0.5, rounding="nearest").step()
    step = q.scales.max().item()
    torch.testing.assert_close(q.dequantize(), 0.5 * before, rtol=0, atol=0.51 * step)


# ---- n-bit parameters


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_n_bit_weights_step_as_floats_and_return_to_their_grid(device, rounding, bits):
    w = PackedWeight.from_float(torch.randn(5, 40, device=device), bits=bits, group_size=16, requires_grad=True)
    start, scales = w.dequantize(), w.scales.clone()
    options = dict(lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, correct_bias=True)
    g = torch.randn(5, 40, device=device)
    expected = adam_in_float64(start, [g], **options)
    optimizer = DiodeMix([w], rounding=rounding, **options)
    steps(optimizer, w, [g])
    codes = subbyte.functional.unpack(w.codes, w.format, 40).double()
    groups = torch.arange(40, device=device) // 16
    t = (expected - w.offsets.double()[:, groups]) / w.scales.double()[:, groups]
    t = t.clamp(0, 2**bits - 1)
    assert ((codes - t).abs() <= (0.5001 if rounding == "nearest" else 1.0001)).all()
    assert torch.equal(w.scales, scales) and (rounding == "nearest" or (codes - t).abs().max() > 0.5)


def test_stochastic_rounding_moves_on_average_what_nearest_loses(device):
    for rounding, moves in (("nearest", False), ("stochastic", True)):
        values = torch.linspace(-1, 1, 4096, device=device).view(4, 1024)
        w = PackedWeight.from_float(values, bits=4, group_size=1024, requires_grad=True)
        start = w.dequantize()
        step = 0.1 * w.scales.mean().item()
        w.grad = torch.ones(4, 1024, device=device)
        DiodeMix([w], lr=step, eps=0.0, betas=(0.0, 0.0), rounding=rounding).step()
        inner = (start > start.amin(1, keepdim=True) + 1e-6)  # at the lower end of the grid there is nowhere to go
        moved = (start - w.dequantize())[inner].mean().item()
        assert moved == pytest.approx(step, rel=0.25) if moves else moved == 0


def test_O2_integer_parameters_keep_their_type_and_their_scale_is_state(device):
    values = torch.randn(6, 8, device=device)
    scale = values.abs().max() / 127
    p = HeldGrad(torch.round(values / scale).to(torch.int8))
    options = dict(lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, correct_bias=True)
    optimizer = DiodeMix([p], rounding="nearest", **options)
    optimizer.state[p].update(scale=scale.clone())
    w = p.detach().float() * scale
    g = torch.randn(6, 8, device=device)
    steps(optimizer, p, [g])
    expected = adam_in_float64(w, [g], **options)
    state = optimizer.state[p]
    assert p.dtype == torch.int8 and state["scale"].item() == pytest.approx(expected.abs().max().item() / 127, rel=1e-5)
    got = p.detach().double() * state["scale"].double()
    assert ((got - expected).abs() <= 0.501 * state["scale"]).all() and p.detach().abs().max() == 127
    p.scale = torch.tensor(0.25, device=device)  # a parameter that owns its scale
    before = p.detach().float() * 0.25
    optimizer = DiodeMix([p], rounding="nearest", lr=0.0)
    steps(optimizer, p, [g])
    assert "scale" not in optimizer.state[p]
    torch.testing.assert_close(p.detach().float() * p.scale, before, rtol=0, atol=0.6 * p.scale.item())


def test_n_bit_training_brings_the_loss_down(device):
    w, x = torch.randn(8, 32, device=device), torch.randn(128, 32, device=device)
    for bits in (32, 16, 8):
        layer = subbyte.nn.Linear(32, 8, bias=False, bits=4, group_size=32).to(device)
        with torch.no_grad():
            layer.weight.scales.fill_(0.4)
            layer.weight.offsets.fill_(-3.0)
            layer.weight.copy_(torch.zeros(8, 32, device=device))
        optimizer = DiodeMix(layer.parameters(), lr=0.05, betas=(0.9, 0.99), state_bits=bits)
        losses = []
        for _ in range(80):
            optimizer.zero_grad()
            loss = (layer(x) - x @ w.t()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) / 5 < 0.2 * losses[0], (bits, losses[0], losses[-5:])


# ---- classes with a rule of their own


class Own(torch.nn.Parameter):
    calls = []

    @staticmethod
    def update(
        qweight, exp_avg_s=None, exp_avg_l=None, step=None, lr=1e-4, weight_decay=0.0, beta1=0.99, beta2=0.9999, eps=1e-6,
        dtype=torch.float16, correct_bias=None, projector=None, grad=None,
    ):  # fmt: skip
        step += 1
        exp_avg_l.add_(grad)
        Own.calls.append((lr, weight_decay, beta1, beta2, eps, dtype, correct_bias, projector, int(step)))
        qweight.sub_(lr * exp_avg_l if projector is None else projector.project_back(lr * exp_avg_l))


class Starting(Own):
    @staticmethod
    def initial_state(qweight, grad, dtype):
        return dict(exp_avg_l=torch.full_like(grad, 10.0))


def test_a_class_with_an_update_is_asked_for_its_step(device):
    Own.calls.clear()
    p, q = Own(torch.zeros(4, 3, device=device)), Starting(torch.zeros(4, 3, device=device))
    optimizer = DiodeMix([p, q], lr=0.5, betas=(0.1, 0.2), eps=0.3, weight_decay=0.4, correct_bias=False)
    p.privileged_grad = torch.full((4, 3), 2.0, device=device)  # goes before grad
    for _ in range(2):
        p.grad, q.grad = torch.ones(4, 3, device=device), torch.ones(4, 3, device=device)
        optimizer.step()
    assert Own.calls == [(0.5, 0.4, 0.1, 0.2, 0.3, torch.float32, False, None, t) for t in (1, 1, 2, 2)]
    assert torch.equal(p.detach(), torch.full((4, 3), -0.5 * (2 + 4), device=device))
    assert torch.equal(q.detach(), torch.full((4, 3), -0.5 * (11 + 12), device=device))
    assert "exp_avg_s" in optimizer.state[p] and "exp_avg_s" not in optimizer.state[q]
    galore = DiodeMix([dict(params=[p], rank=2, update_proj_gap=5, scale=1.0, proj_type="right")])
    p.privileged_grad = torch.randn(4, 3, device=device)
    galore.step()
    assert galore.state[p]["exp_avg_l"].shape == (4, 2) and isinstance(Own.calls[-1][7], GaLoreProjector)


# ---- GaLore


SIDES = {
    "std": ("right", "right", "left"),
    "reverse_std": ("left", "left", "right"),
    "right": ("right",) * 3,
    "left": ("left",) * 3,
    "full": ("full",) * 3,
}


@pytest.mark.parametrize("proj_type", list(SIDES))
def test_galore_projects_on_singular_vectors_of_the_right_side(device, proj_type):
    for shape, side in zip(((9, 5), (6, 6), (4, 7)), SIDES[proj_type]):
        g = torch.randn(shape, dtype=torch.float64, device=device)
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        u, p = u[:, :3].double(), vh[:3].double()
        projector = GaLoreProjector(3, scale=0.5, proj_type=proj_type)
        r = projector.project(g, 0)
        expected, back = {
            "right": lambda: (g @ p.t(), g @ p.t() @ p),
            "left": lambda: (u.t() @ g, u @ u.t() @ g),
            "full": lambda: (u.t() @ g @ p.t(), u @ u.t() @ g @ p.t() @ p),
        }[side]()
        assert projector.side == side and r.dtype == torch.float64
        torch.testing.assert_close(r, expected)
        torch.testing.assert_close(projector.project_back(r), 0.5 * back)


def test_galore_forms_its_basis_anew_at_the_gap(device):
    projector = GaLoreProjector(2, update_proj_gap=3)
    bases = []
    for iteration in range(7):
        projector.project(torch.randn(6, 4, device=device), iteration)
        bases.append(projector.ortho_matrix.clone())
    same = [torch.equal(a, b) for a, b in zip(bases, bases[1:])]
    assert same == [True, True, False, True, True, False]
    for wrong in (
        lambda: GaLoreProjector(0),
        lambda: GaLoreProjector(2, update_proj_gap=0),
        lambda: GaLoreProjector(2, proj_type="up"),
        lambda: GaLoreProjector(2).project(torch.ones(3), 0),
        lambda: GaLoreProjector(2).project_back(torch.ones(3, 2)),
        lambda: GaLoreProjector.get_orthogonal_matrix(torch.ones(3, 3), 1, "up"),
    ):
        with pytest.raises(ValueError):
            wrong()
    copied = GaLoreProjector(2, update_proj_gap=3)
    copied.load_state_dict(saved(projector.state_dict()))
    r = torch.randn(6, 2, device=device)
    assert torch.equal(copied.project_back(r), projector.project_back(r))
    assert GaLoreProjector(2).state_dict() == {}


@pytest.mark.parametrize("proj_type", list(SIDES))
def test_O3_galore_takes_every_shape_and_kind_of_parameter(device, proj_type):
    galore = dict(rank=5, update_proj_gap=2, scale=0.7, proj_type=proj_type)
    parameters = [
        torch.nn.Parameter(torch.randn(7, device=device)),
        torch.nn.Parameter(torch.randn(4, 9, device=device)),  # rank above the rows of a wide matrix
        torch.nn.Parameter(torch.randn(9, 4, device=device)),
        torch.nn.Parameter(torch.randn(2, 3, 4, device=device)),
        sign_weight(12, 8, device),
        PackedWeight.from_float(torch.randn(8, 12, device=device), bits=4, group_size=12, requires_grad=True),
        sign_weight(30, 9, device),
    ]
    optimizer = DiodeMix([dict(params=parameters, **galore)], lr=0.1, betas=(0.5, 0.5))
    before = [p.dequantize() if isinstance(p, PackedWeight) else p.detach().clone() for p in parameters]
    for _ in range(5):
        for p in parameters:
            p.grad = torch.randn(p.shape, device=device)
        optimizer.step()
    for p, old in zip(parameters, before):
        new = p.dequantize() if isinstance(p, PackedWeight) else p.detach()
        state = optimizer.state[p]
        assert not torch.equal(new, old) and new.isfinite().all()
        assert ("galore_side" in state) == (p.dim() == 2)
        if p.dim() == 2:
            small = min(5, *p.shape)
            assert state["exp_avg_l"].numel() < p.numel() or small == min(p.shape)
    for p in parameters:  # and it goes on after a checkpoint
        p.grad = torch.ones(p.shape, device=device)
    fresh = DiodeMix([dict(params=parameters, **galore)], lr=0.1, betas=(0.5, 0.5))
    fresh.load_state_dict(saved(optimizer.state_dict()))
    fresh.step()


def test_O3_a_projected_step_is_the_formula_in_the_projected_space(device):
    start = torch.randn(9, 4, dtype=torch.float64, device=device)
    grads = [torch.randn(9, 4, dtype=torch.float64, device=device) for _ in range(3)]
    p = torch.nn.Parameter(start.clone())
    galore = dict(rank=2, update_proj_gap=10, scale=0.25, proj_type="std")
    steps(DiodeMix([dict(params=[p], **galore)], lr=0.1, betas=(0.9, 0.99), eps=1e-3, dtype=torch.float64), p, grads)
    basis = torch.linalg.svd(grads[0].float(), full_matrices=False)[2][:2].double()
    w, m, v = start, 0, 0
    for t, g in enumerate(grads, 1):
        r = g @ basis.t()
        m, v = 0.9 * m + 0.1 * r, 0.99 * v + 0.01 * r * r
        w = w - 0.1 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * 0.25 * (m / (v.sqrt() + 1e-3)) @ basis
    torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


# ---- state


def test_O4_state_dicts_load_with_weights_only_and_training_goes_on_as_before(device):
    def make():
        torch.manual_seed(5)
        parameters = [
            torch.nn.Parameter(torch.randn(6, 4, device=device)),
            torch.nn.Parameter(torch.randn(6, 4, device=device).bfloat16()),
            PackedWeight.from_float(torch.randn(8, 12, device=device), bits=4, group_size=12, requires_grad=True),
            sign_weight(6, 21, device),
        ]
        galore = dict(rank=2, update_proj_gap=3, scale=1.0, proj_type="full")
        groups = [dict(params=parameters[:1], **galore), dict(params=parameters[1:])]
        return parameters, groups

    def go_on(optimizer, parameters, seed):
        torch.manual_seed(seed)
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape, device=device).to(p.dtype)
            optimizer.step()

    for bits in (32, 16, 8):
        parameters, groups = make()
        optimizer = DiodeMix(groups, lr=0.05, betas=(0.8, 0.9), state_bits=bits)
        go_on(optimizer, parameters, 1)
        stored = saved(optimizer.state_dict())
        copies = [copy.deepcopy(p) for p in parameters]
        other_groups = [dict(params=copies[:1]), dict(params=copies[1:])]
        other = DiodeMix(other_groups, lr=9.0)
        other.load_state_dict(stored)
        for p, q in zip(parameters, copies):
            for name, value in optimizer.state[p].items():
                same = other.state[q][name]
                if isinstance(value, torch.Tensor):
                    assert torch.equal(same, value) and same.dtype == value.dtype
                else:
                    assert same == value
        assert other.param_groups[0]["dtype"] == "float32" and other.param_groups[0]["proj_type"] == "full"
        go_on(optimizer, parameters, 2)
        go_on(other, copies, 2)
        for p, q in zip(parameters, copies):
            a, b = (t.dequantize() if isinstance(t, PackedWeight) else t.detach() for t in (p, q))
            assert torch.equal(a, b), bits


def test_O5_state_takes_32_16_or_8_bits_a_moment(device):
    taken = {}
    for bits in (32, 16, 8):
        p = sign_weight(64, 64, device)
        optimizer = DiodeMix([p], state_bits=bits)
        p.grad = torch.randn(64, 64, device=device)
        optimizer.step()
        taken[bits] = sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step") * 8 / p.numel()
    assert taken == {32: 64, 16: 32, 8: 16 + 2 * 32 / 256}


def test_low_bit_moments_are_unbiased(device):
    from subbyte.optim import moments

    def cell(v):  # width of the grid of fourth powers around v
        below = torch.floor(v.sqrt().sqrt() * 255).clamp(max=254)
        return ((below + 1) / 255) ** 4 - (below / 255) ** 4

    value = torch.cat([torch.linspace(0, 1, 500), torch.logspace(-6, 0, 500)]).to(device)
    for bits in (16, 8):
        for signed in (True, False):
            source = torch.cat([value, -value]) if signed else value
            sums = torch.zeros_like(source, dtype=torch.float64)
            worst = torch.zeros_like(sums)
            count = 400
            for _ in range(count):
                state = {}
                moments.store(state, "x", source, bits, signed)
                got = moments.load(state, "x", bits, torch.float64, signed)
                sums += got
                worst = torch.maximum(worst, (got - source).abs().double())
            error = (sums / count - source.double()).abs()
            unit = source.double().abs() / 128
            if bits == 8:
                unit = torch.full_like(unit, 1 / 127) if signed else cell(source.double())
            assert (worst <= 1.05 * unit + 1e-9).all()
            # Six standard errors of a sum of two-valued draws; the smallest values never become 0 where signs do not matter.
            slack = 6 * 0.5 * unit / math.sqrt(count) + 1e-9
            assert (error <= slack + (1 / 255**4 if not signed else 0)).all(), (bits, signed)
    state = {}
    moments.store(state, "v", torch.tensor([0.0, 1e-20, 1.0], device=device), 8, signed=False)
    back = moments.load(state, "v", 8, torch.float32, signed=False)
    assert back[0] == 0 and back[1] > 0 and back[2] == 1


def test_O6_steps_are_counted_on_the_host_and_nothing_waits_for_the_device(device):
    parameters = [
        torch.nn.Parameter(torch.randn(6, 4, device=device)),
        PackedWeight.from_float(torch.randn(8, 12, device=device), bits=4, group_size=12, requires_grad=True),
        sign_weight(6, 21, device),
    ]
    for bits in (32, 8):
        optimizer = DiodeMix(parameters, state_bits=bits, weight_decay=0.0)
        for p in parameters:
            p.grad = torch.randn(p.shape, device=device)
        optimizer.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        for p in parameters:
            step = optimizer.state[p]["step"]
            assert step.device.type == "cpu" and step.tolist() == [2.0]


def test_a_model_of_all_kinds_trains(device):
    torch.manual_seed(11)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.ReLU(),
        subbyte.nn.Linear(32, 32, bits=8, group_size=32),
        torch.nn.ReLU(),
        subbyte.nn.BitLinear(32, 4),
    ).to(device)
    x = torch.randn(256, 16, device=device)
    y = torch.randn(16, 4, device=device)
    y = x @ y / 4
    optimizer = DiodeMix(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], (losses[0], losses[-1])
