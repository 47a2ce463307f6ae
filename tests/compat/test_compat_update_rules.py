"""The update rules of the old parameter classes (SEED_API sections 5, 6.2, 11) beside transcriptions in plain PyTorch, float64.

The transcriptions know the formulas and layouts, and none of our code. Where a rule ends on codes, each has to be a neighbour of
the exact result.
"""

import math

import pytest
import torch

from test_compat_mpq import layer_of, words_of


def codes_of(words, bits, k):
    """GPTQ rows back to codes [k, n]: code of row r in word r * b // 32 at shift r mod (32 / b) * b."""
    r = torch.arange(k)
    return (words.long()[r * bits // 32] % 2**32 >> (r * bits % 32)[:, None]) % 2**bits


def zeros_of(words, bits, n):
    """Packed (z - 1) along columns back to z [Gr, n]."""
    return codes_of(words.t(), bits, n).t() + 1


class PlainMPQ:
    """Section 6.2 with the corrections of M1 to M4: zeros over the scale, rounded, and codes on the new zeros."""

    def __init__(self, layer, bits, whole_zeros):
        self.layer, self.bits, self.whole = layer, bits, whole_zeros
        self.k, self.n = layer.in_channels if hasattr(layer, "in_channels") else layer.g_idx.numel(), layer.scales.shape[1]
        self.m = self.v = torch.zeros(self.k, self.n, dtype=torch.float64)
        self.t = 0

    def parts(self):
        q = self.layer.qweight
        codes = codes_of(q.detach(), self.bits, self.k)
        zeros = zeros_of(q.zeros, self.bits, self.n).double() if self.whole else q.zeros.double()
        return codes, q.scales.double(), zeros, q.g_idx.long()

    def step(self, g, lr, beta1, beta2, eps, correct_bias, weight_decay):
        """(exact codes on the new zeros, new zeros before rounding), from what the layer holds."""
        codes, s, z, groups = self.parts()
        w = s[groups] * (codes - z[groups]) if self.whole else codes * s[groups] - z[groups]
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g.double()
        self.v = beta2 * self.v + (1 - beta2) * g.double() ** 2
        eta = lr * math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t) if correct_bias else lr
        step = eta * self.m / (self.v.sqrt() + eps)
        w = (w - step) * (1 - lr * weight_decay)
        if self.t % 5 == 0:
            mean = torch.stack([step[groups == i].mean(0) for i in range(len(s))])
            z = (z + mean / s).round().clamp(1, 2**self.bits) if self.whole else z + mean
        exact = w / s[groups] + z[groups] if self.whole else (w + z[groups]) / s[groups]
        return exact.clamp(0, 2**self.bits - 1), z


@pytest.mark.parametrize("correct_bias, weight_decay", [(True, 0.0), (False, 0.4)])
@pytest.mark.parametrize("mode", ["sym", "asym", "gptq", "gptq in any order"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_eleven_steps_of_mpq_are_the_written_rule(bits, mode, correct_bias, weight_decay):
    layer, _ = layer_of(64, 32, bits, 16, mode == "asym", gptq=mode.startswith("gptq"))
    if mode == "gptq in any order":
        layer.g_idx = layer.qweight.g_idx = (torch.arange(64) // 16)[torch.randperm(64)].to(torch.int32)
    q, plain = layer.qweight, PlainMPQ(layer, bits, mode != "sym")
    state = {"exp_avg_s": torch.zeros(64, 32), "exp_avg_l": torch.zeros(64, 32), "step": torch.zeros(1)}
    for t in range(1, 12):
        g = torch.randn(64, 32)
        before = plain.parts()[2]
        exact, zeros = plain.step(g, 0.02, 0.8, 0.9, 1e-6, correct_bias, weight_decay)
        options = dict(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=weight_decay, correct_bias=correct_bias)
        type(q).update(q, **state, **options, grad=g)
        assert int(state["step"]) == t
        torch.testing.assert_close(state["exp_avg_l"].double(), plain.m, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_s"].double(), plain.v, rtol=1e-5, atol=1e-6)
        codes, _, now, groups = plain.parts()
        if plain.whole:  # rounded stochastically: one of the two neighbours of the exact zero
            assert bool(((now - zeros).abs() <= 1).all()) and (t % 5 == 0 or torch.equal(now, before))
            exact = (exact + (now - zeros)[groups]).clamp(0, 2**bits - 1) if t % 5 == 0 else exact
            inside = (exact > 0) & (exact < 2**bits - 1)
        else:
            torch.testing.assert_close(now, zeros, rtol=1e-5, atol=1e-6)
            inside = torch.ones_like(exact, dtype=torch.bool)
        assert bool(((codes - exact).abs() < 1 + 1e-3)[inside].all())
        assert q.dtype == torch.int32 and layer.qweight is q


def test_mpq_takes_the_privileged_gradient_and_a_projectors_space():
    class Projector:  # r = g B, back r B^T
        def __init__(self, k, n):
            self.basis = torch.linalg.qr(torch.randn(n, 6)).Q

        def project_back(self, r):
            return r @ self.basis.t()

    layer, w = layer_of(64, 32, 8, 64, False)
    q, projector = layer.qweight, Projector(64, 32)
    q.privileged_grad = torch.randn(64, 32) @ projector.basis
    state = {"exp_avg_s": torch.zeros(64, 6), "exp_avg_l": torch.zeros(64, 6), "step": torch.zeros(1)}
    type(q).update(q, **state, lr=0.05, beta1=0.8, beta2=0.9, correct_bias=True, projector=projector)
    g = q.privileged_grad.double()
    m, v = 0.2 * g, 0.1 * g * g
    step = 0.05 * math.sqrt(0.1) / 0.2 * (m / (v.sqrt() + 1e-6)) @ projector.basis.double().t()
    got = codes_of(q.detach(), 8, 64) * layer.scales.double() - layer.zeros.double()
    want = w - step
    inside = (codes_of(q.detach(), 8, 64) > 0) & (codes_of(q.detach(), 8, 64) < 255)
    assert bool(((got - want).abs() < layer.scales.double() * 1.001)[inside].all())


@pytest.mark.parametrize("correct_bias, weight_decay", [(True, 0.0), (False, 0.3)])
def test_nbit_parameters_are_adam_on_their_values(correct_bias, weight_decay):
    from bitorch_engine.layers.qlinear.nbit import nBitLinearParameter

    q = nBitLinearParameter(torch.randint(-100, 100, (20, 30)).to(torch.int8))
    state = {"exp_avg_s": torch.zeros(20, 30), "exp_avg_l": torch.zeros(20, 30), "step": torch.zeros(1)}
    m = v = torch.zeros(20, 30, dtype=torch.float64)
    for t in range(1, 6):
        g, w = torch.randn(20, 30), q.detach().double()
        m, v = 0.8 * m + 0.2 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
        eta = 3.0 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t) if correct_bias else 3.0
        w = w - eta * m / (v.sqrt() + 1e-6)
        w = (w - 3.0 * weight_decay * w).clamp(-128, 127)
        options = dict(lr=3.0, beta1=0.8, beta2=0.9, weight_decay=weight_decay, correct_bias=correct_bias)
        nBitLinearParameter.update(q, **state, **options, grad=g)
        assert bool(((q.detach().double() - w).abs() < 1 + 1e-4).all()) and int(state["step"]) == t


@pytest.mark.parametrize("name", ["BinaryLinearParameter", "BinaryConvParameter"])
def test_binary_parameters_flip_by_the_slow_average_of_signs(name):
    from bitorch_engine.layers.qconv.binary import BinaryConvParameter
    from bitorch_engine.layers.qlinear.binary import BinaryLinearParameter

    cls = {"BinaryLinearParameter": BinaryLinearParameter, "BinaryConvParameter": BinaryConvParameter}[name]
    w = torch.randint(1, 100, (12, 17)) * torch.where(torch.rand(12, 17) < 0.5, -1, 1)
    q = cls(w.to(torch.int8))
    start = cls.initial_state(q, torch.zeros(12, 17), torch.float64)
    s = start["exp_avg_s"].clone()
    assert bool((s * w.sign() <= 0).all()) and s.abs().max() < 1e-3
    fast, w = torch.zeros(12, 17, dtype=torch.float64), w.double()
    state = {**start, "step": torch.zeros(1)}
    flips = 0
    for t in range(1, 15):
        g = torch.randn(12, 17).double()
        fast = fast + (1 - 0.7) * (g - fast)
        s = s + (1 - 0.9) * (1e-2 * fast.sign() - s)
        u = torch.where(-s >= 0, 1.0, -1.0).double()
        flips += int((u != w.sign()).sum())
        w = torch.where(u != w.sign(), -w, w)
        cls.update(q, **state, lr=1e-2, beta1=0.7, beta2=0.9, eps=9.0, weight_decay=9.0, correct_bias=True, grad=g)
        assert torch.equal(q.detach().double(), w) and int(state["step"]) == t
        torch.testing.assert_close(state["exp_avg_s"], s)
    assert flips > 50


@pytest.mark.parametrize("kind", ["packed", "bool"])
def test_embedding_parameters_follow_the_average_of_the_signs_of_their_rows(kind):
    """s += (1 - beta2) (lr sign(g) - s) and w := -sign(s) on active rows (E4, E5 corrected); nothing else is touched."""
    from bitorch_engine.layers.qembedding.binary import BinaryEmbeddingParameter
    from bitorch_engine.layers.qembedding.binary.layer import BinaryEmbeddingParameter as same

    assert same is BinaryEmbeddingParameter
    v, d = 9, 24
    bits = torch.rand(v, d) < 0.5
    weights = (bits.view(v, d // 8, 8).long() << torch.arange(8)).sum(2)
    q = BinaryEmbeddingParameter(bits.clone() if kind == "bool" else weights.to(torch.uint8), requires_grad=False)
    s = (torch.rand(v, d) - 0.5) * 1e-2
    state, w = {"exp_avg_s": s.clone(), "step": torch.zeros(1)}, torch.where(bits, 1.0, -1.0)
    s = s.double()
    for t in range(1, 10):
        rows = torch.randperm(v)[:3].sort().values
        positive = torch.rand(3, d) < 0.5  # the gradient's bits
        value = 1e-2 * torch.where(positive, 1.0, -1.0).double()
        s[rows] = s[rows] + (1 - 0.8) * (value - s[rows])
        w[rows] = torch.where(s[rows] > 0, -1.0, 1.0)
        packed = (positive.view(3, d // 8, 8).long() << torch.arange(8)).sum(2).to(torch.uint8)
        grad = torch.sparse_coo_tensor(rows[None], positive if kind == "bool" else packed, q.shape, check_invariants=True)
        BinaryEmbeddingParameter.update(q, **state, lr=1e-2, beta2=0.8, grad=grad.coalesce() if kind == "packed" else grad)
        now = q.detach() if kind == "bool" else (q.detach()[:, :, None] >> torch.arange(8) & 1).view(v, d).bool()
        assert torch.equal(torch.where(now, 1.0, -1.0), w) and int(state["step"]) == t
        torch.testing.assert_close(state["exp_avg_s"].double(), s, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_gradients_move_no_integer_parameter(value):
    from bitorch_engine.layers.qlinear.binary import BinaryLinearParameter
    from bitorch_engine.layers.qlinear.nbit import nBitLinearParameter

    for cls in (BinaryLinearParameter, nBitLinearParameter):
        q = cls(torch.randint(1, 100, (6, 8), dtype=torch.int8) * torch.where(torch.rand(6, 8) < 0.5, -1, 1).to(torch.int8))
        g = torch.randn(6, 8)
        g[2] = value
        state = {"exp_avg_s": torch.zeros(6, 8), "exp_avg_l": torch.zeros(6, 8), "step": torch.zeros(1)}
        before = q.detach().clone()
        cls.update(q, **state, lr=5.0, beta1=0.5, beta2=0.5, correct_bias=False, grad=g)
        assert torch.equal(q.detach()[2], before[2]) and not torch.equal(q.detach(), before)
        assert all(t.isfinite().all() and not t[2].any() for name, t in state.items() if name != "step")
    layer, _ = layer_of(32, 32, 4, 32, False)
    q = layer.qweight
    state = {"exp_avg_s": torch.zeros(32, 32), "exp_avg_l": torch.zeros(32, 32), "step": torch.zeros(1)}
    before, g = q.detach().clone(), torch.randn(32, 32)
    g[4, 7] = value
    with pytest.raises(ValueError, match="mpq_update_: grad.* expected finite"):
        type(q).update(q, **state, grad=g)
    assert torch.equal(q.detach(), before) and not state["exp_avg_l"].any()


def test_the_packing_of_these_tests_is_that_of_the_others():
    codes = torch.randint(0, 16, (64, 5))
    assert torch.equal(codes_of(words_of(codes, 4), 4, 64), codes)
