"""Ternary ops against float64 transcriptions of their formulas: activation_quant, the decompositions, bitlinear, base 3."""

import os

import pytest
import torch

LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)
import subbyte  # noqa: E402
from subbyte import functional as F  # noqa: E402

ops = torch.ops.subbyte
OPCHECKED = {
    "activation_quant",
    "bitlinear",
    "multi_ternary_linear",
    "pack_base3",
    "ternarize",
    "ternary_decompose",
    "unpack_base3",
}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and subbyte.info()["has_cuda"] else [])
EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
pytestmark = pytest.mark.parametrize("device", DEVICES)


def normal(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def trits(*shape, dtype=torch.float32, device="cpu", seed=2):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def rounded_tokens(x, bits):
    """activation_quant in float64, from the formula."""
    q = 2 ** (bits - 1) - 1
    s = x.abs().amax(-1, keepdim=True).clamp_min(1e-5) if x.shape[-1] else x[..., :0]
    return s * torch.clamp(torch.round(x / s * q), -q, q) / q


def decomposition(w, k, method="threshold", per_channel=True, threshold=0.7):
    """The greedy decomposition, term by term, in float64 but for the roundings that ternary.h names."""
    residual, terms, gammas = w.float(), [], []
    for _ in range(k):
        r = residual.double()
        mean = r.abs().mean(-1, keepdim=True) if per_channel else r.abs().mean().expand(r.shape[0], 1)
        if method == "absmean":
            gamma = mean.float()
            t = torch.where(gamma > 0, torch.clamp(torch.round(residual / gamma), -1, 1), 0.0)
        else:
            keep = r.abs() > torch.tensor(threshold, dtype=torch.float32).double() * mean
            sums, counts = (r.abs() * keep), keep
            axis = dict(dim=-1, keepdim=True) if per_channel else {}
            gamma = sums.sum(**axis) / counts.sum(**axis).clamp_min(1)
            gamma = gamma.float() if per_channel else gamma.float().expand(r.shape[0], 1)
            t = keep * r.sign().float()
        terms.append(t.float())
        gammas.append(gamma.squeeze(-1))
        residual = residual - gamma * t
    return torch.stack(terms), torch.stack(gammas)


# ---- activation_quant


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 5, 33), (0, 4), (3, 0), (130, 257)])
def test_activation_quant_is_its_formula(device, dtype, shape):
    for bits in (2, 4, 8, 12):
        x = normal(*shape, dtype=dtype, device=device) * 3
        y = F.activation_quant(x, bits)
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(y, rounded_tokens(x, bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activation_quant_of_half_types_is_float32_rounded_once(device, dtype):
    x = normal(9, 65, dtype=dtype, device=device)
    assert torch.equal(F.activation_quant(x), rounded_tokens(x.float(), 8).to(dtype))


def test_activation_quant_takes_any_strides_and_small_tokens(device):
    x = normal(6, 10, device=device).t()
    assert torch.equal(F.activation_quant(x), rounded_tokens(x.contiguous(), 8))
    tiny = torch.tensor([[1e-7, -4e-6], [0.0, 0.0]], device=device)
    y = F.activation_quant(tiny)  # the scale stops at 1e-5
    assert torch.equal(y, rounded_tokens(tiny, 8)) and y[1].abs().max() == 0
    assert y[0, 0].item() == pytest.approx(1e-5 / 127)
    assert F.activation_quant(torch.tensor([1.0, float("nan")], device=device)).isnan().all()


def test_T2_activation_quant_refuses_one_bit_and_its_gradient_is_straight_through(device):
    x = normal(4, 9, device=device).requires_grad_()
    for bits in (1, 0, -3, 25):
        with pytest.raises(ValueError, match=f"activation_quant: bits is {bits}, expected 2 to 24"):
            F.activation_quant(x, bits)
    gy = normal(4, 9, device=device, seed=5)
    F.activation_quant(x).backward(gy)
    assert torch.equal(x.grad, gy)
    with pytest.raises(ValueError, match="no dimensions"):
        F.activation_quant(torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match="x is Int"):
        F.activation_quant(torch.ones(3, dtype=torch.int32, device=device))


def test_activation_quant_as_written_has_the_gradient_of_plain_torch(device):
    x = normal(4, 9, dtype=torch.float64, device=device)
    x[1, 3] = -x[1].abs().max() - 1
    x[3] *= 1e-7  # below the floor of the scale: no gradient at all
    gy = normal(4, 9, dtype=torch.float64, device=device, seed=5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.activation_quant(a, 8, straight_through=False).backward(gy)
    rounded_tokens(b, 8).backward(gy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)
    assert (a.grad != 0).sum(-1).tolist() == [1, 1, 1, 0]
    assert torch.equal(F.activation_quant(x, 8, straight_through=False), F.activation_quant(x, 8))


# ---- decompositions


@pytest.mark.parametrize("method", ["threshold", "absmean"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (1, 7), (16, 130)])
def test_decomposition_is_its_formula(device, method, per_channel, shape):
    w = normal(*shape, device=device)
    t, gamma = ops.ternary_decompose(w, 3, method, per_channel, 0.6)
    t64, gamma64 = decomposition(w, 3, method, per_channel, 0.6)
    assert t.dtype == torch.int8 and gamma.dtype == torch.float32
    torch.testing.assert_close(gamma, gamma64, rtol=1e-6, atol=1e-8)
    assert torch.equal(t.float(), t64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decomposition_of_other_types_and_strides(device, dtype):
    w = normal(21, 6, dtype=dtype, device=device).t()
    t, gamma = ops.ternary_decompose(w)
    t64, gamma64 = decomposition(w, 1)
    assert torch.equal(t.float(), t64)
    torch.testing.assert_close(gamma, gamma64, rtol=1e-6, atol=0)


def test_decomposition_of_zeros_and_of_nothing(device):
    for method in ("threshold", "absmean"):
        for per_channel in (True, False):
            t, gamma = ops.ternary_decompose(torch.zeros(3, 4, device=device), 2, method, per_channel)
            assert not t.any() and not gamma.any()
            for shape in ((0, 4), (3, 0)):
                t, gamma = ops.ternary_decompose(torch.zeros(shape, device=device), 2, method, per_channel)
                assert t.shape == (2, *shape) and gamma.tolist() == [[0.0] * shape[0]] * 2


def test_ties_of_the_rules_fall_to_zero(device):
    w = torch.tensor([[2.0, -0.5, 0.5, -1.0]], device=device)  # mean 1
    assert ops.ternary_decompose(w, 1, "absmean")[0].tolist() == [[[1, 0, 0, -1]]]
    assert ops.ternary_decompose(w, 1, "threshold", True, 1.0)[0].tolist() == [[[1, 0, 0, 0]]]


def test_weight_to_ternary_gives_values_and_scale_of_its_type(device):
    w = normal(6, 40, dtype=torch.bfloat16, device=device)
    t, gamma = F.weight_to_ternary(w, per_channel=True)
    assert t.dtype == gamma.dtype == torch.bfloat16 and t.shape == w.shape and gamma.shape == (6,)
    t, gamma = F.weight_to_ternary(w.double(), per_channel=False, method="absmean")
    mean = w.double().abs().mean()
    assert gamma.shape == () and gamma.item() == pytest.approx(mean.item(), rel=1e-6)
    assert torch.equal(t, torch.clamp(torch.round(w.double() / mean), -1, 1))


def test_quantization_quality_of_normal_weights(device):
    # Ternary weight networks, section 2.2: the best threshold of a normal weight keeps about 81 % of its energy.
    w = normal(8, 4096, device=device)
    t, gamma = F.weight_to_ternary(w, per_channel=True)
    error = (w - gamma[:, None] * t).square().sum() / w.square().sum()
    assert 0.17 < error < 0.21


def test_T3_greedy_decomposition_needs_a_term_and_its_error_falls_with_each(device):
    w = normal(5, 64, device=device)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="greedy_ternary_decomposition: k is"):
            F.greedy_ternary_decomposition(w, k)
    last = w.square().sum(-1)
    for k in (1, 2, 3, 4):
        t, gammas = F.greedy_ternary_decomposition(w, k)
        assert t.shape == (k, 5, 64) and gammas.shape == (k, 5) and set(t.unique().tolist()) <= {-1.0, 0.0, 1.0}
        error = (w - (gammas[..., None] * t).sum(0)).square().sum(-1)
        assert (error < last).all()
        last = error
    one, gamma = F.greedy_ternary_decomposition(w, 1)
    t, g = F.weight_to_ternary(w, per_channel=True)
    assert torch.equal(one[0], t) and torch.equal(gamma[0], g)


def test_T3_values_of_a_ternary_matrix_are_checked_on_request(device):
    w = trits(4, 6, device=device)
    w[2, 3] = 0.5
    x, gamma = normal(2, 6, device=device), torch.ones(4, device=device)
    F.bitlinear(x, w, gamma)
    for call in (lambda: F.bitlinear(x, w, gamma, check=True), lambda: F.pack_ternary(w), lambda: F.pack_ternary_base3(w)):
        with pytest.raises(ValueError, match="0.5"):
            call()
    with pytest.raises(ValueError, match=r"W\[2, 3\] is 0.5, expected -1, 0 or 1"):
        F.check_ternary(w)


def test_decomposition_refuses_what_it_cannot_mean(device):
    w = normal(3, 4, device=device)
    for call, text in (
        (lambda: ops.ternary_decompose(w[0]), "w has 1 dimensions"),
        (lambda: ops.ternary_decompose(w.int()), "w is Int"),
        (lambda: ops.ternary_decompose(w, 0), "terms is 0"),
        (lambda: ops.ternary_decompose(w, 1, "median"), "'median' is unknown"),
        (lambda: ops.ternarize(w, 1, "threshold", True, -0.1), "threshold is -0.1"),
        (lambda: F.ternary_quantize(w, -1.0), "threshold is -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    w[1, 2] = float("nan")
    if device == "cpu":
        with pytest.raises(ValueError, match=r"w\[1, 2\] is nan"):
            ops.ternary_decompose(w)
    else:  # nothing waits for the device: the row says it
        assert ops.ternary_decompose(w)[1].isnan().tolist() == [[False, True, False]]


def test_ternarize_is_the_sum_of_terms_and_passes_the_gradient(device):
    for k, method, per_channel in ((1, "absmean", False), (3, "threshold", True)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            w = normal(6, 17, dtype=dtype, device=device).requires_grad_()
            t, gamma = ops.ternary_decompose(w.detach(), k, method, per_channel)
            y = F.ternarize(w, k, method=method, per_channel=per_channel)
            expected = (t.double() * gamma.double()[..., None]).sum(0)
            torch.testing.assert_close(y.detach().double(), expected, rtol=4 * EPS[dtype] + 1e-6, atol=4 * EPS[dtype])
            gy = normal(6, 17, dtype=dtype, device=device, seed=4)
            y.backward(gy)
            assert torch.equal(w.grad, gy)


def test_absmax_scale_and_ternary_quantize(device):
    w = torch.tensor([[1.0, -4.0, 0.2], [0.0, 0.5, -0.5]], device=device)
    assert F.absmax_scale(w).item() == 4 and F.absmax_scale(w).shape == ()
    assert F.absmax_scale(w, dim=1).tolist() == [4.0, 0.5]
    assert F.absmax_scale(w, dim=-1, keepdim=True).shape == (2, 1)
    assert F.ternary_quantize(w, 0.5).tolist() == [[1, -1, 0], [0, 0, 0]]
    assert F.ternary_quantize(w, 0.1 * F.absmax_scale(w, 1, keepdim=True)).tolist() == [[1, -1, 0], [0, 1, -1]]
    assert F.ternary_quantize(w).tolist() == [[1, -1, 0], [0, 0, 0]]  # 0.7 * mean = 0.723
    big = normal(100, device=device)
    t = F.ternary_quantize(big, 0.3)
    assert torch.equal(t, torch.where(big.abs() > 0.3, big.sign(), torch.zeros_like(big)))


# ---- bitlinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 33), (2, 5, 64), (0, 9), (4, 0)])
@pytest.mark.parametrize("form", ["float", "int8", "packed"])
def test_T4_bitlinear_takes_float_int8_and_packed_weights(device, dtype, shape, form):
    n, k = 5, shape[-1]
    x, t = normal(*shape, dtype=dtype, device=device), trits(n, k, device=device)
    gamma, bias = (normal(n, device=device, seed=s).abs().to(dtype) for s in (6, 7))
    w = {"float": lambda: t.to(dtype), "int8": lambda: t.to(torch.int8), "packed": lambda: F.pack_ternary(t)}[form]()
    y = F.bitlinear(x, w, gamma, bias)
    expected = (x.double() @ t.double().t()) * gamma.double() + bias.double()
    bound = (x.double().abs() @ t.double().abs().t()) * gamma.double()
    assert y.dtype == dtype and y.shape == (*shape[:-1], n)
    # Packed scales are float32 for float64 x; sums of half products may be formed in half precision by the dense product.
    eps = max(EPS[dtype], EPS[torch.float32]) if form == "packed" else EPS[dtype]
    assert ((y.double() - expected).abs() <= (k / 8 + 16) * eps * (bound + bias.double().abs())).all()
    without = F.bitlinear(x, w, gamma)
    assert ((without.double() - (expected - bias.double())).abs() <= (k / 8 + 16) * eps * (bound + 1e-3)).all()
    assert torch.equal(F.bitlinear(x, w, gamma[None], bias), y)


def test_T1_a_vector_gives_a_vector(device):
    t, gamma = trits(4, 6, device=device), torch.ones(4, device=device)
    for w in (t, t.to(torch.int8), F.pack_ternary(t)):
        for g in (gamma, gamma[None]):
            assert F.bitlinear(normal(6, device=device), w, g).shape == (4,)
    assert F.multi_ternary_linear(normal(6, device=device), t[None], gamma[None]).shape == (4,)
    assert F.multi_ternary_linear(normal(6, device=device), F.pack_ternary(t), gamma[None]).shape == (4,)


def test_bitlinear_of_dense_weights_equals_manual_torch_bit_for_bit(device):
    x, t = normal(2, 3, 16, device=device), trits(5, 16, device=device)
    gamma, bias = normal(5, device=device, seed=3), normal(5, device=device, seed=4)
    assert torch.equal(F.bitlinear(x, t, gamma, bias), torch.nn.functional.linear(x, t) * gamma + bias)
    assert torch.equal(F.bitlinear(x, t, gamma), F.bitlinear(x, t, torch.ones(5, device=device)) * gamma)
    assert torch.equal(F.bitlinear(x, t, torch.tensor(0.5, device=device)), torch.nn.functional.linear(x, t) * 0.5)


def test_T5_a_packed_weight_is_computed_from_its_packed_form(device):
    t, gamma = trits(6, 40, device=device), normal(6, device=device).abs()
    w = F.pack_ternary(t, gamma)
    assert w.format == "ternary" and w.codes.nbytes == 6 * 10 and w.bits == 2
    assert torch.equal(w.dequantize(), t * gamma[:, None])
    x = normal(3, 40, device=device)
    called = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Spy():
        y = F.bitlinear(x, w)
    assert called.count("subbyte::linear") == 1 and "subbyte::dequantize" not in called
    torch.testing.assert_close(y, x @ (t * gamma[:, None]).t(), rtol=1e-5, atol=1e-5)
    # Integer activations: exact integers times two scales.
    q = torch.round(x * (127 / x.abs().amax(-1, keepdim=True)))
    expected = (q.double() @ t.double().t()) * (x.abs().amax(-1, keepdim=True).double() / 127) * gamma.double()
    torch.testing.assert_close(F.bitlinear(x, w, activation_bits=8).double(), expected, rtol=1e-5, atol=1e-6)


def test_bitlinear_gradients_are_those_of_the_formula(device):
    x, t = normal(3, 4, 10, dtype=torch.float64, device=device), trits(5, 10, dtype=torch.float64, device=device)
    gamma, bias = (normal(5, dtype=torch.float64, device=device, seed=s) for s in (3, 4))
    inputs = [v.clone().requires_grad_() for v in (x, t, gamma, bias)]
    assert torch.autograd.gradcheck(lambda *a: ops.bitlinear(*a), inputs)
    double = dict(dtype=torch.float64, device=device)
    multi = [normal(2, 4, **double), trits(3, 5, 4, **double), normal(3, 5, **double), bias]
    assert torch.autograd.gradcheck(lambda *a: ops.bitlinear(*a), [v.clone().requires_grad_() for v in multi])
    scalar = torch.tensor(0.5, device=device, requires_grad=True)
    F.bitlinear(x.float(), t.float(), scalar).sum().backward()
    assert scalar.grad.shape == ()


def test_gradients_of_packed_weights_elementwise(device):
    k, n, terms = 19, 5, 3
    x = normal(2, 7, k, device=device).requires_grad_()
    t = trits(terms, n, k, device=device)
    gammas = normal(terms, n, device=device, seed=3).abs().requires_grad_()
    bias = normal(n, device=device, seed=4).requires_grad_()
    w = F.pack_ternary(t).requires_grad_()
    gy = normal(2, 7, n, device=device, seed=5)
    y = F.multi_ternary_linear(x, w, gammas, bias)
    y.backward(gy)
    x64, g64, b64 = (v.detach().double().requires_grad_() for v in (x, gammas, bias))
    w64 = t.double().requires_grad_()
    y64 = sum((x64 @ w64[i].t()) * g64[i] for i in range(terms)) + b64
    y64.backward(gy.double())
    torch.testing.assert_close(y.detach().double(), y64.detach(), rtol=1e-5, atol=1e-5)
    for a, b in ((x, x64), (gammas, g64), (bias, b64)):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
    # The gradient of a packed weight is that of its values: every term's is gy^T x.
    direct = gy.double().flatten(0, -2).t() @ x64.detach().flatten(0, -2)
    torch.testing.assert_close(w.grad.double(), direct.repeat(terms, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9,), (3, 64), (0, 5), (2, 0), (40, 130)])
def test_multi_ternary_linear_equals_the_sum_of_its_terms(device, dtype, shape, bits):
    k, n, terms = shape[-1], 7, 3
    x, t = normal(*shape, dtype=dtype, device=device), trits(terms, n, k, device=device)
    gammas, bias = normal(terms, n, device=device, seed=3).abs(), normal(n, device=device, seed=4).to(dtype)
    packed = F.pack_ternary(t, gammas)
    y = F.multi_ternary_linear(x, packed, bias=bias, terms=terms, activation_bits=bits)
    source = x.float()
    if bits:
        s = source.abs().amax(-1, keepdim=True) / 127 if k else source[..., :0]
        source = torch.round(source * (127 / (s * 127))) * s
    expected = sum((source.double() @ t[i].double().t()) * gammas[i].double() for i in range(terms)) + bias.double()
    bound = sum((source.double().abs() @ t[i].double().abs().t()) * gammas[i].double() for i in range(terms))
    assert y.shape == (*shape[:-1], n) and y.dtype == dtype
    slack = (4 * terms + 8) * (EPS[dtype] + 16 * EPS[torch.float32])
    assert ((y.double() - expected).abs() <= slack * (bound + bias.double().abs())).all()
    if bits is None:
        dense = F.multi_ternary_linear(x, t.to(torch.int8), gammas, bias)
        assert ((dense.double() - expected).abs() <= 64 * EPS[dtype] * (bound + bias.double().abs())).all()


def test_multi_ternary_linear_reads_x_in_one_kernel_call(device):
    t, gammas = trits(4, 6, 40, device=device), normal(4, 6, device=device)
    x, packed, called = normal(3, 40, device=device), F.pack_ternary(t, gammas), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Spy():
        F.multi_ternary_linear(x, packed, terms=4, activation_bits=8)
    assert called == ["subbyte::multi_ternary_linear"]
    y = F.multi_ternary_linear(x, packed, terms=4, activation_bits=8)
    rows = torch.ops.subbyte.linear_a8(x, None, *packed.packed_args, None)
    torch.testing.assert_close(y, rows.unflatten(-1, (4, 6)).sum(-2))


def test_bitlinear_refuses_what_does_not_fit(device):
    x, t, gamma = normal(2, 6, device=device), trits(4, 6, device=device), torch.ones(4, device=device)
    packed = F.pack_ternary(t)
    for call, text in (
        (lambda: F.bitlinear(x[:, :5], t, gamma), "x has 5 features, the weight expects 6"),
        (lambda: F.bitlinear(x, t, gamma[:3]), r"gamma is Float \[3\]"),
        (lambda: F.bitlinear(x, packed, gamma[:3]), r"gamma is \[3\]"),
        (lambda: F.bitlinear(x, t), "gamma is missing"),
        (lambda: F.bitlinear(x, t, gamma, gamma[:2]), r"bias is Float \[2\]"),
        (lambda: F.bitlinear(x, t.int(), gamma), "W is Int"),
        (lambda: F.bitlinear(x, t[0], gamma), "W has 1 dimensions"),
        (lambda: F.bitlinear(x, t, gamma, activation_bits=8), "needs a packed W"),
        (lambda: F.bitlinear(x, packed, gamma, activation_bits=4), "activation_bits is 4"),
        (lambda: F.multi_ternary_linear(x, t, gamma), r"expected \[k, N, K\]"),
        (lambda: F.multi_ternary_linear(x, packed), "give terms"),
        (lambda: F.multi_ternary_linear(x, packed, terms=3), "terms is 3, expected at least 1 and a divisor of the 4"),
        (lambda: F.multi_ternary_linear(x, packed, terms=0), "terms is 0"),
        (lambda: F.multi_ternary_linear(x, packed, terms=2, activation_bits=4), "activation_bits is 4"),
        (lambda: F.multi_ternary_linear(x.double(), packed, terms=2, activation_bits=8), "float64"),
        (lambda: F.multi_ternary_linear(x, packed, bias=gamma, terms=2), r"bias is Float \[4\]"),
        (lambda: F.pack_ternary(t[0]), "W has 1 dimensions"),
        (lambda: F.pack_ternary(t, gamma[:3]), r"gamma is \[3\]"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# ---- base 3


@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (5,), (6,), (3, 7), (2, 3, 11), (2, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_base3_round_trip_and_bytes(device, shape, dtype):
    t = trits(*shape, dtype=dtype, device=device)
    packed, original = F.pack_ternary_base3(t)
    digits = (t.flatten().long() + 1).tolist()
    digits += [1] * (-len(digits) % 5)
    expected = [sum(d * 3**i for i, d in enumerate(digits[j : j + 5])) for j in range(0, len(digits), 5)]
    assert packed.dtype == torch.uint8 and packed.tolist() == expected and original == tuple(shape)
    back = F.unpack_ternary_base3(packed, original, dtype=dtype)
    assert back.dtype == dtype and torch.equal(back, t)
    if len(shape) == 2:
        assert torch.equal(F.unpack_ternary_base3(F.pack_ternary_base3(t.t())[0], shape[::-1], dtype=dtype), t.t())


def test_base3_refuses_other_values_bytes_and_counts(device):
    for call, text in (
        (lambda: F.pack_ternary_base3(torch.tensor([0, 2], dtype=torch.int8, device=device)), "value 2 at position 1"),
        (lambda: F.pack_ternary_base3(torch.tensor([float("nan")], device=device)), "value nan at position 0"),
        (lambda: F.pack_ternary_base3(torch.ones(3, dtype=torch.int64, device=device)), "trits is Long"),
        (lambda: F.unpack_ternary_base3(torch.tensor([243], dtype=torch.uint8, device=device), (5,)), "243"),
        (lambda: F.unpack_ternary_base3(torch.zeros(2, dtype=torch.uint8, device=device), (5,)), r"expected uint8 \[1\]"),
        (lambda: F.unpack_ternary_base3(torch.zeros(1, dtype=torch.uint8, device=device), (-1, 5)), "at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_base3_takes_a_twentieth_of_float32(device):
    saved = F.estimate_memory_savings(512, 512)
    assert saved["float32_bytes"] == 4 * 512 * 512 and saved["packed_bytes"] == 52429 + 4 * 512
    assert saved["runtime_bytes"] == 512 * 128 + 4 * 512
    assert saved["savings_bytes"] == saved["float32_bytes"] - saved["packed_bytes"]
    assert 19 < saved["compression_ratio"] < 20
    twice = F.estimate_memory_savings(512, 512, num_layers=2)
    assert twice["packed_bytes"] == 2 * saved["packed_bytes"]
    with pytest.raises(ValueError, match="num_layers is -1"):
        F.estimate_memory_savings(3, 4, -1)


# ---- the dispatcher's own checks


def opcheck_cases(device):
    x, w = normal(3, 10, device=device), normal(4, 10, device=device)
    t = trits(4, 10, device=device)
    packed = F.pack_ternary(t, torch.full((4,), 0.5, device=device))
    handle = torch.zeros((), device=device).expand(4, 10).detach().requires_grad_()
    leaf = lambda v: v.clone().requires_grad_()  # noqa: E731
    return {
        "activation_quant": [(x,), (leaf(x), 4), (leaf(x), 4, False)],
        "bitlinear": [(leaf(x), t, leaf(w[:, 0]), leaf(w[:, 1])), (x, t.to(torch.int8)[None], w[None, :, 0])],
        "multi_ternary_linear": [
            (x, None, *packed.packed_args, 2),
            (leaf(x), handle, packed.codes, leaf(packed.scales), *packed.packed_args[2:], 2, leaf(w[:2, 0])),
            (leaf(x), handle, *packed.packed_args, 1, leaf(w[:, 0]), 8),
        ],
        "pack_base3": [(t,), (t.to(torch.int8),)],
        "ternarize": [(w,), (leaf(w), 2, "threshold", True)],
        "ternary_decompose": [(w,), (w, 2, "absmean", False)],
        "unpack_base3": [(F.pack_ternary_base3(t)[0], [4, 10])],
    }


def test_what_means_nothing_is_a_value_error(device):
    with pytest.raises(ValueError, match="absmax_scale: W is \\[0, 3\\], expected elements"):
        F.absmax_scale(torch.zeros(0, 3, device=device))
    with pytest.raises(ValueError, match="absmax_scale: W is \\[2, 0\\], expected elements along 1"):
        F.absmax_scale(torch.zeros(2, 0, device=device), dim=1)
    with pytest.raises(ValueError, match="ternary_quantize: W is torch.int32, expected floating point"):
        F.ternary_quantize(torch.ones(2, 2, dtype=torch.int32, device=device))
    gamma = torch.tensor([1.0, torch.nan], device=device)
    with pytest.raises(ValueError, match="pack_ternary: gamma holds nan, expected finite"):
        F.pack_ternary(trits(2, 5, device=device), gamma)
    assert F.pack_ternary(trits(2, 5, device=device), gamma, check=False).scales.isnan().sum() == 1


@pytest.mark.parametrize("name", sorted(OPCHECKED))
def test_opcheck(device, name):
    for case in opcheck_cases(device)[name]:
        torch.library.opcheck(getattr(ops, name).default, case)


def test_compiled_training_step_equals_eager(device):
    torch._dynamo.reset()
    packed = F.pack_ternary(trits(2, 5, 12, device=device), normal(2, 5, device=device)).requires_grad_()
    latent = normal(5, 12, device=device).requires_grad_()

    def f(x):
        a = torch.nn.functional.linear(F.activation_quant(x), F.ternarize(latent))
        return (a + F.multi_ternary_linear(x, packed, terms=2, activation_bits=8)).square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for m in (3, 5):
        results = []
        for g in (f, compiled):
            x = normal(m, 12, device=device).requires_grad_()
            latent.grad = packed.grad = None
            loss = g(x)
            loss.backward()
            results.append((loss.detach(), x.grad, latent.grad, packed.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    x, t = normal(3, 16, device=device), trits(2, 5, 16, device=device)
    gammas = normal(2, 5, device=device)
    packed = F.pack_ternary(t, gammas)
    with torch.autocast(device, dtype):
        assert F.multi_ternary_linear(x, packed, terms=2).dtype == dtype
        assert F.bitlinear(x, t[0], gammas[0]).dtype == dtype
        assert F.activation_quant(x).dtype == torch.float32 and F.ternarize(t[0]).dtype == torch.float32
    reference = torch.ops.subbyte.multi_ternary_linear(x.to(dtype), None, *packed.packed_args, 2)
    with torch.autocast(device, dtype):
        assert torch.equal(F.multi_ternary_linear(x, packed, terms=2), reference)
