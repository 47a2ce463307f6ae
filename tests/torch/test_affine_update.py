"""affine_adamw_, widen and regrid_ through the dispatcher, against the written formulas in float64 and autograd's gradients."""

import math
import os

import pytest
import torch

LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)
torch.ops.load_library(LIBRARY)
ops = torch.ops.subbyte


def _cuda():
    import ctypes

    return torch.cuda.is_available() and bool(ctypes.CDLL(LIBRARY).subbyte_torch_has_cuda())


DEVICES = ["cpu"] + (["cuda"] if _cuda() else [])
MIXED = "uint8*64+uint3*64+sign*70"
N, K, SIZE = 5, 198, 32
LEVELS = {"sign": (2, 0.5), "ternary": (3, 1.0)}


def by_column(fmt, k=K):
    """(levels, fixed zero) of every stored column, float64."""
    parts = [(p.split("*")[0], int(p.split("*")[1])) for p in fmt.split("+")] if "*" in fmt else [(fmt, k)]
    pairs = [LEVELS.get(f) or (2 ** int(f[4:]), 2.0 ** (int(f[4:]) - 1)) for f, count in parts for _ in range(count)]
    return torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs]).double()


class Weight:
    def __init__(self, fmt, kind="offsets", dtype=torch.float32, perm=False, device="cpu", seed=0, n=N, k=K, group_size=SIZE):
        g = torch.Generator().manual_seed(seed)
        self.fmt, self.kind, self.k, self.group_size = fmt, kind, k, group_size
        w = torch.randn(n, k, generator=g).to(device)
        self.perm = torch.randperm(k, generator=g).to(torch.int32).to(device) if perm else None
        scheme = "absmax" if kind == "fixed" else "minmax"
        self.codes, self.scales, third = ops.quantize(w, fmt, group_size, scheme, kind, dtype, self.perm)
        self.zeros, self.offsets = (third if kind == "zeros" else None), (third if kind == "offsets" else None)
        self.levels, self.fixed = by_column(fmt, k)
        self.group = torch.arange(k) // group_size

    @property
    def args(self):
        return (self.codes, self.scales, self.zeros, self.offsets, self.perm, self.fmt, self.k, self.group_size)

    def q(self):
        return ops.unpack(self.codes, self.fmt, self.k).cpu().double()

    def values(self):
        """Dense, in stored column order, float64."""
        s = self.scales.cpu().double()[:, self.group]
        if self.offsets is not None:
            return s * self.q() + self.offsets.cpu().double()[:, self.group]
        zero = self.zeros.cpu().double()[:, self.group] if self.zeros is not None else self.fixed
        return s * (self.q() - zero)

    def stored(self, g):
        g = g.cpu().double()
        return g if self.perm is None else g[:, self.perm.cpu().long()]


class PlainAdam:
    """The written rule with gradients from torch.autograd; scale and zero or offset in float64. What a gradient is formed of is
    as it is stored, rounded to 16 bits or not."""

    def __init__(self, w):
        self.w, self.t = w, 0
        self.s = w.scales.cpu().double()
        self.shift = None if w.kind == "fixed" else (w.zeros if w.kind == "zeros" else w.offsets).cpu().double()
        self.moments = [torch.zeros_like(self.s) for _ in range(4)]
        self.levels = w.levels[:: w.group_size][: self.s.shape[1]]

    def step(self, grad, lr, beta1, beta2, eps):
        w, group = self.w, self.w.group
        self.t += 1
        s = self.s.clone().requires_grad_()
        # The shift of a group's values, as a variable of its own.
        a = torch.zeros_like(s).requires_grad_()
        zero = w.fixed if w.kind == "fixed" else 0.0 if w.kind == "offsets" else w.zeros.cpu().double()[:, group]
        base = self.shift[:, group] if w.kind == "offsets" else 0.0
        dense = s[:, group] * (w.q() - zero) + base + a[:, group]
        (dense * w.stored(grad)).sum().backward()
        steps = []
        for i, g in enumerate((s.grad, a.grad)):
            m = self.moments[2 * i] = beta1 * self.moments[2 * i] + (1 - beta1) * g
            v = self.moments[2 * i + 1] = beta2 * self.moments[2 * i + 1] + (1 - beta2) * g * g
            steps.append(lr / (1 - beta1**self.t) * m / ((v / (1 - beta2**self.t)).sqrt() + eps))
        old = self.s.clone()
        step = steps[0] * 2 / (self.levels - 1)
        self.s = self.s - torch.minimum(step.abs(), old.abs() / 2) * step.sign()
        if w.kind == "offsets":
            self.shift = self.shift - steps[1]
        elif w.kind == "zeros":
            self.shift = self.shift + steps[1] / old


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fixed", "zeros", "offsets"])
@pytest.mark.parametrize("fmt", ["sign", "ternary", "uint2", "uint4", "uint7", "uint8", MIXED])
def test_four_steps_are_adam_on_the_gradients_of_scale_and_shift(fmt, kind, dtype, device):
    w = Weight(fmt, kind, dtype, perm=kind != "zeros", device=device)
    state, plain = ops.affine_state(*w.args), PlainAdam(w)
    parts = 1 if kind == "fixed" else 2
    assert state.shape == (N, 7, parts * (2 if dtype == torch.float32 else 3)) and state.dtype == torch.float32
    for t in range(1, 5):
        g = torch.Generator().manual_seed(t)
        grad = torch.randn(N, 2 * K, generator=g)[:, ::2].to([torch.float32, torch.bfloat16, torch.float64][t % 3])
        w.codes.copy_(ops.pack((torch.rand(N, K, generator=g) * w.levels).to(torch.uint8).to(device), fmt))
        plain.step(grad, 0.01, 0.8, 0.9, 1e-8)
        ops.affine_adamw_(*w.args, grad.to(device), state, 0.01, 0.8, 0.9, 1e-8, 1 - 0.8**t, 1 - 0.9**t)
    # Sums of 32 products in float32, divided by a root of their squares; then one rounding to the type of the scales.
    unit = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(w.scales.cpu().double(), plain.s, rtol=3e-4 + unit, atol=2e-5)
    if kind != "fixed":
        shift = (w.zeros if kind == "zeros" else w.offsets).cpu().double()
        torch.testing.assert_close(shift, plain.shift, rtol=3e-4 + unit, atol=2e-3 if kind == "zeros" else 5e-5)
    torch.testing.assert_close(state[:, :, 0].cpu().double(), plain.moments[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(state[:, :, 1].cpu().double(), plain.moments[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_factor_maximize_and_numbers_in_memory_are_the_plain_call(device):
    grad, results = torch.randn(N, K, device=device), []
    for call in (
        lambda w, s: ops.affine_adamw_(*w.args, grad, s, 0.01, bias_correction1=0.1, bias_correction2=0.25),
        lambda w, s: ops.affine_adamw_(
            *w.args, grad * -4, s, 0.01, bias_correction1=0.1, bias_correction2=0.25, maximize=True,
            grad_factor=torch.tensor([0.25], device=device),
        ),
        lambda w, s: ops.affine_adamw_(*w.args, grad, s, 0.0, numbers=torch.tensor([0.01, 0.1, 0.25], device=device)),
    ):  # fmt: skip
        w = Weight("uint4", device=device)
        state = ops.affine_state(*w.args)
        call(w, state)
        results.append((w.scales.cpu(), w.offsets.cpu(), state.cpu()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_broken_elements_count_as_nothing_and_groups_of_them_rest(device):
    w, clean = Weight("uint4", device=device), Weight("uint4", device=device)
    grad = torch.randn(N, K, device=device)
    grad[:, 3] = 0
    broken = grad.clone()
    broken[:, 3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0**63, -(2.0**63)], device=device)
    states = [ops.affine_state(*x.args) for x in (w, clean)]
    ops.affine_adamw_(*clean.args, grad, states[1], 0.01)
    ops.affine_adamw_(*w.args, broken, states[0], 0.01)
    assert torch.equal(w.scales, clean.scales) and torch.equal(w.offsets, clean.offsets)
    assert torch.equal(states[0], states[1])
    before = w.scales.clone(), w.offsets.clone(), states[0].clone()
    ops.affine_adamw_(*w.args, grad * float("nan"), states[0], 0.01)  # a factor that skips the whole step
    assert all(torch.equal(a, b) for a, b in zip((w.scales, w.offsets, states[0]), before))
    w.scales[0, 0], w.scales[1, 1] = 0.0, float("inf")
    before = w.scales.clone(), w.offsets.clone()
    ops.affine_adamw_(*w.args, grad, states[0], 0.01)
    assert torch.equal(w.scales[0, 0], before[0][0, 0]) and torch.equal(w.scales[1, 1], before[0][1, 1])
    assert torch.equal(w.offsets[0, 0], before[1][0, 0]) and not torch.equal(w.offsets[0, 1:], before[1][0, 1:])


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_keeps_its_sign_and_16_bit_scales_take_steps_far_below_their_unit(device):
    w = Weight("uint4", "fixed", device=device)
    w.scales[0] *= -1
    sign, size = w.scales.sign().clone(), w.scales.abs().clone()
    ops.affine_adamw_(*w.args, torch.randn(N, K, device=device), ops.affine_state(*w.args), 1e3)
    assert torch.equal(w.scales.sign(), sign)
    ratio = w.scales.abs() / size  # halved, or grown by a half
    assert bool((((ratio - 0.5).abs() < 1e-6) | ((ratio - 1.5).abs() < 1e-6)).all())
    w = Weight("uint4", "fixed", torch.bfloat16, device=device)
    state, before = ops.affine_state(*w.args), w.scales.float()
    q = ops.unpack(w.codes, "uint4", K).float() - 8
    for t in range(1, 101):
        ops.affine_adamw_(*w.args, q, state, 7.5e-4, 0.9, 0.999, 1e-8, 1 - 0.9**t, 1 - 0.999**t)
    # 100 steps of 1e-4 where a unit of bfloat16 is 2e-3.
    torch.testing.assert_close(w.scales.float(), before - 1e-2, rtol=2**-8, atol=1e-4)
    w.scales.copy_(before * 2)  # written by somebody else: taken as it is
    ops.affine_adamw_(*w.args, q, state, 0.0)
    assert torch.equal(w.scales.float(), (before * 2).bfloat16().float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fixed", "zeros", "offsets"])
@pytest.mark.parametrize("fmt", ["sign", "ternary", "uint3", "uint8", MIXED])
def test_a_wide_grid_has_the_values_of_the_weight_and_room_on_both_sides(fmt, kind, device):
    w = Weight(fmt, kind, perm=True, device=device)
    codes, residual, scales, zeros = ops.widen(*w.args)
    fine = codes.cpu().double() * 256 + residual.cpu().double()
    zero = zeros.cpu().double()[:, w.group] * 256 + 127.5
    step = scales.cpu().double()[:, w.group] / 256
    # The zero of the wide grid is a float32 of 2^15 cells: its rounding is a hundredth of a cell.
    assert bool(((step * (fine - zero) - w.values()).abs() <= 0.02 * step).all())
    torch.testing.assert_close(step * 64, w.scales.cpu().double()[:, w.group])
    room = torch.minimum(fine - 64 * w.q(), 65535 - (fine + 64 * (w.levels - 1 - w.q()))) / 64
    assert room.min() >= 383


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kind, scheme", [("fixed", "absmax"), ("fixed", "absmean"), ("zeros", "minmax"), ("offsets", "minmax")]
)
@pytest.mark.parametrize("fmt", ["uint2", "uint4", "uint8"])
def test_a_step_on_a_wide_grid_is_unclamped_and_lands_on_a_grid_chosen_for_it(fmt, kind, scheme, device):
    count, total, want = 200, 0.0, None
    grad = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(device) - 0.5
    for seed in range(count):
        w = Weight(fmt, kind, perm=True, device=device)
        want = w.values() - 0.3 * w.stored(grad)  # far beyond the ends of the old grid
        codes, residual, scales, zeros = ops.widen(*w.args)
        ops.packed_sgd_(codes, scales, zeros, None, w.perm, "uint8", K, SIZE, grad, None, None, 0.3, seed=2 * seed,
                        residual=residual, residual_bits=8)  # fmt: skip
        old = w.scales.cpu().double()[:, w.group]
        ops.regrid_(*w.args, codes, residual, scheme, 2 * seed + 1, 3)
        dense = torch.empty(N, K).index_copy_(1, w.perm.cpu().long(), want.float()).to(device)
        _, best, third = ops.quantize(dense, fmt, SIZE, scheme, kind, None, w.perm)
        # A value is off by a cell of the fine grid at most, 1/64 of an old level; so is the range of a group on either side.
        cell = old[:, ::SIZE] / 64
        levels = w.levels[::SIZE]
        allowed = cell * (2 if scheme == "absmean" else 2 / (levels - 1) * (levels - 1 if kind == "fixed" else 1)) + 1e-5
        assert bool(((w.scales.cpu().double() - best.cpu().double()).abs() <= allowed).all())
        if kind == "offsets":
            assert bool(((w.offsets.cpu() - third.cpu()).double().abs() <= cell + 1e-5).all())
        got, level = w.values(), w.scales.cpu().double()[:, w.group]
        inside = (w.q() > 0) & (w.q() < w.levels - 1)
        assert bool(((got - want).abs() <= level + old / 64 + 1e-5)[inside].all())
        total = total + got
    if scheme == "minmax" and kind == "offsets":  # nothing is clamped: the mean is the step
        spread = (old / 64 + level) / 2
        assert bool(((total / count - want).abs() <= 6 * spread / math.sqrt(count) + old / 64).all())


@pytest.mark.parametrize("device", DEVICES)
def test_groups_of_one_value_keep_it_and_blocks_of_rows_round_for_themselves(device):
    w = Weight("uint4", device=device)
    w.scales[:, 0], w.offsets[:, 0] = 0.0, 0.7
    codes, residual, scales, zeros = ops.widen(*w.args)
    assert bool(zeros.isfinite().all())
    ops.regrid_(*w.args, codes, residual, "minmax", 1, 2)
    torch.testing.assert_close(w.values()[:, :SIZE], torch.full((N, SIZE), 0.7, dtype=torch.float64), rtol=1e-6, atol=0)
    # More elements than are decoded at a time.
    rows, k = 1100, 1024
    big = Weight("uint2", n=rows, k=k, group_size=1024, device=device)
    big.codes.copy_(big.codes[:1].expand_as(big.codes).clone())
    big.scales.copy_(big.scales[:1].expand_as(big.scales).clone())
    big.offsets.copy_(big.offsets[:1].expand_as(big.offsets).clone())
    wide = list(ops.widen(*big.args))
    wide[1] ^= torch.randint(0, 2, (k,), dtype=torch.uint8, device=device) * 16  # between levels, so that rounding decides
    ops.regrid_(*big.args, wide[0], wide[1], "minmax", 1, 2)
    assert not torch.equal(big.codes[0], big.codes[1024]) and not torch.equal(big.codes[0], big.codes[1])


def test_empty_matrices_are_allowed_and_wrong_arguments_are_named():
    for n, k in ((0, 8), (3, 0)):
        args = (torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, -(-k // 4)), None, None, None, "uint4", k, 4)
        state = ops.affine_state(*args)
        ops.affine_adamw_(*args, torch.zeros(n, k), state, 0.1)
        codes, residual, _, _ = ops.widen(*args)
        ops.regrid_(*args, codes, residual, "absmax")
    w = Weight("uint4")
    state, grad = ops.affine_state(*w.args), torch.zeros(N, K)
    for text, call in {
        "grad is": lambda: ops.affine_adamw_(*w.args, grad[:, 1:], state, 0.1),
        "state is": lambda: ops.affine_adamw_(*w.args, grad, state[:, :, :2], 0.1),
        "lr is -1": lambda: ops.affine_adamw_(*w.args, grad, state, -1.0),
        "beta1 is 1": lambda: ops.affine_adamw_(*w.args, grad, state, 0.1, 1.0),
        "bias corrections are 0": lambda: ops.affine_adamw_(*w.args, grad, state, 0.1, bias_correction1=0.0),
        "grad_factor is not": lambda: ops.affine_adamw_(*w.args, grad, state, 0.1, grad_factor=torch.zeros(2)),
        "wide_codes is": lambda: ops.regrid_(*w.args, torch.zeros(N, K), torch.zeros(N, K, dtype=torch.uint8)),
        "offsets is": lambda: ops.affine_state(w.codes, w.scales, None, w.offsets.half(), *w.args[4:]),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()


def test_opcheck_accepts_the_ops():
    w = Weight("uint4", perm=True)
    state, tests = ops.affine_state(*w.args), ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.affine_state.default, w.args, test_utils=tests)
    torch.library.opcheck(ops.affine_adamw_.default, (*w.args, torch.randn(N, K), state, 0.1), test_utils=tests)
    torch.library.opcheck(ops.widen.default, w.args, test_utils=tests)
    codes, residual, _, _ = ops.widen(*w.args)
    torch.library.opcheck(ops.regrid_.default, (*w.args, codes, residual), test_utils=tests)
