"""The names of BitLinear 0.1.0 (SEED_API section 8): its test-suite's rows, with float64 oracles."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch

import subbyte.compat
from subbyte.compat import bitlinear
from subbyte.compat.paths import BITLINEAR_PATHS


def ternary(*shape):
    return torch.randint(-1, 2, shape).float()


# ---- import paths


@pytest.mark.parametrize("path", sorted(BITLINEAR_PATHS))
def test_every_path_imports(path):
    subbyte.compat.uninstall()
    subbyte.compat.install(bitlinear=True)
    module = __import__(path, fromlist=["_"])
    for name in BITLINEAR_PATHS[path]:
        assert getattr(module, name) is getattr(bitlinear, name)
    for name in (n for n in bitlinear.__all__ if n not in ("functional", "layers", "packing", "quantization")):
        assert hasattr(sys.modules["bitlinear"], name)


def test_the_name_bitlinear_is_taken_on_request_alone_and_never_from_another_package(monkeypatch):
    assert "bitlinear" not in sys.modules
    monkeypatch.setitem(sys.modules, "bitlinear", types.ModuleType("bitlinear"))
    with pytest.raises(ImportError, match="bitlinear"):
        subbyte.compat.install(bitlinear=True)


# ---- functional


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_T1_bitlinear_python_is_the_formula_for_any_shape(lead, bias):
    x, w, gamma = torch.randn(*lead, 20), ternary(7, 20), torch.rand(7)
    b = torch.randn(7) if bias else None
    y = bitlinear.bitlinear_python(x, w, gamma, b)
    expected = (x.double() @ w.double().t()) * gamma.double() + (b.double() if bias else 0)
    assert y.shape == (*lead, 7)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bitlinear.bitlinear_python(x, w, gamma.reshape(1, 7), b), y)


def test_T4_ternary_weights_may_be_int8():
    x, w, gamma = torch.randn(3, 20), ternary(7, 20), torch.rand(7)
    torch.testing.assert_close(bitlinear.bitlinear_python(x, w.to(torch.int8), gamma), bitlinear.bitlinear_python(x, w, gamma))


def test_greedy_decomposition_has_ternary_terms_and_its_error_falls():
    w = torch.randn(16, 40)
    errors = []
    for k in (1, 2, 3, 4):
        t, gammas = bitlinear.greedy_ternary_decomposition(w, k)
        assert t.shape == (k, 16, 40) and gammas.shape == (k, 16) and set(t.unique().tolist()) <= {-1, 0, 1}
        residual = w.clone()
        for ti, gi in zip(t, gammas):  # each term is weight_to_ternary of what is left
            expected_t, expected_g = bitlinear.weight_to_ternary(residual, per_channel=True)
            assert torch.equal(ti, expected_t)
            torch.testing.assert_close(gi, expected_g)
            residual = residual - gi[:, None] * ti
        errors.append(residual.norm().item())
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.5 * errors[0]


def test_T3_no_components_is_an_error():
    with pytest.raises(ValueError, match="k is 0"):
        bitlinear.greedy_ternary_decomposition(torch.randn(2, 3), 0)


def test_multi_ternary_is_the_sum_of_its_terms():
    x, t, gammas, b = torch.randn(2, 5, 12), ternary(3, 7, 12), torch.rand(3, 7), torch.randn(7)
    expected = sum(bitlinear.bitlinear_python(x, ti, gi) for ti, gi in zip(t, gammas)) + b
    torch.testing.assert_close(bitlinear.multi_ternary_linear_python(x, t, gammas, b), expected)


def test_T2_activation_quant():
    x = torch.randn(4, 9, requires_grad=True)
    s = x.detach().double().abs().amax(-1, keepdim=True)
    y = bitlinear.activation_quant(x)
    torch.testing.assert_close(y.double(), s * (x.detach().double() / s * 127).round() / 127, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="bits"):
        bitlinear.activation_quant(x, bits=1)


# ---- quantization, packing


def test_absmax_scale_and_ternary_quantize():
    w = torch.randn(5, 8)
    assert bitlinear.absmax_scale(w) == w.abs().max()
    assert torch.equal(bitlinear.absmax_scale(w, dim=1), w.abs().amax(1))
    t = bitlinear.ternary_quantize(w, 0.5)
    assert torch.equal(t, torch.where(w.abs() > 0.5, w.sign(), 0.0))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weight_to_ternary_is_the_documented_rule(per_channel):
    w = torch.randn(6, 50)
    t, gamma = bitlinear.weight_to_ternary(w, per_channel=per_channel)
    mean = w.abs().mean(1, keepdim=True) if per_channel else w.abs().mean()
    chosen = w.abs() > 0.7 * mean
    assert torch.equal(t, torch.where(chosen, w.sign(), 0.0))
    kept = w.abs() * chosen
    expected = kept.sum(1) / chosen.sum(1) if per_channel else kept.sum() / chosen.sum()
    torch.testing.assert_close(gamma, expected)


@pytest.mark.parametrize("shape", [(7, 11), (3, 4, 5), (1, 1), (2, 0)])
def test_base3_round_trip_and_bytes(shape):
    t = ternary(*shape)
    packed, original = bitlinear.pack_ternary_base3(t)
    assert packed.dtype == torch.uint8 and tuple(original) == shape and packed.numel() == -(-t.numel() // 5)
    assert torch.equal(bitlinear.unpack_ternary_base3(packed, original).float(), t)
    first, _ = bitlinear.pack_ternary_base3(torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0, 1.0]]))
    assert first.flatten().tolist()[0] == 0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 0


def test_memory_savings():
    savings = bitlinear.estimate_memory_savings(1024, 1024, num_layers=2)
    assert savings["float32_bytes"] == 2 * 4 * 1024 * 1024
    assert savings["savings_bytes"] == savings["float32_bytes"] - savings["packed_bytes"]
    assert 15 < savings["compression_ratio"] <= 20


# ---- layers


@pytest.mark.parametrize("bias", [True, False])
def test_bitlinear_from_linear_computes_from_its_ternary_parts(bias):
    linear = torch.nn.Linear(20, 7, bias=bias)
    layer = bitlinear.BitLinear.from_linear(linear)
    t, gamma = bitlinear.weight_to_ternary(linear.weight.detach())
    assert torch.equal(layer.W_ternary, t)
    torch.testing.assert_close(layer.gamma, gamma)
    x = torch.randn(2, 3, 20)
    expected = bitlinear.bitlinear_python(x, t, gamma, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_bitlinear_is_frozen_and_lets_the_gradient_flow_to_its_input_and_bias():
    layer = bitlinear.BitLinear(20, 7)
    x = torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    expected = (layer.W_ternary * layer.gamma[:, None]).sum(0).expand(3, 20)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert layer.bias.grad.tolist() == [3.0] * 7
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_T5_T6_the_layer_computes_from_two_bits_and_can_be_made_to_train():
    layer = bitlinear.BitLinear(64, 32)
    assert layer.weight.bits_per_weight < 3
    layer.to_latent_()
    x = torch.randn(100, 64)
    target = x @ torch.randn(64, 32) / 8
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_multi_ternary_linear_is_closer_with_more_terms():
    linear, x = torch.nn.Linear(40, 9), torch.randn(5, 40)
    errors = []
    for k in (1, 2, 4):
        layer = bitlinear.MultiTernaryLinear.from_linear(linear, k=k)
        assert layer.W_ternary.shape == (k, 9, 40) and layer.gammas.shape == (k, 9)
        expected = bitlinear.multi_ternary_linear_python(x, layer.W_ternary, layer.gammas, linear.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        errors.append((layer(x) - linear(x)).norm().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_conversion_reaches_every_linear(inplace):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(5, 3)))
    converted = bitlinear.convert_linear_to_bitlinear(model, inplace=inplace)
    assert (converted is model) == inplace
    assert type(converted[0]) is bitlinear.BitLinear and type(converted[2][0]) is bitlinear.BitLinear
    assert inplace or type(model[0]) is torch.nn.Linear
    assert converted(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("make", [lambda: bitlinear.BitLinear(9, 4), lambda: bitlinear.MultiTernaryLinear(9, 4, 2)])
def test_state_has_the_old_keys_and_round_trips(make):
    layer, x = make(), torch.randn(2, 9)
    gamma = "gamma" if isinstance(layer, bitlinear.BitLinear) else "gammas"
    assert list(layer.state_dict()) == ["W_ternary", gamma, "bias"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_multi_ternary_linear_tells_its_number_of_terms():
    from subbyte.compat.bitlinear import MultiTernaryLinear

    assert MultiTernaryLinear(16, 8, k=2).k == 2 and MultiTernaryLinear.from_linear(torch.nn.Linear(16, 8), k=4).k == 4
