"""BitLinear and MultiTernaryLinear: states, copies, state, conversion, training."""

import copy
import io
import pickle

import pytest
import torch

import subbyte
from subbyte import PackedWeight
from subbyte import functional as F
from subbyte.nn import BitLinear, MultiTernaryLinear, convert_linear_to_bitlinear

STATES = ["latent", "packed", "frozen"]


def layer_of(kind, state, device="cpu", **options):
    torch.manual_seed(3)
    source = torch.nn.Linear(40, 6).to(device)
    if kind == "bit":
        return source, BitLinear.from_linear(source, state=state, **options)
    return source, MultiTernaryLinear.from_linear(source, 3, state=state, **options)


# ---- what a layer computes


@pytest.mark.parametrize("state", STATES)
def test_bitlinear_is_its_formula_in_every_state(device, state):
    for options in ({}, {"method": "threshold", "per_channel": True}):
        source, layer = layer_of("bit", state, device, activation_bits=None, **options)
        t, gamma = F.weight_to_ternary(
            source.weight, options.get("per_channel", False), method=options.get("method", "absmean")
        )
        assert torch.equal(layer.W_ternary, t) and torch.equal(layer.gamma, gamma.expand(6).contiguous())
        x = torch.randn(2, 5, 40, device=device)
        expected = (x.double() @ t.double().t()) * gamma.double() + source.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert layer(x[0, 0]).shape == (6,) and layer(x[:0]).shape == (0, 5, 6)


@pytest.mark.parametrize("kind", ["bit", "multi"])
def test_rounded_activations_agree_between_latent_and_integer_products(device, kind):
    layers = [layer_of(kind, state, device)[1] for state in STATES]
    x = torch.randn(9, 40, device=device)
    latent, packed, frozen = (layer(x) for layer in layers)
    assert torch.equal(packed, frozen)
    torch.testing.assert_close(latent, frozen, rtol=1e-5, atol=1e-5)
    exact = layer_of(kind, "frozen", device, activation_bits=None)[1](x)
    assert not torch.allclose(exact, frozen, atol=1e-5)
    torch.testing.assert_close(exact, frozen, rtol=0.05, atol=0.05)


def test_multi_ternary_layers_come_closer_with_every_term(device):
    source = torch.nn.Linear(64, 16, device=device)
    x = torch.randn(20, 64, device=device)
    errors = []
    for k in (1, 2, 3, 4):
        layer = MultiTernaryLinear.from_linear(source, k, state="frozen", activation_bits=None)
        assert layer.W_ternary.shape == (k, 16, 64) and layer.gamma.shape == (k, 16)
        errors.append((layer(x) - source(x)).square().mean().item())
        dense = (layer.gamma[..., None] * layer.W_ternary).sum(0)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, source.bias), rtol=1e-5, atol=1e-5)
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.1 * errors[0]


def test_constructors_take_torch_nn_arguments(device):
    layer = BitLinear(12, 5, device=device)
    assert layer.weight.shape == (5, 12) and layer.bias.shape == (5,) and layer.state == "latent"
    assert sum(p.numel() for p in layer.parameters()) == 65
    assert BitLinear(12, 5, bias=False).bias is None
    assert BitLinear(12, 5, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    frozen = BitLinear(12, 5, state="frozen")
    assert isinstance(frozen.weight, PackedWeight) and not frozen.weight.requires_grad and frozen.bias.requires_grad
    assert BitLinear(12, 5, state="packed").weight.requires_grad
    multi = MultiTernaryLinear(12, 5, 2)
    assert multi.W_ternary.shape == (2, 5, 12) and set(multi.W_ternary.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert "in_features=12, out_features=5, k=2" in repr(multi) and "state=latent" in repr(multi)
    assert "k=" not in repr(layer)
    for wrong in (
        lambda: BitLinear(4, 4, state="solid"),
        lambda: BitLinear(4, 4, state="packed", activation_bits=4),
        lambda: MultiTernaryLinear(4, 4, 0),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 130)])
@pytest.mark.parametrize("state", STATES)
def test_odd_sizes(device, shape, state):
    layer = MultiTernaryLinear(shape[1], shape[0], 2, device=device, state=state)
    x = torch.randn(3, shape[1], device=device, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (3, shape[0]) and x.grad.shape == x.shape
    assert layer.W_ternary.shape == (2, *shape) and layer.gamma.shape == (2, shape[0])


# ---- states


def test_states_change_without_changing_the_outputs(device):
    for kind in ("bit", "multi"):
        source, layer = layer_of(kind, "latent", device, activation_bits=None)
        x = torch.randn(4, 40, device=device)
        before = layer(x).detach()
        bias = layer.bias
        for change in (layer.pack_, layer.freeze_, layer.pack_):
            assert change() is layer
            torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=1e-5)
        assert layer.bias is bias and layer.weight.format == "ternary" and layer.weight.requires_grad
        layer.to_latent_()
        assert type(layer.weight.detach()) is torch.Tensor and layer.weight.requires_grad
        if kind == "multi":  # greedy terms of a sum of terms are those terms only for one term
            continue
        assert torch.equal(layer.weight, layer.W_ternary * layer.gamma[:, None]) or layer.method == "absmean"
    layer = BitLinear(8, 4, activation_bits=4)
    with pytest.raises(ValueError, match="activation_bits is 4"):
        layer.freeze_()
    assert layer.state == "latent" and layer(torch.randn(2, 8)).shape == (2, 4)


def test_frozen_layers_pass_gradients_to_input_and_bias_alone(device):
    source, layer = layer_of("bit", "frozen", device, activation_bits=None)
    x = torch.randn(3, 40, device=device, requires_grad=True)
    layer.eval()(x).sum().backward()
    dense = layer.W_ternary * layer.gamma[:, None]
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.bias.grad, torch.full((6,), 3.0, device=device)) and layer.weight.grad is None


def test_T6_latent_weights_get_the_straight_through_gradient(device):
    for kind in ("bit", "multi"):
        source, layer = layer_of(kind, "latent", device)
        x = torch.randn(3, 40, device=device, requires_grad=True)
        gy = torch.randn(3, 6, device=device)
        layer(x).backward(gy)
        dense = (layer.W_ternary * layer.gamma[..., None]).reshape(-1, 6, 40).sum(0)
        rounded = F.activation_quant(x.detach())
        torch.testing.assert_close(layer.weight.grad, gy.t() @ rounded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, gy @ dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, gy.sum(0))


def test_packed_layers_get_the_dense_gradient(device):
    for bits in (None, 8):
        source, layer = layer_of("bit", "packed", device, activation_bits=bits)
        x, gy = torch.randn(3, 40, device=device), torch.randn(3, 6, device=device)
        layer(x).backward(gy)
        torch.testing.assert_close(layer.weight.grad, gy.t() @ x, rtol=1e-5, atol=1e-5)


# ---- training


def loss_falls(layer, device, steps, lr, optimizer=torch.optim.AdamW, factor=0.4):
    torch.manual_seed(7)
    target = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    first, last = torch.nn.Linear(16, 64).requires_grad_(False), torch.nn.Linear(64, 4).requires_grad_(False)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), layer, torch.nn.ReLU(), last).to(device)
    x = torch.randn(256, 16, device=device)
    y = target(x).detach()
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < factor * losses[0], (losses[0], losses[-5:])
    return model, x, losses


@pytest.mark.parametrize("kind", ["bit", "multi"])
def test_T6_quantization_aware_training_brings_the_loss_down_and_packs_as_it_trained(device, kind):
    layer = BitLinear(64, 64) if kind == "bit" else MultiTernaryLinear(64, 64, 2)
    before = layer.W_ternary.clone()
    model, x, _ = loss_falls(layer, device, steps=60, lr=3e-3)
    assert not torch.equal(layer.W_ternary.cpu(), before)
    trained = model(x).detach()
    layer.freeze_()
    torch.testing.assert_close(model(x).detach(), trained, rtol=1e-3, atol=1e-3)


def test_packed_training_brings_the_loss_down(device):
    layer = BitLinear(64, 64, state="packed", activation_bits=None)
    loss_falls(layer, device, steps=80, lr=3e-3, factor=0.6)
    assert isinstance(layer.weight, PackedWeight)


# ---- copies, files, conversion


@pytest.mark.parametrize("kind", ["bit", "multi"])
@pytest.mark.parametrize("state", STATES)
def test_copies_and_checkpoints_give_the_same_outputs(device, kind, state):
    _, layer = layer_of(kind, state, device)
    x = torch.randn(3, 40, device=device)
    expected = layer(x)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), expected) and repr(clone) == repr(layer)
    clone.bias.data.add_(1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = type(layer)(40, 6, state=state, **({"k": 3} if kind == "multi" else {})).to(device)
    assert not torch.equal(other(x), expected)
    assert not any(other.load_state_dict(torch.load(file, weights_only=True)))
    assert torch.equal(other(x), expected)
    keys = {"weight", "bias"} if state == "latent" else {"weight.codes", "weight.scales", "bias"}
    assert set(layer.state_dict()) == keys
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("state", STATES)
def test_checkpoints_of_ternary_values_load(device, state):
    source = torch.nn.Linear(40, 6)
    t, gamma = F.weight_to_ternary(source.weight, True)
    layer = BitLinear(40, 6, state=state, activation_bits=None, method="threshold", per_channel=True).to(device)
    layer.load_state_dict({"W_ternary": t, "gamma": gamma, "bias": source.bias.detach()})
    x = torch.randn(3, 40, device=device)
    expected = F.bitlinear(x, t.to(device), gamma.to(device), source.bias.detach().to(device))
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-5)
    ts, gammas = F.greedy_ternary_decomposition(source.weight, 2)
    multi = torch.nn.Sequential(MultiTernaryLinear(40, 6, 2, state=state, activation_bits=None, bias=False)).to(device)
    multi.load_state_dict({"0.W_ternary": ts, "0.gamma": gammas})
    expected = F.multi_ternary_linear(x, ts.to(device), gammas.to(device))
    if state != "latent":
        torch.testing.assert_close(multi(x).detach(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        multi.load_state_dict({"0.W_ternary": ts, "0.gamma": gammas, "0.other": gammas})
    with pytest.raises(ValueError, match="expected -1, 0 or 1"):
        multi.load_state_dict({"0.W_ternary": 2 * ts, "0.gamma": gammas})


def test_convert_linear_to_bitlinear_replaces_layers_everywhere(device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8, bias=False))
            self.head = torch.nn.Linear(8, 2)
            self.again = self.body[0]
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.head(self.again(self.body(x)))

    net = Net().to(device)
    x = torch.randn(3, 8, device=device)
    before = net(x)
    converted = convert_linear_to_bitlinear(net, skip=("head",), state="frozen", activation_bits=None)
    assert type(net.body[0]) is torch.nn.Linear and torch.equal(net(x), before)
    assert isinstance(converted.body[0], BitLinear) and isinstance(converted.body[2], BitLinear)
    assert converted.again is converted.body[0] and type(converted.head) is torch.nn.Linear
    assert converted.body[2].bias is None and converted.body[0].state == "frozen"
    assert isinstance(converted.attention.out_proj, torch.nn.Linear)  # a subclass that torch reads from within
    assert converted(x).shape == before.shape
    assert convert_linear_to_bitlinear(net, inplace=True) is net and isinstance(net.head, BitLinear)
    assert isinstance(convert_linear_to_bitlinear(torch.nn.Linear(3, 4)), BitLinear)


def test_a_compiled_layer_trains_as_the_eager_one(device):
    torch._dynamo.reset()
    _, layer = layer_of("bit", "latent", device)
    x = torch.randn(3, 40, device=device)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad.clone(), None
    torch.compile(layer, fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [BitLinear, MultiTernaryLinear])
@pytest.mark.parametrize(
    "options,message",
    [
        (dict(activation_bits=1), "activation_bits is 1, expected None or 2 to 24"),
        (dict(activation_bits=25), "activation_bits is 25"),
        (dict(method="absmax"), "method is 'absmax', expected absmean or threshold"),
        (dict(threshold=-0.1), "threshold is -0.1, expected at least 0"),
        (dict(threshold=float("nan")), "threshold is nan"),
        (dict(dtype=torch.int8), "dtype is torch.int8, expected a floating point type"),
        (dict(in_features=-3), r"the weight is \[4, -3\], expected no negative size"),
    ],
)
def test_contradicting_arguments_are_refused_when_the_layer_is_made(device, cls, options, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(**{"in_features": 3, "out_features": 4, "device": device, **options})


def test_memory_of_packed_layers(device):
    layer = BitLinear(512, 256, bias=False, state="frozen")
    assert layer.weight.nbytes == subbyte.functional.estimate_memory_savings(512, 256)["runtime_bytes"]
