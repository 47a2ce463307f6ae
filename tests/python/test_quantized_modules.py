"""QuantizedLinear, QuantizedConv2d, QuantizedMatmul, QuantizedAttention: life cycle, state, training.

The names test_X4 ... test_Q12 are the defects of the original layers that the tests hold down; docs/porting.md lists them.
"""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from subbyte import functional, nn


def q(v, step, bits=4):
    return (v.float() / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def ready(layer, x):
    """The layer after a first batch of training, and its output."""
    return layer, layer.train()(x)


def layers(device="cpu", **options):
    return [
        (nn.QuantizedLinear(9, 5, bias=True, device=device, **options), torch.randn(6, 9, device=device)),
        (nn.QuantizedLinear(9, 5, bits=8, device=device, **options), torch.randn(2, 3, 9, device=device)),
        (
            nn.QuantizedConv2d(4, 6, (3, 2), groups=2, padding=1, bias=True, device=device, **options),
            torch.randn(2, 4, 5, 6, device=device),
        ),
    ]


def test_section_7_2_forward_is_the_formula(device):
    for bits in (4, 8):
        layer = nn.QuantizedLinear(12, 5, bits=bits, bias=True, device=device)
        with torch.no_grad():
            layer.bias_a.uniform_(-0.5, 0.5)
        x = torch.randn(3, 4, 12, device=device)
        y = layer(x)
        sa, sw = layer.scale_a.detach(), layer.scale_w.detach()
        want = q(x + layer.bias_a, sa, bits) @ q(layer.weight, sw, bits).t() * sa * sw + layer.bias
        assert torch.equal(y, want)
        qp = 2 ** (bits - 1) - 1
        assert torch.allclose(sa, 2 * x.abs().mean() / math.sqrt(qp))
        assert torch.allclose(sw, 2 * layer.weight.detach().abs().mean() / math.sqrt(qp))


def test_section_7_5_initial_steps(device):
    x = torch.randn(64, 32, device=device)
    for bits, divisor in ((4, 5.6345), (8, 11.269)):
        layer, _ = ready(nn.QuantizedLinear(32, 8, bits=bits, init="bie", device=device), x)
        assert torch.allclose(layer.scale_a, 2 * x.abs().mean() / 11.269)
        assert torch.allclose(layer.scale_w, 2 * layer.weight.abs().mean() / divisor)
    # The original's first activation step saturates what is above 1.24 mean|x|; LSQ's does not.
    share = {}
    for init in ("bie", "lsq"):
        layer, _ = ready(nn.QuantizedLinear(32, 8, init=init, device=device), x)
        share[init] = (x / layer.scale_a > 7).float().mean().item()
    assert share["bie"] > 0.1 > 0.01 > share["lsq"]
    with pytest.raises(ValueError, match="bits is 5, expected 4 or 8"):
        nn.QuantizedLinear(4, 4, bits=5, init="bie")


def test_train_and_packed_evaluation_give_the_same_bits(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layer, x in layers(device):
            layer, y = ready(layer, x.to(dtype))
            assert y.dtype == dtype
            with torch.no_grad():
                assert torch.equal(layer.eval()(x.to(dtype)), y)
                assert layer.qweight.dtype == torch.uint8
                layer.generate_quantized_weight(qweight_only=True)
                assert layer.weight is None and torch.equal(layer(x.to(dtype)), y)
            assert torch.equal(layer(x.to(dtype)), y)  # with gradients enabled


def test_X4_weights_changed_after_an_evaluation_are_used_by_the_next():
    for layer, x in layers():
        layer, _ = ready(layer, x)
        layer.eval()
        with torch.no_grad():
            before = layer(x)
        assert layer.qweight is not None
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        layer.train()(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            want = layer(x)
            assert torch.equal(layer.eval()(x), want) and not torch.equal(want, before)
            layer.weight.mul_(-1)  # in evaluation, without train()
            changed = layer(x)
            assert not torch.equal(changed, want)
            layer.scale_w.mul_(2)
            assert not torch.equal(layer(x), changed)
            layer.training = False
            layer.qweight = None
            assert torch.equal(layer(x), layer.train()(x))


def test_X7_steps_are_initialised_once_in_training_and_keep_their_type():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = nn.QuantizedLinear(8, 4, dtype=dtype).eval()
        x = torch.randn(16, 8).to(dtype)
        with pytest.raises(RuntimeError, match="not initialised"):
            layer(x)
        assert not layer.activation_initialised
        layer, _ = ready(layer, x)
        assert layer.scale_a.dtype == torch.float32 and layer.scale_w.dtype == torch.float32
        first = layer.scale_a.item()
        layer(x * 10)
        assert layer.scale_a.item() == first
    layer = nn.QuantizedLinear(8, 4)
    layer(torch.randn(0, 8))
    assert not layer.activation_initialised  # an empty batch says nothing
    x = torch.randn(5, 8)
    assert torch.equal(layer.eval().set_activation(x), x)  # explicitly, in evaluation
    assert layer.activation_initialised and layer(x).shape == (5, 4)


def test_X10_device_and_dtype_are_honoured(device):
    layer = nn.QuantizedLinear(8, 4, bias=True, device=device, dtype=torch.bfloat16)
    for name in ("weight", "bias", "bias_a"):
        assert getattr(layer, name).dtype == torch.bfloat16 and getattr(layer, name).device.type == device
    assert layer.scale_a.device.type == device
    assert nn.QuantizedLinear(8, 4, device="meta").weight.is_meta


def test_X11_adapters_below_a_frozen_layer_in_evaluation_get_gradients(device):
    for layer, x in layers(device):
        layer, y = ready(layer, x)
        a = x.clone().requires_grad_()
        layer(a).square().sum().backward()
        for only in (False, True):
            layer.eval().requires_grad_(False).generate_quantized_weight(qweight_only=only)
            b = x.clone().requires_grad_()
            layer(b).square().sum().backward()
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_Q3_each_operand_has_its_own_step():
    m = nn.QuantizedMatmul()
    x, z = torch.randn(2, 5, 8), 100 * torch.randn(2, 6, 8)
    y = m(x, z)
    for step, v in ((m.scale_x, x), (m.scale_z, z)):
        assert torch.allclose(step, 2 * v.abs().mean() / math.sqrt(7))
    assert torch.equal(y, q(x, m.scale_x) @ q(z, m.scale_z).mT * m.scale_x * m.scale_z)
    with pytest.raises(RuntimeError, match="not initialised"):
        nn.QuantizedMatmul().eval()(x, z)


def test_Q5_a_deployed_layer_runs_and_will_not_train():
    for layer, x in layers():
        layer, y = ready(layer, x)
        layer.eval().generate_quantized_weight(qweight_only=True)
        assert torch.equal(layer(x), y)
        layer.generate_quantized_weight()  # nothing to do
        with pytest.raises(RuntimeError, match="training needs the float weight"):
            layer.train()(x)
        with pytest.raises(RuntimeError, match="needs the float weight"):
            layer.prepare_params()


def test_Q6_any_leading_shape_and_any_number_of_features():
    for k in (1, 7, 33, 64):
        layer = nn.QuantizedLinear(k, 3)
        rows = torch.randn(12, k)
        layer, y = ready(layer, rows)
        for shape in ((12, k), (3, 4, k), (2, 2, 3, k), (1, 12, k)):
            assert torch.equal(layer(rows.reshape(shape)), y.reshape(*shape[:-1], 3))
        assert torch.equal(layer(rows[5]), y[5]) and layer(rows[:0]).shape == (0, 3)
        with pytest.raises(ValueError, match=rf"QuantizedLinear: x is \[12, {k + 1}\], expected"):
            layer(torch.randn(12, k + 1))
    conv = nn.QuantizedConv2d(3, 4, 3)
    image = torch.randn(3, 6, 6)
    conv, y = ready(conv, image)
    assert torch.equal(conv(image[None])[0], y)
    with pytest.raises(ValueError, match="in_channels = 3"):
        conv(torch.randn(1, 4, 6, 6))


def test_Q7_the_weight_step_is_learnt():
    layer, y = ready(nn.QuantizedLinear(8, 4), torch.randn(16, 8))
    y.square().sum().backward()
    assert layer.scale_w.requires_grad and layer.scale_w.grad.abs() > 0 and layer.scale_w.grad.shape == ()
    assert not any(p.dtype == torch.uint8 for p in layer.parameters())


def test_Q10_set_weight_data_keeps_the_weight_trainable():
    layer, w = nn.QuantizedLinear(8, 4), torch.randn(4, 8)
    layer.set_weight_data(w)
    assert layer.weight.requires_grad and torch.equal(layer.weight, w)
    assert torch.allclose(layer.scale_w, 2 * w.abs().mean() / math.sqrt(7))
    with pytest.raises(ValueError, match="set_weight_data: x is"):
        layer.set_weight_data(w.t())


def test_Q11_narrow_types_train(device):
    for dtype in (torch.float16, torch.bfloat16):
        layer = nn.QuantizedLinear(16, 4, bias=True, device=device, dtype=dtype)
        layer(torch.randn(8, 16, device=device, dtype=dtype)).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())
        with torch.autocast(device, torch.bfloat16):
            layer = nn.QuantizedLinear(16, 4, bias=True, device=device)
            y = layer(torch.randn(8, 16, device=device))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32


def test_Q12_a_step_that_training_drives_to_zero_stays_initialised():
    layer, x = ready(nn.QuantizedLinear(8, 4), torch.randn(16, 8))[0], torch.randn(16, 8)
    with torch.no_grad():
        layer.scale_a.zero_()
    layer(x)
    assert layer.scale_a.item() == 0
    assert layer.state_dict()["activation_initialised"].item() is True
    other = nn.QuantizedLinear(8, 4)
    assert other.state_dict()["activation_initialised"].item() is False
    other.load_state_dict(layer.state_dict())
    other(x)
    assert other.scale_a.item() == 0


def test_packed_weight_is_a_canonical_packed_weight():
    for layer, x in layers():
        layer, _ = ready(layer, x)
        packed = layer.eval().packed_weight()
        bits = layer.bits
        want = q(layer.weight, layer.scale_w.detach(), bits).flatten(1) * layer.scale_w
        assert torch.equal(packed.dequantize(), want) and packed.format == f"uint{bits}"
        codes = layer.qweight.clone()
        y = layer(x)
        layer.set_quantized_weight_data(codes)
        assert layer.weight is None and torch.equal(layer(x), y)
        with pytest.raises(ValueError, match="set_quantized_weight_data: x is torch.uint8"):
            layer.set_quantized_weight_data(codes[:, 1:])


@pytest.mark.parametrize("form", ["training", "evaluated", "deployed"])
def test_state_survives_state_dict_save_deepcopy_pickle_and_to(form):
    for (layer, x), (fresh, _) in zip(layers(), layers()):
        layer, y = ready(layer, x)
        if form != "training":
            layer.eval()
            with torch.no_grad():
                layer(x)
        if form == "deployed":
            layer.generate_quantized_weight(qweight_only=True)
        y = layer(x)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh.train(layer.training).load_state_dict(torch.load(file))
        assert (fresh.weight is None) == (form == "deployed")
        for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.float32)):
            assert torch.equal(other(x), y)
        with torch.no_grad():
            assert torch.equal(fresh.eval()(x), y)
        wrong = nn.QuantizedLinear(9, 5, bits=3)
        if form == "deployed" and isinstance(layer, nn.QuantizedLinear):
            with pytest.raises(RuntimeError, match="expected uint8"):
                wrong.load_state_dict(layer.state_dict(), strict=False)


def test_a_deployed_module_takes_a_training_checkpoint_back():
    layer, x = ready(nn.QuantizedLinear(9, 5), torch.randn(4, 9))[0], torch.randn(4, 9)
    state = copy.deepcopy(layer.state_dict())
    y = layer(x)
    layer.eval().generate_quantized_weight(qweight_only=True)
    layer.load_state_dict(state)
    assert torch.equal(layer.train()(x), y)
    with pytest.raises(RuntimeError, match="activation_initialised"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "activation_initialised"})


def test_from_float_copies_the_layer():
    linear, conv = torch.nn.Linear(64, 16), torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    cases = ((linear, torch.randn(8, 64), nn.QuantizedLinear), (conv, torch.randn(2, 4, 9, 9), nn.QuantizedConv2d))
    for source, x, kind in cases:
        layer = kind.from_float(source, bits=8)
        assert torch.equal(layer.weight, source.weight) and torch.equal(layer.bias, source.bias)
        y, want = layer(x), source(x)
        assert y.shape == want.shape and (y - want).norm() < 0.1 * want.norm()
        assert layer.weight.data_ptr() != source.weight.data_ptr()
    assert nn.QuantizedLinear.from_linear(linear).bits == 4
    with pytest.raises(ValueError, match="reflect"):
        nn.QuantizedConv2d.from_float(torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))


def test_options_are_checked_and_printed():
    makers = (
        lambda **o: nn.QuantizedLinear(4, 4, **o),
        lambda **o: nn.QuantizedMatmul(**o),
        lambda **o: nn.QuantizedConv2d(4, 4, 1, **o),
    )
    for bad in ({"bits": 1}, {"bits": 9}, {"init": "x"}, {"eps": 0.0}):
        for make in makers:
            with pytest.raises(ValueError, match=f"{next(iter(bad))} is "):
                make(**bad)
    with pytest.raises(ValueError, match="groups is 3"):
        nn.QuantizedConv2d(4, 6, 1, groups=3)
    with pytest.raises(ValueError, match="num_heads is 3"):
        nn.QuantizedAttention(8, 3)
    assert "in_features=3, out_features=2, bits=4, bias=False, init='lsq'" in repr(nn.QuantizedLinear(3, 2))


def reference_attention(module, x, mask=None):
    """The module's formula from its parts, head by head."""
    parts = [p(x) for p in (module.q_proj, module.k_proj, module.v_proj)]
    d, out = module.head_dim, []
    for h in range(module.num_heads):
        a, b, v = (p[..., h * d : (h + 1) * d] for p in parts)
        s, c = module.scores, module.context
        scores = q(a, s.scale_x) @ q(b, s.scale_z).mT * s.scale_x * s.scale_z / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        p = scores.softmax(-1)
        out.append(q(p, c.scale_x) @ q(v.mT, c.scale_z).mT * c.scale_x * c.scale_z)
    return module.out_proj(torch.cat(out, -1))


def test_attention_is_made_of_integer_products(device):
    module = nn.QuantizedAttention(16, 4, device=device)
    x = torch.randn(2, 5, 16, device=device)
    module(x)
    module.eval()
    with torch.no_grad():
        assert torch.allclose(module(x), reference_attention(module, x), atol=1e-5)
        causal = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
        want = reference_attention(module, x, causal)
        assert torch.allclose(module(x, is_causal=True), want, atol=1e-5)
        assert torch.allclose(module(x, mask=causal), want, atol=1e-5)
        assert torch.allclose(module(x, mask=torch.zeros(5, 5, device=device).masked_fill(~causal, -math.inf)), want, atol=1e-5)
        keys = torch.tensor([True, True, True, False, False], device=device)
        assert torch.allclose(module(x, mask=keys), reference_attention(module, x, keys), atol=1e-5)
        assert module(x, torch.randn(2, 7, 16, device=device)).shape == (2, 5, 16)
    module.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_modules_compile_in_one_graph():
    module = nn.QuantizedAttention(8, 2)
    x = torch.randn(2, 3, 8)
    module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
    compiled(x).sum().backward()
    with torch.no_grad():
        module.eval()
        want = module(x)
        assert torch.allclose(compiled(x), want, atol=1e-6)
        module.q_proj.weight.neg_()
        assert torch.allclose(compiled(x), module(x), atol=1e-6) and not torch.allclose(module(x), want, atol=1e-3)


class Convolutional(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.a = nn.QuantizedConv2d(1, 8, 3, stride=2, padding=1, bias=True, device=device)
        self.b = nn.QuantizedConv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=True, device=device)
        self.c = nn.QuantizedLinear(8 * 49, 10, bias=True, device=device)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


def test_a_small_network_trains_on_fashion_mnist_and_deploys(fashion_mnist, device):
    (x, labels), (test_x, test_labels) = fashion_mnist
    x, labels = x[:3000].to(device).unflatten(1, (1, 28, 28)), labels[:3000].to(device)
    model = Convolutional(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for epoch in range(2):
        for i in range(0, 3000, 100):
            loss = F.cross_entropy(model(x[i : i + 100]), labels[i : i + 100])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-10:]) < 0.45 * sum(losses[:3]) * 10 / 3
    for layer in (model.a, model.b, model.c):
        assert layer.scale_w.grad.abs() > 0 and layer.scale_a.grad.abs() > 0
    test_x, test_labels = test_x[:1000].to(device).unflatten(1, (1, 28, 28)), test_labels[:1000].to(device)
    with torch.no_grad():
        want = model(test_x)
        model.eval()
        for layer in (model.a, model.b, model.c):
            layer.generate_quantized_weight(qweight_only=True)
        assert torch.equal(model(test_x), want)
    assert (want.argmax(1) == test_labels).float().mean() > 0.65
    assert sum(p.numel() for p in model.parameters()) < 500  # weights are bytes now


def test_functional_forms():
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    s, t = torch.tensor(0.3), torch.tensor(0.2)
    want = q(x, s) @ q(w, t).t() * s * t
    assert torch.equal(functional.quantized_matmul(x, w, s, t), want)
    assert torch.equal(functional.quantized_linear(x, w, s, t), want)
    got = functional.quantized_conv2d(x[:, :, None, None], w[:, :, None, None], s, t)
    assert torch.equal(got[..., 0, 0], want)
    with pytest.raises(ValueError, match="kernel_size is missing"):
        functional.quantized_conv2d(x[:, :, None, None], None, s, t, codes=w.byte())
