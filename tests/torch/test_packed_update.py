"""packed_adamw_, packed_sign_, packed_sgd_ through the dispatcher, against the written formulas in float64.

The oracle knows the formulas of subbyte/ops/packed_update/packed_update.h and nothing of our code but unpack. A step is compared by
its rounding: the code lands on one of the two neighbours of the exact result, and the mean of many seeds is the exact result.
"""

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
FORMATS = ["sign", "ternary", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8", "uint8*64+uint3*64+sign*70"]
MOMENTS = ["float32", "bfloat16", "8bit", "4bit"]
K = 198


def levels_of(fmt, k=K):
    parts = [(p.split("*")[0], int(p.split("*")[1])) for p in fmt.split("+")] if "*" in fmt else [(fmt, k)]
    known = {"sign": (2, 0.5), "ternary": (3, 1.0)}
    pairs = [known.get(f) or (2 ** int(f[4:]), 2.0 ** (int(f[4:]) - 1)) for f, count in parts for _ in range(count)]
    return torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs]).double()


class Weight:
    """A packed matrix [n, K], and what its codes mean in float64: w = scale * (q - zero)."""

    def __init__(self, fmt, zero_kind="offsets", n=6, k=K, group_size=32, perm=False, device="cpu", seed=0, residual_bits=0):
        g = torch.Generator().manual_seed(seed)
        self.fmt, self.k, self.group_size, self.residual_bits = fmt, k, group_size, residual_bits
        source = torch.randn(n, k, generator=g)
        self.perm = torch.randperm(k, generator=g).to(torch.int32).to(device) if perm else None
        scheme = "absmax" if zero_kind == "fixed" else "minmax"
        self.codes, self.scales, third = ops.quantize(source.to(device), fmt, group_size, scheme, zero_kind, None, self.perm)
        self.zeros = third if zero_kind == "zeros" else None
        self.offsets = third if zero_kind == "offsets" else None
        self.residual = None
        if residual_bits:
            low = torch.randint(2**residual_bits, (n, k), generator=g, dtype=torch.uint8)
            self.residual = ops.pack(low.to(device), f"uint{residual_bits}" if residual_bits > 1 else "sign")
        levels, fixed = levels_of(fmt, k)
        group = torch.arange(k) // group_size
        self.scale = self.scales.cpu().double()[:, group]
        if self.offsets is not None:
            self.zero = -self.offsets.cpu().double()[:, group] / self.scale
        else:
            self.zero = self.zeros.cpu().double()[:, group] if self.zeros is not None else fixed.expand(n, k)
        span = 2.0**residual_bits
        self.scale, self.zero, self.top = self.scale / span, self.zero * span + (span - 1) / 2, levels * span - 1

    @property
    def args(self):
        return (self.codes, self.scales, self.zeros, self.offsets, self.perm, self.fmt, self.k, self.group_size)

    def q(self):
        high = ops.unpack(self.codes, self.fmt, self.k).cpu().double()
        if not self.residual_bits:
            return high
        low = ops.unpack(self.residual, f"uint{self.residual_bits}" if self.residual_bits > 1 else "sign", self.k)
        return high * 2**self.residual_bits + low.cpu().double()


def moment(kind, n=6, k=K, device="cpu"):
    if kind is None:
        return None, None
    blocks = torch.zeros(n, -(-k // 256), device=device)
    if kind == "8bit":
        return torch.zeros(n, k, dtype=torch.uint8, device=device), blocks
    if kind == "4bit":
        return torch.zeros(n, -(-k // 2), dtype=torch.uint8, device=device), blocks
    return torch.zeros(n, k, dtype=getattr(torch, kind), device=device), None


def value_of(m, absmax, k, signed):
    """A moment in float64 by the written formula."""
    if absmax is None:
        return m.cpu().double()
    four = m.shape[1] != k
    code = ops.unpack(m, "uint4", k).cpu().double() if four else m.cpu().double()
    unit = absmax.cpu().double().repeat_interleave(256, 1)[:, :k]
    half = 8 if four else 128
    magnitude = code % half if signed else code
    value = unit * grid(four, signed)[magnitude.long()]
    return torch.where(code >= half, -value, value) if signed else value


def grid(four, signed):
    """Values of the codes of a magnitude, absmax = 1: (t - 1) / (2^R - 1), t = 2^(code / n) with straight lines between powers."""
    per_octave, octaves, bits = (1, 7 if signed else 15, 4) if four else (8, 15 if signed else 31, 8)
    code = torch.arange(2 ** (bits - signed), dtype=torch.float64)
    t = 2.0 ** (code / per_octave).floor() * (1 + (code % per_octave) / per_octave)
    return (t - 1) / (2.0**octaves - 1)


def stored_gradient(w, grad):
    g = grad.cpu().double()
    return g if w.perm is None else g[:, w.perm.cpu().long()]


def adamw_oracle(w, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """(new codes before rounding, m, v) by torch.optim.AdamW's formula; m and v from before as stored."""
    g, q = stored_gradient(w, grad), w.q()
    value = w.scale * (q - w.zero)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**t) + eps
    value = value * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / denominator
    return value / w.scale + w.zero, m, v


def sign_oracle(w, grad, m, lr, beta1, beta2, threshold, weight_decay):
    g, value = stored_gradient(w, grad), w.scale * (w.q() - w.zero)
    mixed = beta1 * m + (1 - beta1) * g
    step = torch.where(mixed.abs() > threshold, mixed.sign(), 0.0)
    value = value * (1 - lr * weight_decay) - lr * step
    return value / w.scale + w.zero, beta2 * m + (1 - beta2) * g


def sgd_oracle(w, grad, m, lr, momentum, dampening, nesterov, weight_decay):
    value = w.scale * (w.q() - w.zero)
    g = stored_gradient(w, grad) + weight_decay * value
    step = m = momentum * m + (1 - dampening) * g
    if nesterov:
        step = g + momentum * m
    return (value - lr * step) / w.scale + w.zero, m


def assert_rounded(w, exact):
    """Each code is a neighbour of the exact result, or the end of the range. The slack is float32's."""
    got, zero = w.q(), torch.zeros(())
    slack = 2e-4 * (1 + exact.abs())
    low = torch.minimum(torch.maximum((exact - slack).floor(), zero), w.top)
    high = torch.minimum(torch.maximum((exact + slack).ceil(), zero), w.top)
    assert bool(((got >= low) & (got <= high)).all())


def assert_moment(got, want, kind, m, absmax, signed):
    if kind == "float32":
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-8)
    elif kind == "bfloat16":
        assert bool(((got - want).abs() <= want.abs() * 2**-7 + 2e-8).all())
    else:
        # One step of the grid at the value.
        unit = absmax.cpu().double().repeat_interleave(256, 1)[:, : want.shape[1]].contiguous()
        values = grid(kind == "4bit", signed)
        part = want.abs() / unit.clamp_min(1e-300)
        code = (torch.searchsorted(values, part.contiguous(), right=True) - 1).clamp(0, len(values) - 2)
        slack = unit * (values[code + 1] - values[code]) * 1.001
        assert bool(((got - want).abs() <= slack + 2e-8).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_kind", ["fixed", "zeros", "offsets"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_three_steps_of_each_rule_are_the_written_formula_up_to_rounding(fmt, zero_kind, device):
    index = FORMATS.index(fmt) + 3 * ["fixed", "zeros", "offsets"].index(zero_kind)
    for rule in ("adamw", "sign", "sgd"):
        kind, second = MOMENTS[index % 4], MOMENTS[(index // 2 + 1) % 4]
        dtype = [torch.float32, torch.bfloat16, torch.float16][index % 3]
        w = Weight(fmt, zero_kind, perm=index % 2 == 0, device=device, seed=index, residual_bits=[0, 0, 6, 1][index % 4])
        m, m_absmax = moment(kind, device=device)
        v, v_absmax = moment(second, device=device)
        tail = dict(residual=w.residual, residual_bits=w.residual_bits)
        for t in (1, 2, 3):
            g = torch.Generator().manual_seed(100 * index + t)
            grad = (torch.randn(6, 2 * K, generator=g) * 0.1).to(dtype).to(device)[:, ::2]
            before_m, before_v = value_of(m, m_absmax, K, True), value_of(v, v_absmax, K, False)
            decay = 0.1 if index % 3 else 0.0
            tail.update(seed=index, offset=t)
            if rule == "adamw":
                exact, want_m, want_v = adamw_oracle(w, grad, before_m, before_v, t, 0.05, 0.9, 0.99, 1e-8, decay)
                ops.packed_adamw_(
                    *w.args, grad, m, m_absmax, v, v_absmax, 0.05, 0.9, 0.99, 1e-8, decay, 1 - 0.9**t, 1 - 0.99**t, **tail
                )
                assert_moment(value_of(v, v_absmax, K, False), want_v, second, v, v_absmax, False)
            elif rule == "sign":
                exact, want_m = sign_oracle(w, grad, before_m, 0.07, 0.9, 0.95, 0.003, decay)
                close = (0.9 * before_m + 0.1 * stored_gradient(w, grad)).abs().sub(0.003).abs().min()
                assert close > 1e-9  # no element whose side of the threshold float32 decides
                ops.packed_sign_(*w.args, grad, m, m_absmax, 0.07, 0.9, 0.95, 0.003, decay, **tail)
            else:
                nesterov = index % 2 == 1
                dampening = 0.0 if t == 1 else 0.2
                exact, want_m = sgd_oracle(w, grad, before_m, 0.5, 0.9, dampening, nesterov, decay)
                ops.packed_sgd_(*w.args, grad, m, m_absmax, 0.5, 0.9, dampening, nesterov, decay, **tail)
            assert_rounded(w, exact)
            assert_moment(value_of(m, m_absmax, K, True), want_m, kind, m, m_absmax, True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_over_seeds_is_the_written_formula_within_six_standard_errors(device):
    for fmt, zero_kind in (("uint4", "offsets"), ("sign", "fixed"), ("ternary", "fixed"), ("uint8", "zeros")):
        w = Weight(fmt, zero_kind, n=4, k=64, device=device)
        codes, grad = w.codes.clone(), torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(device)
        exact, _, _ = adamw_oracle(w, grad, 0.0, 0.0, 1, 0.03, 0.9, 0.999, 1e-8, 0.1)
        exact = torch.minimum(torch.maximum(exact, torch.zeros(())), w.top)
        count, total = 2000, torch.zeros(4, 64, dtype=torch.float64)
        for seed in range(count):
            w.codes.copy_(codes)
            m, v = torch.zeros(4, 64, device=device), torch.zeros(4, 64, device=device)
            ops.packed_adamw_(*w.args, grad, m, None, v, None, 0.03, 0.9, 0.999, 1e-8, 0.1, 0.1, 0.001, seed=seed, offset=3)
            total += w.q()
        fraction = exact - exact.floor()
        error = (fraction * (1 - fraction) / count).sqrt() * 6 + 2e-4
        assert bool(((total / count - exact).abs() <= error).all()), fmt


@pytest.mark.parametrize("device", DEVICES)
def test_ternary_never_gets_a_fourth_code_and_nothing_moves_without_a_gradient(device):
    w = Weight("ternary", "fixed", device=device)
    before = w.codes.clone()
    for grad, moves in ((torch.zeros(6, K), False), (torch.full((6, K), float("nan")), False), (-torch.ones(6, K), True)):
        m, absmax = moment("8bit", device=device)
        v, v_absmax = moment("8bit", device=device)
        ops.packed_adamw_(*w.args, grad.to(device), m, absmax, v, v_absmax, 1e3, weight_decay=0.0)
        assert torch.equal(w.codes, before) != moves
        if not moves:
            assert not absmax.any() and not v_absmax.any()
    assert int(w.q().max()) == 2 and int(w.q().min()) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_strides_factors_numbers_and_counters_give_the_bits_of_the_plain_call(device):
    grad = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).to(device)

    def step(change):
        w = Weight("uint3", device=device)
        state = [*moment("8bit", device=device), *moment("4bit", device=device)]
        arguments = dict(grad=grad, codes=w.codes, lr=0.01, bias_correction1=0.1, bias_correction2=0.25, offset=7)
        change(arguments)
        g, codes = arguments.pop("grad"), arguments.pop("codes")
        args = (codes, *w.args[1:])
        ops.packed_adamw_(*args, g, *state, seed=3, **arguments)
        return [codes.clone(), *state]

    plain = step(lambda a: None)

    def same(change):
        return all(torch.equal(a, b) for a, b in zip(step(change), plain))

    wide = torch.full((6, 2 * K), float("nan"), device=device)
    wide[:, ::2] = grad
    assert same(lambda a: a.update(grad=wide[:, ::2]))
    assert same(lambda a: a.update(grad=grad.t().contiguous().t()))
    assert same(lambda a: a.update(grad=grad * 4, grad_factor=torch.tensor(0.25, device=device)))
    assert same(lambda a: a.update(grad=-grad, maximize=True))
    numbers = torch.tensor([0.01, 0.1, 0.25], device=device)
    assert same(lambda a: a.update(lr=5.0, bias_correction1=0.5, bias_correction2=0.5, numbers=numbers))
    assert same(lambda a: a.update(offset=2, counter=torch.tensor([5], device=device)))
    assert not same(lambda a: a.update(offset=8))

    def spread(a):
        codes = torch.zeros(6, 2 * a["codes"].shape[1], dtype=torch.uint8, device=device)
        codes[:, ::2] = a["codes"]
        a["codes"] = codes[:, ::2]

    assert same(spread)


def test_threads_do_not_change_a_bit():
    grad = torch.randn(64, 1000)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            w = Weight("uint5", n=64, k=1000)
            state = [*moment("8bit", 64, 1000), *moment("bfloat16", 64, 1000)]
            for t in range(3):
                ops.packed_adamw_(*w.args, grad, *state, 0.01, seed=1, offset=t)
            results.append([w.codes, *state[:3]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device, or a library without CUDA kernels")
def test_cuda_gives_the_bits_of_the_cpu_and_can_be_captured():
    grad = torch.randn(6, K)
    for kind in MOMENTS:
        results = []
        for device in ("cpu", "cuda"):
            w = Weight("uint3", perm=True)
            args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in w.args)
            state = [*moment(kind, device=device), *moment(kind, device=device)]
            for t in range(3):
                ops.packed_adamw_(*args, grad.to(device), *state, 0.02, seed=9, offset=t)
            results.append([a.cpu() for a in (args[0], *state) if a is not None])
        assert all(torch.equal(a, b) for a, b in zip(*results)), kind
    # A captured step counts on through numbers and counter.
    w, state = Weight("uint3", device="cuda"), [*moment("8bit", device="cuda"), *moment("8bit", device="cuda")]
    eager, eager_state = Weight("uint3", device="cuda"), [*moment("8bit", device="cuda"), *moment("8bit", device="cuda")]
    counter, numbers, g = torch.zeros(1, dtype=torch.long, device="cuda"), torch.ones(3, device="cuda") * 0.1, grad.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.packed_adamw_(*w.args, g, *state, 1.0, seed=9, numbers=numbers, counter=counter)
        counter += 1
    for t in range(3):
        graph.replay()
        ops.packed_adamw_(*eager.args, g, *eager_state, 0.1, bias_correction1=0.1, bias_correction2=0.1, seed=9, offset=t)
    assert torch.equal(w.codes, eager.codes) and torch.equal(state[0], eager_state[0])


def test_empty_matrices_are_allowed():
    for n, k in ((0, 8), (3, 0)):
        w = Weight.__new__(Weight)
        codes = torch.zeros(n, k // 2, dtype=torch.uint8)
        scales = torch.zeros(n, -(-k // 4))
        args = (codes, scales, None, None, None, "uint4", k, 4)
        ops.packed_adamw_(*args, torch.zeros(n, k), torch.zeros(n, k), None, torch.zeros(n, k), None, 0.1)
        ops.packed_sign_(*args, torch.zeros(n, k), None, None, 0.1)
        ops.packed_sgd_(*args, torch.zeros(n, k), None, None, 0.1)


ERRORS = {
    "grad is": dict(grad=torch.zeros(6, K + 1)),
    "m is uint8|m is Byte|m is unsigned char": dict(m=torch.zeros(6, K, dtype=torch.uint8)),
    "m is Double|m is double|m is float64": dict(m=torch.zeros(6, K, dtype=torch.float64)),
    "absmax of v is given": dict(v_absmax=torch.zeros(6, 1)),
    "grad_factor is": dict(grad_factor=torch.zeros(2)),
    "numbers is": dict(numbers=torch.zeros(2)),
    "counter is": dict(counter=torch.zeros(1)),
    "residual_bits is 3": dict(residual_bits=3),
    "residual is": dict(residual=torch.zeros(6, 5, dtype=torch.uint8), residual_bits=2),
    "lr is -1": dict(lr=-1.0),
    "beta1 is 1": dict(beta1=1.0),
    "eps is -1": dict(eps=-1.0),
    "bias corrections are 0": dict(bias_correction1=0.0),
}


@pytest.mark.parametrize("text", ERRORS)
def test_wrong_arguments_are_named_and_nothing_is_written(text):
    w = Weight("uint4")
    before = w.codes.clone()
    arguments = dict(grad=torch.ones(6, K), m=torch.zeros(6, K), m_absmax=None, v=torch.zeros(6, K), v_absmax=None, lr=0.1)
    arguments.update(ERRORS[text])
    with pytest.raises(ValueError, match=f"packed_adamw_: .*({text})"):
        ops.packed_adamw_(*w.args, **arguments)
    assert torch.equal(w.codes, before)


def test_codes_that_a_backward_pass_still_needs_may_not_be_updated():
    w, x = Weight("uint4", n=5), torch.randn(3, K, requires_grad=True)
    y = ops.linear(x, None, *w.args, None)
    ops.packed_sgd_(*w.args, torch.ones(5, K), None, None, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck_accepts_the_three_ops():
    w = Weight("uint4", perm=True, residual_bits=2)
    tail = dict(residual=w.residual, residual_bits=2, seed=1)
    grad, m, v = torch.randn(6, K), moment("8bit"), moment("float32")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.packed_adamw_.default, (*w.args, grad, *m, *v, 0.1), tail, test_utils=tests)
    torch.library.opcheck(ops.packed_sign_.default, (*w.args, grad, *v, 0.1), tail, test_utils=tests[:3])
    torch.library.opcheck(ops.packed_sgd_.default, (*w.args, grad, *m, 0.1, 0.9), tail, test_utils=tests[:3])
