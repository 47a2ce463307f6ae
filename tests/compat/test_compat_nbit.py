"""bitorch_engine's Q4 and Q8 layers (SEED_API section 7, C2) against transcriptions of the formulas in float64."""

import copy
import io
import math
import pickle
import types

import pytest
import torch
import torch.nn.functional as F


def cutlass():
    import bitorch_engine.layers.qlinear.nbit.cutlass as module

    return module


def functions():
    from bitorch_engine.layers.qlinear.nbit.cutlass import q4_layer, q8_layer

    return types.SimpleNamespace(q4=q4_layer.Q4LinearFunction, q8=q8_layer.Q8LinearFunction, matmul=q4_layer.Q4MatMulFunction)


def rounded(v, step, bits, eps=1e-5):
    s = max(float(torch.as_tensor(step).detach()), eps)
    return (v.double() / s).float().round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).double() * s


class Lsq(torch.autograd.Function):
    """v on a learned step, with the written gradients (section 2, common LSQ block)."""

    @staticmethod
    def forward(ctx, v, step, bits):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        u = v / step
        ctx.save_for_backward(u)
        ctx.range = low, high
        return step * u.round().clamp(low, high)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        low, high = ctx.range
        d = torch.where(u < low, float(low), torch.where(u > high, float(high), u.round() - u))
        return g * ((u >= low) & (u <= high)), (d * g).sum() / math.sqrt(u.numel() * high), None


def layer_of(kind, n, k, device, **options):
    layer = getattr(cutlass(), kind)(in_channels=k, out_channels=n, device=device, **options)
    layer.prepare_params()
    with torch.no_grad():
        layer.bias_a.normal_(0, 0.1)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, bits", [("Q4LinearCutlass", 4), ("Q8LinearCutlass", 8)])
@pytest.mark.parametrize("shape, n, k", [((32,), 16, 64), ((2, 3), 5, 33), ((), 7, 8), ((0,), 4, 8)])
def test_linear_forward_is_the_formula_and_packing_changes_no_bit(kind, bits, shape, n, k, dtype, device):
    layer = layer_of(kind, n, k, device)
    x = torch.randn(*shape, k, device=device).to(dtype)
    if not x.numel():
        with torch.no_grad():
            layer.scale_a.fill_(0.1)
    y = layer(x)
    assert y.shape == (*shape, n) and y.dtype == dtype  # Q6, Q8
    shifted = x + layer.bias_a.to(dtype)
    scale_w = 2 * layer.weight.abs().mean() / (5.6345 if bits == 4 else 11.269)
    torch.testing.assert_close(layer.scale_w, scale_w.detach())
    expected = rounded(shifted, layer.scale_a, bits) @ rounded(layer.weight, layer.scale_w, bits).t()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().sum() > 0)))
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert layer.weight is None and layer.qweight.dtype == torch.int8
    assert layer.qweight.shape == ((n, (k + 1) // 2) if bits == 4 else (n, k))
    assert torch.equal(layer(x), y)  # Q5, and the original's torch.equal(train, eval)


def test_q4_qweight_holds_the_nibbles_of_the_documented_layout():
    layer = cutlass().Q4LinearCutlass(in_channels=3, out_channels=2)
    layer.set_weight_data(torch.tensor([[1.0, -8.0, 7.0], [2.0, 3.0, -1.0]]))
    layer.prepare_params()
    layer.scale_w.fill_(1.0)
    layer.generate_quantized_weight()
    assert layer.qweight.view(torch.uint8).tolist() == [[0x18, 0x70], [0x23, 0xF0]]


def test_old_q4_checkpoint_loads_and_gives_the_stated_output(device):
    """A packed state as the original saved it: no weight, no flags."""
    state = {
        "bias_a": torch.tensor([0.0, 0.5, 0.0, 0.0]),
        "scale_a": torch.tensor(0.5),
        "scale_w": torch.tensor(0.25),
        "eps": torch.tensor(1e-5),
        "qweight": torch.tensor([[0x1F, 0x70], [0x80, 0x21]], dtype=torch.uint8).view(torch.int8),
    }
    layer = cutlass().Q4LinearCutlass(in_channels=4, out_channels=2).to(device).eval()
    layer.load_state_dict(state)
    w = 0.25 * torch.tensor([[1.0, -1.0, 7.0, 0.0], [-8.0, 0.0, 2.0, 1.0]])
    x = torch.tensor([[1.0, 0.5, -1.5, 9.0]])
    assert torch.equal(layer(x.to(device)).cpu(), torch.tensor([[1.0, 1.0, -1.5, 3.5]]) @ w.t())


@pytest.mark.parametrize("kind, bits", [("Q4LinearCutlass", 4), ("Q8LinearCutlass", 8)])
def test_X1_X6_Q8_Q9_linear_gradients_are_the_written_ones(kind, bits, device):
    layer = layer_of(kind, 5, 12, device)
    x = torch.randn(6, 12, device=device, requires_grad=True)
    layer(x.detach())  # initialises scale_a
    with torch.no_grad():
        layer.scale_a.mul_(1.5)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    xd, bias, weight = (t.detach().double().requires_grad_() for t in (x, layer.bias_a, layer.weight))
    step = layer.scale_a.detach().double().requires_grad_()
    (Lsq.apply(xd + bias, step, bits) @ Lsq.apply(weight, layer.scale_w.double(), bits).t()).backward(g.double())
    assert layer.scale_a.grad.shape == ()
    for ours, theirs in ((x, xd), (layer.bias_a, bias), (layer.weight, weight), (layer.scale_a, step)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    layer.zero_grad()
    layer.clip_weight_gradient = False
    layer(x).backward(g)
    expected = g.double().t() @ rounded(x.detach() + layer.bias_a.detach(), layer.scale_a, bits)
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_Q4_Q11_sixteen_bit_training_runs_and_scales_before_it_rounds(dtype, device):
    layer = cutlass().Q4LinearCutlass(in_channels=2048, out_channels=3, device=device)
    layer.set_weight_data(torch.full((3, 2048), 7.0, device=device))
    layer.prepare_params()
    layer.scale_a.data = torch.tensor(1.0, device=device)
    x = torch.full((2, 2048), 7.0, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)  # the integer sum is 7 * 7 * 2048 = 100352 or more, past float16
    assert torch.isfinite(y).all() or float(layer.scale_w) * 100352 > 65504
    y.sum().backward()
    assert x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


def test_X3_the_scale_is_at_least_eps_everywhere():
    layer = layer_of("Q4LinearCutlass", 3, 8, "cpu")
    x = torch.randn(4, 8)
    layer(x)
    layer.scale_a.data.fill_(-1.0)
    expected = rounded(x + layer.bias_a, -1.0, 4) @ rounded(layer.weight, layer.scale_w, 4).t()
    torch.testing.assert_close(layer(x).double(), expected)


def test_X4_eval_after_more_training_uses_the_new_weight():
    layer = layer_of("Q4LinearCutlass", 3, 8, "cpu")
    x = torch.randn(4, 8)
    layer(x)
    layer.training = False
    before = layer(x)
    layer.training = True
    layer(x)
    layer.weight.data.copy_(torch.randn(3, 8))  # unseen by version counters
    train = layer(x)
    layer.training = False
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), before)
    layer.prepare_params()
    layer.qweight = None
    layer.training = True
    train = layer(x)
    layer.training = False
    assert torch.equal(layer(x), train)


def test_X7_Q12_scales_keep_their_dtype_are_set_in_training_alone_and_once():
    layer = cutlass().Q4LinearCutlass(in_channels=8, out_channels=3, dtype=torch.bfloat16)
    layer.prepare_params()
    x = torch.randn(4, 8).bfloat16()
    layer.eval()
    layer(x)
    assert layer.scale_a == 0
    layer.train()
    layer(x)
    expected = 2 * x.float().abs().mean() / 11.269
    assert layer.scale_a.dtype == torch.float32 and torch.equal(layer.scale_a.detach(), expected)
    layer(10 * x)
    assert torch.equal(layer.scale_a.detach(), expected)
    with torch.no_grad():
        layer.scale_a.zero_()  # driven to 0 by training: it stays what it is
    layer(x)
    assert layer.scale_a == 0
    assert layer.state_dict()["scale_a_set"] and layer.weight.dtype == torch.bfloat16  # X10


def test_Q10_set_weight_data_leaves_the_weight_trainable():
    layer = cutlass().Q8LinearCutlass(in_channels=8, out_channels=3)
    layer.set_weight_data(torch.randn(3, 8))
    assert layer.weight.requires_grad
    with pytest.raises(ValueError, match="set_weight_data"):
        layer.set_weight_data(torch.randn(8, 3))


def test_Q7_scale_w_follows_the_weight_while_it_trains():
    layer = layer_of("Q4LinearCutlass", 3, 8, "cpu")
    with torch.no_grad():
        layer.weight.mul_(3)
    layer(torch.randn(2, 8))
    torch.testing.assert_close(layer.scale_w, 2 * layer.weight.detach().abs().mean() / 5.6345)


def test_init_lsq_is_an_option():
    layer = cutlass().Q4LinearCutlass(in_channels=8, out_channels=3, init="lsq")
    layer.prepare_params()
    x = torch.randn(4, 8)
    layer(x)
    torch.testing.assert_close(layer.scale_a.detach(), 2 * x.abs().mean() / math.sqrt(7))
    torch.testing.assert_close(layer.scale_w, 2 * layer.weight.detach().abs().mean() / math.sqrt(7))


def test_X9_X11_strided_inputs_and_gradients_in_eval():
    layer = layer_of("Q4LinearCutlass", 3, 8, "cpu")
    x = torch.randn(8, 5, 2).permute(2, 1, 0)
    layer(x)
    layer.eval()
    x = x.detach().requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer(x.detach().contiguous()))
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_wrong_features_are_refused_by_name():
    with pytest.raises(ValueError, match="9 features"):
        layer_of("Q4LinearCutlass", 3, 8, "cpu")(torch.randn(2, 9))


@pytest.mark.parametrize("kind, bits", [("q4", 4), ("q8", 8)])
def test_functions_take_float_and_packed_weights(kind, bits, device):
    layer = layer_of({"q4": "Q4LinearCutlass", "q8": "Q8LinearCutlass"}[kind], 5, 12, device)
    function = getattr(functions(), kind)
    x = torch.randn(6, 12, device=device, requires_grad=True)
    scale_a = torch.tensor(0.3, device=device, requires_grad=True)
    eps = torch.tensor(1e-5, device=device)
    y = function.apply(x, layer.weight, scale_a, layer.scale_w, eps, True)
    layer.generate_quantized_weight()
    packed = function.apply(x, layer.qweight, scale_a, layer.scale_w, eps, False)
    assert torch.equal(packed, y)
    y.sum().backward()
    context = types.SimpleNamespace()
    direct = function.forward(context, x, layer.weight, scale_a, layer.scale_w, eps, True)
    gradients = function.backward(context, torch.ones_like(direct))
    assert torch.equal(direct, y) and len(gradients) == 6 and gradients[5] is None
    # The gradient of a sum comes expanded, for which a library may choose another order of additions.
    assert gradients[2].shape == ()
    for got, want in zip(gradients, (x.grad, layer.weight.grad, scale_a.grad)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead, m, n, k", [((2, 12), 7, 7, 32), ((3,), 5, 2, 33), ((1,), 1, 1, 8), ((2, 0), 3, 4, 8)])
def test_Q1_Q3_matmul_is_batched_and_each_operand_has_its_own_step(lead, m, n, k, dtype, device):
    layer = cutlass().Q4MatMul(dtype=dtype, device=device)
    x, y = torch.randn(*lead, m, k, device=device).to(dtype), 5 * torch.randn(*lead, n, k, device=device).to(dtype)
    if not x.numel():
        with torch.no_grad():
            layer.x_clip.fill_(0.5), layer.y_clip.fill_(0.5)
    else:
        layer.set_activation_scale(x, y)
        assert torch.equal(layer.x_clip.detach(), (2 * x.float().abs().mean() / 11.269).to(dtype))
        assert torch.equal(layer.y_clip.detach(), (2 * y.float().abs().mean() / 11.269).to(dtype))
    out = layer(x, y)
    assert out.shape == (*lead, m, n) and out.dtype == dtype
    expected = rounded(x, layer.x_clip, 4) @ rounded(y, layer.y_clip, 4).mT
    torch.testing.assert_close(out.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_Q2_matmul_gradients_are_the_written_ones(device):
    x, y = torch.randn(2, 3, 5, 9, device=device, requires_grad=True), torch.randn(
        2, 3, 4, 9, device=device, requires_grad=True
    )
    clips = [torch.tensor(v, device=device, requires_grad=True) for v in (0.2, 0.35)]
    out = functions().matmul.apply(x, y, *clips, torch.tensor(1e-5), True)
    g = torch.randn_like(out)
    out.backward(g)
    d = [t.detach().double().requires_grad_() for t in (x, y, *clips)]
    (Lsq.apply(d[0], d[2], 4) @ Lsq.apply(d[1], d[3], 4).mT).backward(g.double())
    for ours, theirs in zip((x, y, *clips), d):
        assert ours.grad.shape == theirs.grad.shape
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_checkpoints_of_linear():
    layer = layer_of("Q4LinearCutlass", 3, 9, "cpu")
    x = torch.randn(4, 9)
    layer(x)
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = cutlass().Q4LinearCutlass(in_channels=9, out_channels=3).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))


def test_save_and_load_checkpoint_keep_the_live_model_trainable(tmp_path):
    from bitorch_engine.utils.model_helper import load_checkpoint, prepare_bie_layers, save_checkpoint

    def model():
        return torch.nn.Sequential(torch.nn.Linear(6, 8), cutlass().Q4LinearCutlass(in_channels=8, out_channels=4))

    first = model()
    prepare_bie_layers(first)
    x = torch.randn(5, 6)
    expected = first(x)
    save_checkpoint(first, tmp_path / "model.pt")
    assert first[1].weight is not None and torch.equal(first(x), expected)
    second = model().eval()
    load_checkpoint(second, tmp_path / "model.pt")
    assert torch.equal(second(x), expected) and second[1].weight is None


def test_a_small_training_falls(device):
    layer = torch.nn.Sequential(
        layer_of("Q4LinearCutlass", 32, 8, device), torch.nn.ReLU(), layer_of("Q8LinearCutlass", 1, 32, device)
    )
    x = torch.randn(256, 8, device=device)
    target = x[:, :1] * 2 - x[:, 1:2]
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- convolution


def conv(*args, **kwargs):
    from bitorch_engine.layers.qconv.nbit.cutlass import Q4Conv2dCutlass

    layer = Q4Conv2dCutlass(*args, **kwargs)
    layer.prepare_params()
    return layer


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (1, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("c, o, kernel", [(32, 32, 3), (3, 5, 1)])
def test_C2_C5_conv_is_a_convolution_and_packing_changes_no_bit(c, o, kernel, stride, padding, dilation, device):
    layer = conv(c, o, kernel, stride, padding, dilation, device=device)
    assert torch.isfinite(layer.weight).all() and layer.weight.abs().max() <= 1 / math.sqrt(c * kernel * kernel)
    with torch.no_grad():
        layer.bias_a.normal_(0, 0.1)
    x = torch.randn(2, c, 9, 7, device=device)
    y = layer(x)
    shifted = x + layer.bias_a.reshape(1, -1, 1, 1)
    expected = F.conv2d(
        rounded(shifted, layer.scale_a, 4), rounded(layer.weight, layer.scale_w, 4), None, stride, padding, dilation
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert layer.qweight.dtype == torch.int8 and layer.qweight.numel() == (o * c * kernel**2 + 1) // 2
    if c % 2 == 0:
        assert layer.qweight.shape == (o, kernel, kernel, c // 2)
    assert torch.equal(layer(x), y)


def test_conv_gradients_are_the_written_ones(device):
    layer = conv(4, 6, 3, padding=1, device=device)
    x = torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    xd, bias, weight, step = (t.detach().double().requires_grad_() for t in (x, layer.bias_a, layer.weight, layer.scale_a))
    quantized = Lsq.apply(xd + bias.reshape(1, -1, 1, 1), step, 4)
    F.conv2d(quantized, Lsq.apply(weight, layer.scale_w.double(), 4), padding=1).backward(g.double())
    for ours, theirs in ((x, xd), (layer.bias_a, bias), (layer.weight, weight), (layer.scale_a, step)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_X10_every_class_allocates_on_the_device_and_in_the_type_it_is_given():
    import subbyte.compat.binary as binary
    import subbyte.compat.embedding as embedding
    import subbyte.compat.mpq as mpq
    import subbyte.compat.nbit as nbit

    options = {"device": "meta", "dtype": torch.bfloat16}
    of_float32 = {"scale_w", "eps"}  # of Q4 and Q8 layers, as scale_a of the linear ones; and a table before prepare_params
    layers = [
        *(cls(64, 32, **options) for cls in (nbit.Q4LinearCutlass, nbit.Q8LinearCutlass)),
        *(cls(64, 32, **options) for cls in (binary.BinaryLinearCPP, binary.BinaryLinearCuda, binary.BinaryLinearCutlass)),
        *(cls(64, 32, 3, **options) for cls in (nbit.Q4Conv2dCutlass, binary.BinaryConv2dCPP, binary.BinaryConv2dCutlass)),
        nbit.Q4MatMul(**options),
        binary.BinaryMatMul(**options),
        binary.BMHA(64, 32, 4, **options),
        mpq.MPQLinearCuda(64, 32, **options),
        mpq.MBWQLinearCuda(64, 32, **options),
        embedding.BinaryEmbeddingCuda(num_embeddings=5, embedding_dim=6, **options),
    ]
    for layer in layers:
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        assert tensors and all(t.device.type == "meta" for t in tensors.values()), type(layer).__name__
        quantized = isinstance(layer, nbit._QuantizedLayer)
        allowed = of_float32 | ({"scale_a"} if quantized else set())
        allowed |= {"weight"} if isinstance(layer, embedding.BinaryEmbeddingCuda) else set()
        for name, t in tensors.items():
            if t.is_floating_point() and not (name in allowed and (quantized or name == "weight")):
                assert t.dtype == torch.bfloat16, (type(layer).__name__, name)


@pytest.mark.parametrize("kind", ["Q4LinearCutlass", "Q8LinearCutlass"])
def test_Q5_Q6_a_layer_without_its_float_weight_runs_on_inputs_of_any_leading_shape(kind, device):
    layer = layer_of(kind, 6, 33, device)
    x = torch.randn(2, 5, 33, device=device)
    layer(x)
    y = layer.eval()(x)
    layer.generate_quantized_weight(qweight_only=True)
    assert layer.weight is None and torch.equal(layer(x), y)
    for shape in ((10,), (1, 10), (5, 2, 1)):
        assert torch.equal(layer(x.reshape(*shape, 33)), y.reshape(*shape, 6))
    assert torch.equal(layer(x[0, 0]), y[0, 0]) and layer(x[:0]).shape == (0, 5, 6)
    with pytest.raises(ValueError, match=f"{kind}: x has 32 features, expected 33"):
        layer(x[..., :32])
