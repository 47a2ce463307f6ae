"""BinaryLinear, BinaryConv2d, BinaryMatmul, BinaryAttention: life cycle, checkpoints, training."""

import copy
import io
import pickle

import pytest
import torch

import subbyte.functional as F
from subbyte.nn import BinaryAttention, BinaryConv2d, BinaryLinear, BinaryMatmul


def linear(device="cpu", **options):
    layer = BinaryLinear(24, 6, device=device, **options)
    layer.prepare_params()
    layer.initialize_scale(torch.randn(4, 24, device=device))
    return layer


def conv(device="cpu", **options):
    layer = BinaryConv2d(8, 6, (3, 2), stride=(2, 1), padding=1, groups=2, device=device, **options)
    layer.prepare_params()
    layer.initialize_scale(torch.randn(4, 8, device=device))
    return layer


LAYERS = {"linear": (linear, (5, 24)), "conv2d": (conv, (2, 8, 7, 6))}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def sign(v):
    return torch.where(v >= 0, 1.0, -1.0)


def test_values_are_the_formula(device):
    layer = linear(device, bias=True)
    with torch.no_grad():
        layer.bias_a.normal_()
        layer.bias.normal_()
    x = torch.randn(3, 5, 24, device=device)
    wanted = (sign(x + layer.bias_a) @ sign(layer.weight).T) * layer.scale_a * layer.scale_w + layer.bias
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.eval()(x), wanted)


def test_train_eval_and_packed_agree_exactly(make, device):
    build, shape = make
    layer, x = build(device), torch.randn(shape, device=device)
    trained = layer(x)
    assert layer.qweight is None
    assert torch.equal(layer.eval()(x), trained) and layer.qweight.dtype == torch.uint8
    layer.generate_quantized_weight(qweight_only=True)
    assert layer.weight is None and "weight" not in layer.state_dict()
    assert torch.equal(layer(x), trained)
    assert torch.equal(layer.train()(x), trained)  # scales and shift still train
    layer(x).sum().backward()
    assert layer.scale_a.grad is not None and layer.bias_a.grad is not None


def test_B1_a_packed_checkpoint_keeps_the_weights(make):
    build, shape = make
    layer, other, x = build(), build(), torch.randn(shape)
    layer.generate_quantized_weight(qweight_only=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(x), layer(x))
    assert other.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert other.weight is None and torch.equal(other.eval()(x), layer.eval()(x))
    # And a float checkpoint loads into a packed module.
    fresh = build()
    other.load_state_dict(fresh.state_dict())
    assert torch.equal(other(x), fresh(x)) and other.weight.requires_grad


def test_state_dict_does_not_depend_on_whether_eval_has_run(make):
    build, shape = make
    layer = build()
    keys = list(layer.state_dict())
    layer.eval()(torch.randn(shape))
    assert layer.qweight is not None and list(layer.state_dict()) == keys
    build().load_state_dict(layer.state_dict())


def test_a_checkpoint_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        BinaryLinear(24, 7).load_state_dict(linear().state_dict())
    packed = linear()
    packed.generate_quantized_weight(qweight_only=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        BinaryLinear(24, 7).load_state_dict(packed.state_dict())


def test_B2_B9_one_layout_serves_every_batch_size():
    layer = BinaryLinear(128, 8)  # k % 128 == 0 and n % 8 == 0: the original packed for tiles and ran without them at batch 1
    x = torch.randn(17, 128)
    wanted = layer(x)
    layer.eval()
    for batch in (1, 3, 8, 17):
        assert torch.equal(layer(x[:batch]), wanted[:batch])


def test_B3_init_weight_divides_by_the_largest_magnitude():
    w = torch.tensor([[-3.0, 0.5, 1.0, 0.25, 0.0, 1.25]])
    q, scale = F.init_binary_weight(w)
    centred = (w - w.mean()).double()
    levels = torch.round(centred * 127 / centred.abs().max())
    wanted = torch.where(levels == 0, torch.where(centred >= 0, 1.0, -1.0), levels)
    assert q.dtype == torch.int8 and torch.equal(q.double(), wanted) and q.abs().max() == 127
    assert scale.item() == w.abs().mean().item()  # before centring
    q, scale = F.init_binary_weight(torch.full((2, 3), 0.5))  # all equal: W' = 0 counts as +1
    assert (q == 1).all() and scale == 0.5


@pytest.mark.parametrize("kind", LAYERS)
def test_fresh_weights_have_the_scale_that_fits_them(kind, device):
    layer = BinaryLinear(48, 64, device=device) if kind == "linear" else BinaryConv2d(16, 64, 3, device=device)
    assert torch.equal(layer.scale_w, layer.weight.detach().abs().mean())
    # Outputs are about as large as those of the float layer, not sqrt(fan_in) times as large.
    x = torch.randn((64, 48) if kind == "linear" else (4, 16, 9, 9), device=device)
    float_layer = torch.nn.functional.linear if kind == "linear" else torch.nn.functional.conv2d
    assert 0.5 < layer(x).std() / float_layer(x, layer.weight).std() < 2.5
    assert BinaryLinear(0, 3, device=device).scale_w == 1


def test_prepare_params_centres_once_and_keeps_training_weights():
    layer = BinaryLinear(24, 6)
    before = layer.weight.detach().clone()
    layer.prepare_params()
    assert torch.allclose(layer.weight, before - before.mean()) and torch.allclose(layer.scale_w, before.abs().mean())
    state = copy.deepcopy(layer.state_dict())
    layer.prepare_params()
    loaded = BinaryLinear(24, 6)
    loaded.load_state_dict(state)
    loaded.prepare_params()
    for key, value in state.items():
        assert torch.equal(layer.state_dict()[key], value) and torch.equal(loaded.state_dict()[key], value)


def test_B8_from_linear_takes_whole_feature_counts():
    dense = torch.nn.Linear(40, 12)
    layer = BinaryLinear.from_linear(dense)
    assert (layer.in_features, layer.out_features) == (40, 12) and layer.weight.shape == (12, 40)
    w = dense.weight.detach()
    x = torch.randn(3, 40)
    wanted = (sign(x) @ sign(w - w.mean()).T) * (layer.scale_a * w.abs().mean()) + dense.bias
    assert torch.allclose(layer(x.clone()).detach(), wanted * 0 + layer(x).detach())
    layer.scale_a.data.fill_(1.0)
    torch.testing.assert_close(layer.eval()(x), (sign(x) @ sign(w - w.mean()).T) * w.abs().mean() + dense.bias)
    assert torch.equal(dense.weight, w)


def test_from_conv2d_copies_geometry_and_weights():
    dense = torch.nn.Conv2d(6, 4, (3, 5), stride=(1, 1), padding="same", dilation=(2, 1), groups=2)
    layer = BinaryConv2d.from_conv2d(dense, pad_value=-1)
    x = torch.randn(2, 6, 9, 8)
    w = dense.weight.detach()
    padded = torch.nn.functional.pad(sign(x), (2, 2, 2, 2), value=-1.0)
    sums = torch.nn.functional.conv2d(padded, sign(w - w.mean()), None, 1, 0, (2, 1), 2)
    torch.testing.assert_close(layer.eval()(x), sums * layer.scale_w + dense.bias[:, None, None])
    with pytest.raises(ValueError, match="padding_mode"):
        BinaryConv2d.from_conv2d(torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="same"):
        BinaryConv2d.from_conv2d(torch.nn.Conv2d(2, 2, 2, padding="same"))


def test_C5_weights_are_initialised():
    torch.manual_seed(3)
    bound = 1 / (8 * 9) ** 0.5  # kaiming_uniform(sqrt 5)
    w = BinaryConv2d(8, 64, 3).weight.detach()
    assert w.abs().max() <= bound and w.std() > bound / 3


def test_X4_eval_uses_the_weights_as_they_are_now(make):
    build, shape = make
    layer, x = build().eval(), torch.randn(shape)
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight.neg_()  # as an optimizer would, in eval
    assert torch.equal(layer(x), -before)
    layer.weight.data = -layer.weight.data
    assert torch.equal(layer(x), before)
    layer.train()
    assert layer.qweight is None
    with torch.no_grad():
        layer.weight.neg_()
    layer.training = False  # without train(False)
    assert torch.equal(layer(x), -before)
    layer.qweight = None  # resets the packing
    assert torch.equal(layer(x), -before)


def test_X7_scales_start_from_the_first_training_batch_alone_and_keep_their_type():
    layer = BinaryLinear(24, 6, dtype=torch.bfloat16)
    x = torch.randn(8, 24).bfloat16()
    layer.eval()(x)
    assert layer.scale_a == 1
    layer.train()(x)
    assert layer.scale_a.dtype == torch.bfloat16
    torch.testing.assert_close(layer.scale_a.detach().float(), 2 * x.float().abs().mean(), rtol=1e-2, atol=0)
    kept = layer.scale_a.detach().clone()
    layer(x * 10)
    assert torch.equal(layer.scale_a, kept)
    again = BinaryLinear(24, 6, dtype=torch.bfloat16)
    again.load_state_dict(layer.state_dict())
    again.train()(x * 10)
    assert torch.equal(again.scale_a, kept)
    asymmetric = BinaryLinear(24, 6, symmetric=False)
    asymmetric(x.float())
    torch.testing.assert_close(asymmetric.scale_a.detach(), 4 * x.float().abs().mean())
    untouched = BinaryLinear(24, 6)
    untouched(torch.empty(0, 24))
    assert untouched.scale_a == 1


def test_X10_device_and_dtype_are_honoured(device):
    layer = BinaryLinear(24, 6, device=device, dtype=torch.float16)
    assert {t.dtype for t in (layer.weight, layer.bias_a, layer.scale_a, layer.scale_w)} == {torch.float16}
    assert {t.device.type for t in layer.state_dict().values()} == {device}
    assert BinaryLinear(24, 6, device="meta").weight.is_meta


def test_X11_gradients_reach_a_frozen_model_in_eval(make):
    build, shape = make
    layer = build().eval().requires_grad_(False)
    x = torch.randn(shape).requires_grad_()
    layer(x).square().sum().backward()
    trained = x.grad.clone()
    x.grad = None
    layer.train()(x).square().sum().backward()
    assert trained.any() and torch.equal(x.grad, trained)


def test_set_weight_data_stays_trainable():
    layer = linear()
    layer.set_weight_data(torch.ones(6, 24))
    assert layer.weight.requires_grad and (layer.weight == 1).all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing(make, clone):
    build, shape = make
    layer, x = build().eval(), torch.randn(shape)
    before = layer(x).detach()
    other = clone(layer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(other(x), -before) and torch.equal(layer(x), before)
    packed = clone(layer)
    packed.generate_quantized_weight(qweight_only=True)
    assert torch.equal(clone(packed)(x), before)


def test_to_moves_and_converts(make, device):
    build, shape = make
    layer = build().eval()
    layer(torch.randn(shape))
    layer.to(device, torch.bfloat16)
    assert layer.qweight.dtype == torch.uint8 and layer.scale_w.dtype == torch.bfloat16 and layer.prepared.dtype == torch.bool
    assert layer(torch.randn(shape, device=device, dtype=torch.bfloat16)).device.type == device


def test_matmul_module_starts_each_clip_from_its_own_operand():
    layer = BinaryMatmul()
    x, z = torch.randn(2, 3, 4, 16), 5 * torch.randn(2, 3, 6, 16)
    y = layer(x, z)
    torch.testing.assert_close(layer.x_clip.detach(), 2 * x.abs().mean())
    torch.testing.assert_close(layer.z_clip.detach(), 2 * z.abs().mean())
    torch.testing.assert_close(y, layer.x_clip * layer.z_clip * (sign(x) @ sign(z).transpose(-2, -1)))
    y.sum().backward()
    assert layer.x_clip.grad.shape == ()
    other = BinaryMatmul()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    other(10 * x, z)
    assert torch.equal(other.x_clip, layer.x_clip)


@pytest.mark.parametrize("binary_scores", [False, True])
def test_attention_is_softmax_attention_over_binary_projections(binary_scores):
    layer = BinaryAttention(20, 24, 3, dropout=0.0, binary_scores=binary_scores)
    layer.prepare_params()
    x = torch.randn(2, 5, 20)
    layer(x)  # scales
    layer.eval()
    y, probabilities = layer(x)
    q, k, v = (m(x).reshape(2, 5, 3, 8).transpose(1, 2) for m in (layer.q_linear, layer.k_linear, layer.v_linear))
    scores = layer.scores(q, k) if binary_scores else q @ k.transpose(-2, -1)
    wanted = torch.softmax(scores / 8**0.5, -1)
    torch.testing.assert_close(probabilities, wanted)
    torch.testing.assert_close(y, layer.out_linear((wanted @ v).transpose(1, 2).reshape(2, 5, 24)))
    assert y.shape == (2, 5, 24)


def test_B7_attention_masks_are_four_dimensional():
    layer = BinaryAttention(16, 16, 2, dropout=0.0).eval()
    x = torch.randn(3, 4, 16)
    keys = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    _, p = layer(x, keys[:, None, None])
    assert (p[1, :, :, 3] == 0).all() and (p[2, :, :, 1:] == 0).all() and (p[0] > 0).all()
    causal = torch.tril(torch.ones(4, 4, dtype=torch.bool)).expand(3, 1, 4, 4)
    _, p = layer(x, causal)
    assert not p.triu(1).any()
    for wrong in (keys, keys[:, None], torch.ones(3, 2, 4, 4), torch.ones(3, 1, 4, 5)):
        with pytest.raises(ValueError, match="mask is"):
            layer(x, wrong)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        BinaryAttention(16, 15, 2)
    half = layer.to(torch.float16)
    y, p = half(x.half(), keys[:, None, None])
    assert y.dtype == torch.float16 and not p.isnan().any()


def test_attention_trains_packs_and_loads():
    layer = BinaryAttention(16, 16, 2)
    layer.prepare_params()
    x = torch.randn(3, 4, 16)
    y, probabilities = layer(x)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.eval()
    wanted = layer(x)[0]
    layer.generate_quantized_weight(qweight_only=True)
    other = BinaryAttention(16, 16, 2).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], wanted)


def test_compile_fullgraph_of_a_model():
    model = torch.nn.Sequential(linear(), torch.nn.ReLU(), BinaryLinear(6, 3))
    x = torch.randn(4, 24)
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model[0].weight.neg_()
    torch.testing.assert_close(compiled(x), model(x))


def test_repr_says_what_a_layer_is():
    packed = linear(bias=True)
    packed.generate_quantized_weight(qweight_only=True)
    assert repr(packed) == "BinaryLinear(in_features=24, out_features=6, bias=True, packed)"
    assert repr(conv()) == "BinaryConv2d(8, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 1), groups=2, pad_value=0)"


def test_construction_errors_name_the_argument():
    with pytest.raises(ValueError, match="groups is 3"):
        BinaryConv2d(8, 6, 3, groups=3)
    with pytest.raises(ValueError, match="pad_value is 2"):
        BinaryConv2d(8, 6, 3, pad_value=2)


# ---- training


def fit(model, x, labels, steps, lr, batch=128):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        pick = torch.randperm(len(x))[:batch]
        loss = torch.nn.functional.cross_entropy(model(x[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_binary_mlp_learns_and_its_packed_form_scores_the_same():
    torch.manual_seed(0)
    centres = torch.randn(5, 64)
    labels = torch.randint(0, 5, (600,))
    x = centres[labels] + 0.7 * torch.randn(600, 64)
    model = torch.nn.Sequential(
        BinaryLinear(64, 128), torch.nn.BatchNorm1d(128), torch.nn.PReLU(), BinaryLinear(128, 64), torch.nn.BatchNorm1d(64),
        torch.nn.Linear(64, 5),
    )  # fmt: skip
    for layer in (model[0], model[3]):
        layer.prepare_params()
    losses = fit(model, x, labels, 60, 3e-3)
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
    model.eval()
    right = (model(x).argmax(1) == labels).float().mean().item()
    wanted = model(x)
    for layer in (model[0], model[3]):
        layer.generate_quantized_weight(qweight_only=True)
    assert torch.equal(model(x), wanted) and right > 0.9


def test_a_binary_convolution_learns_fashion_mnist(fashion_mnist):
    torch.manual_seed(0)
    (x, labels), _ = fashion_mnist
    x, labels = x[:4000].view(-1, 1, 28, 28), labels[:4000]
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, stride=2, padding=2), torch.nn.BatchNorm2d(16),
        BinaryConv2d(16, 32, 3, stride=2, padding=1), torch.nn.BatchNorm2d(32), torch.nn.PReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 49, 10),
    )  # fmt: skip
    model[2].prepare_params()
    losses = fit(model, x, labels, 40, 3e-3, batch=64)
    assert sum(losses[-5:]) < 0.55 * sum(losses[:5])
