"""bitorch_engine's one-bit layers (SEED_API sections 9 and 10) against transcriptions in plain PyTorch."""

import copy
import io
import math
import pickle

import numpy
import pytest
import torch
import torch.nn.functional as F


def linear():
    import bitorch_engine.layers.qlinear.binary as binary
    import bitorch_engine.layers.qlinear.binary.cpp
    import bitorch_engine.layers.qlinear.binary.cuda
    import bitorch_engine.layers.qlinear.binary.cutlass  # noqa: F401

    return binary


def conv(kind, *args, **kwargs):
    import bitorch_engine.layers.qconv.binary as binary
    import bitorch_engine.layers.qconv.binary.cpp
    import bitorch_engine.layers.qconv.binary.cutlass  # noqa: F401

    return (binary.cpp.BinaryConv2dCPP if kind == "cpp" else binary.cutlass.BinaryConv2dCutlass)(*args, **kwargs)


def scaled_layers():
    return [linear().cuda.BinaryLinearCuda, linear().cutlass.BinaryLinearCutlass]


def sign(v):
    return torch.where(v >= 0, 1.0, -1.0).to(torch.float64)


# ---- BinaryLinearCPP


@pytest.mark.parametrize("m", [64, 1024])
@pytest.mark.parametrize("k, n", [(64, 20), (1024, 128), (1000, 33), (13, 5)])
def test_cpp_linear_equals_sign_sign_exactly(m, k, n, device):
    layer = linear().cpp.BinaryLinearCPP(k, n, device=device)
    x = torch.randn(m, k, device=device)
    expected = (sign(x) @ sign(layer.weight).t()).float()
    assert torch.equal(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.reshape(2, m // 2, k)), expected.reshape(2, m // 2, n))  # B1


@pytest.mark.parametrize("n", [512, 1000])
@pytest.mark.parametrize("k", [64, 512])
def test_cpp_weight_packing_is_get_binary_col_byte_for_byte(n, k):
    from bitorch_engine.utils.quant_operators import get_binary_col

    layer = linear().cpp.BinaryLinearCPP(k, n)
    x = torch.randn(16, k)
    train = layer(x)
    assert layer.opt_weight is layer.weight
    layer.eval()
    layer.generate_quantized_weight(qweight_only=True)
    assert layer.weight is None and layer.opt_weight is layer.qweight
    fresh = linear().cpp.BinaryLinearCPP(k, n)
    fresh.generate_quantized_weight()
    expected = get_binary_col(fresh.weight.detach().t().reshape(-1), torch.zeros(k * n // 8, dtype=torch.uint8), k, n, 8)
    assert fresh.qweight.dtype == torch.uint8 and torch.equal(fresh.qweight, expected)
    by_numpy = numpy.packbits(fresh.weight.detach().numpy() >= 0, axis=-1, bitorder="little").T.reshape(-1)
    assert numpy.array_equal(fresh.qweight.numpy(), by_numpy)
    assert torch.equal(layer(x), train)


def test_B1_a_packed_checkpoint_keeps_the_weights(tmp_path):
    from bitorch_engine.utils.model_helper import load_checkpoint, save_checkpoint

    model = torch.nn.Sequential(linear().cpp.BinaryLinearCPP(24, 10))
    x = torch.randn(3, 24)
    expected = model(x)
    save_checkpoint(model, tmp_path / "m.pt")
    other = torch.nn.Sequential(linear().cpp.BinaryLinearCPP(24, 10)).eval()
    load_checkpoint(other, tmp_path / "m.pt")
    assert torch.equal(other(x), expected) and list(other.state_dict()) == ["0.qweight"]
    assert model[0].weight is not None


# ---- the layers with scales


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, k, n", [((32,), 128, 24), ((2, 3), 65, 7), ((1,), 256, 8)])
def test_B2_B9_B10_scaled_linear_is_the_formula_and_packing_changes_no_bit(which, symmetric, dtype, shape, k, n, device):
    layer = scaled_layers()[which](k, n, device=device, symmetric=symmetric)
    weight = layer.weight.detach().clone()
    layer.prepare_params()
    assert layer.weight.dtype == torch.int8 and layer.weight.requires_grad
    centred = weight - weight.mean()
    assert torch.equal(sign(layer.weight), sign(centred)) and torch.equal(layer.scale_w.detach(), weight.abs().mean())
    assert layer.weight.detach().abs().max() == 127
    with torch.no_grad():
        layer.bias_a.normal_(0, 0.1)
    x = torch.randn(*shape, k, device=device).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape, n)
    torch.testing.assert_close(layer.scale_a.detach(), (2 if symmetric else 4) * x.float().abs().mean())
    shifted = x + layer.bias_a.to(dtype)
    expected = (sign(shifted) @ sign(layer.weight).t()) * layer.scale_a.double() * layer.scale_w.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
    if dtype == torch.float32:  # the original's exact equality
        assert torch.equal(y, (sign(shifted) @ sign(layer.weight).t()).float() * layer.scale_a * layer.scale_w)
    layer.eval()
    assert torch.equal(layer(x), y)
    layer.generate_quantized_weight(qweight_only=True)
    assert torch.equal(layer(x), y)


def place(layout, n_total, k_total, n, k):
    """(byte, bit) of element (n, k), from section 3."""
    if layout == "btc":
        return ((n // 8 * (k_total // 128) + k // 128) * 8 + n % 8) * 16 + k % 128 // 8, 7 - k % 8
    padded = 32 * -(-n_total // 32)
    return 4 * (k // 32 * padded + n) + k % 32 // 8, 7 - k % 8


@pytest.mark.parametrize(
    "bmm, k, n, layout",
    [("BSTC32", 64, 32, "bstc"), ("BTC32", 256, 16, "btc"), ("ADAPTIVE", 128, 8, "btc"), ("ADAPTIVE", 96, 8, "bstc")],
)
def test_cuda_layer_packs_the_documented_layouts(bmm, k, n, layout, device):
    binary = linear().cuda
    layer = binary.BinaryLinearCuda(k, n, bmm_type=binary.BMM[bmm], device=device)
    layer.prepare_params()
    layer.generate_quantized_weight()
    assert torch.equal(binary.BinaryLinearCuda.w_pack(layer.weight, layer.bmm_type), layer.qweight)
    assert [member.value for member in (binary.BMM.BSTC32, binary.BMM.BTC32, binary.BMM.ADAPTIVE)] == [1, 2, 3]
    stored, weight = layer.qweight.cpu(), layer.weight.detach().cpu()
    if layout == "btc" or n % 32 == 0:
        assert stored.shape == (n * k // 8,)
    rows = [(a, b) for a in range(n) for b in range(k)]
    for a, b in rows[:: max(1, len(rows) // 300)]:
        byte, bit = place(layout, n, k, a, b)
        assert (int(stored[byte]) // 2**bit) % 2 == int(weight[a, b] >= 0)


def test_B4_bstc_pads_and_a_truncated_old_buffer_is_refused_where_weights_are_lost():
    binary = linear().cuda
    layer = binary.BinaryLinearCuda(40, 5, bmm_type=binary.BMM.BSTC32)
    layer.prepare_params()
    x = torch.randn(3, 40)
    y = layer(x)
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert torch.equal(layer(x), y) and layer.qweight.numel() == 4 * 2 * 32
    layer.qweight = layer.qweight[: 5 * 40 // 8].clone()
    with pytest.raises(ValueError, match="relayout|layout"):
        layer(x)


def test_B4_a_truncated_old_buffer_that_holds_all_weights_is_read():
    binary = linear().cuda
    layer = binary.BinaryLinearCuda(32, 8, bmm_type=binary.BMM.BSTC32)
    layer.prepare_params()
    x = torch.randn(3, 32)
    y = layer(x)
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert layer.qweight.numel() == 128  # one block of 32 rows, padded to 32 columns; the original kept n k / 8 bytes
    layer.qweight = layer.qweight[: 8 * 32 // 8].clone()
    assert torch.equal(layer(x), y)


def test_B9_batch_one_in_eval_reads_the_same_weights():
    layer = linear().cuda.BinaryLinearCuda(128, 8)
    layer.prepare_params()
    x = torch.randn(9, 128)
    y = layer(x)
    layer.eval()
    for i in range(9):
        assert torch.equal(layer(x[i : i + 1]), y[i : i + 1])
    binary = linear().cuda
    assert torch.equal(layer(x, binary.BMM.BSTC32), y)  # B2: the constructor's layout holds


def test_cutlass_layer_equals_the_cuda_layer_and_takes_its_tensors(device):
    cuda_layer, cutlass_layer = (cls(64, 24, device=device) for cls in scaled_layers())
    cuda_layer.prepare_params()
    cutlass_layer.prepare_params()
    x = torch.randn(8, 64, device=device)
    y = cuda_layer(x)
    cutlass_layer.weight.data = cuda_layer.weight.data
    cutlass_layer.scale_a = cuda_layer.scale_a
    cutlass_layer.scale_w.data = cuda_layer.scale_w.data
    assert torch.equal(cutlass_layer(x), y)
    assert cutlass_layer.gemm_kernel_id == 3 and not cutlass_layer.scale_w.requires_grad
    cutlass_layer.generate_quantized_weight()
    bits = numpy.packbits(cutlass_layer.weight.detach().cpu().numpy() >= 0, axis=-1, bitorder="little")
    assert cutlass_layer.qweight.shape == (24, 8) and numpy.array_equal(cutlass_layer.qweight.cpu().numpy(), bits)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("prepared", [True, False])
def test_X1_X6_X8_B5_linear_gradients_are_the_written_ones(which, prepared, device):
    k, n = 40, 6
    layer = scaled_layers()[which](k, n, device=device)
    if prepared:
        layer.prepare_params()
    with torch.no_grad():
        layer.scale_a.fill_(0.8)
        layer.scale_w.fill_(0.3)
        layer.bias_a.normal_(0, 0.1)
    x = torch.randn(5, k, device=device)
    x[0, :3] = -layer.bias_a.detach()[:3]  # X8: sign(0) = +1
    x.requires_grad_()
    g = torch.randn(5, n, device=device)
    layer(x).backward(g)
    shifted = (x + layer.bias_a).detach().double()
    w, gd = sign(layer.weight.detach()), g.double()
    unmasked = 0.3 * gd @ w
    mask = (shifted / 0.8).abs() <= 1
    torch.testing.assert_close(x.grad.double(), mask * unmasked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias_a.grad.double(), (mask * unmasked).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), 0.8 * gd.t() @ sign(shifted), rtol=1e-5, atol=1e-5)
    expected = (unmasked * sign(shifted)).sum() / math.sqrt(x.numel())
    assert layer.scale_a.grad.shape == ()
    torch.testing.assert_close(layer.scale_a.grad.double(), expected, rtol=1e-5, atol=1e-5)
    once = layer.weight.grad.clone()
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, 2 * once)  # B5: gradients accumulate as they are


def test_X3_a_scale_that_training_drives_below_zero_counts_as_the_smallest_one():
    layer = linear().cuda.BinaryLinearCuda(16, 4)
    layer.prepare_params()
    x = torch.randn(3, 16)
    layer(x)
    layer.scale_a.data.fill_(-1.0)
    y = layer(x)
    expected = (sign(x) @ sign(layer.weight).t()) * 1e-5 * layer.scale_w.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    (y * torch.randn_like(y)).sum().backward()
    assert layer.scale_a.grad != 0  # it can come back


def test_X11_gradients_flow_in_eval():
    layer = linear().cuda.BinaryLinearCuda(16, 4)
    layer.prepare_params()
    layer(torch.randn(2, 16))
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    x = (0.1 * torch.randn(2, 16)).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_X4_training_after_an_eval_refreshes_the_packed_weight():
    layer = linear().cutlass.BinaryLinearCutlass(16, 4)
    layer.prepare_params()
    x = torch.randn(2, 16)
    y = layer(x)
    layer.training = False
    assert torch.equal(layer(x), y)
    layer.training = True
    layer(x)
    layer.weight.data.neg_()
    layer.training = False
    assert torch.equal(layer(x), -y)
    layer.qweight = None
    assert torch.equal(layer(x), -y)


def test_copies_and_checkpoints_of_scaled_layers():
    layer = linear().cuda.BinaryLinearCuda(24, 8)
    layer.prepare_params()
    x = torch.randn(3, 24)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert sorted(state) == ["bias_a", "scale_a", "scale_a_set", "scale_w", "weight"] and state["weight"].dtype == torch.int8
    loaded = linear().cuda.BinaryLinearCuda(24, 8)
    loaded.load_state_dict(state)
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y) and type(other.weight) is linear().BinaryLinearParameter


@pytest.mark.parametrize("kind", ["cpp_col", "bstc", "btc", "pack8"])
def test_old_packed_checkpoints_of_the_four_layouts_load(kind):
    """Bytes made bit by bit from section 3, not by our packing."""
    binary, (n, k) = linear(), (8, 128)
    w = torch.where(torch.randn(n, k) >= 0, 1.0, -1.0)
    if kind in ("bstc", "btc"):
        size = n * k // 8 if kind == "btc" else 4 * (k // 32) * 32
        stored = [0] * size
        for a in range(n):
            for b in range(k):
                byte, bit = place(kind, n, k, a, b)
                stored[byte] += 2**bit * int(w[a, b] > 0)
        qweight = torch.tensor(stored, dtype=torch.uint8)
        layer = binary.cuda.BinaryLinearCuda(
            k, n, bmm_type=binary.cuda.BMM.BSTC32 if kind == "bstc" else binary.cuda.BMM.ADAPTIVE
        )
    else:
        rows = [[sum(2**i * int(w[a, 8 * j + i] > 0) for i in range(8)) for j in range(k // 8)] for a in range(n)]
        qweight = torch.tensor(rows, dtype=torch.uint8)
        if kind == "cpp_col":
            qweight = qweight.t().reshape(-1)
        layer = binary.cpp.BinaryLinearCPP(k, n) if kind == "cpp_col" else binary.cutlass.BinaryLinearCutlass(k, n)
    state = {"qweight": qweight}
    factor = 1.0
    if kind != "cpp_col":
        state.update(bias_a=torch.zeros(k), scale_a=torch.tensor(0.5), scale_w=torch.tensor(0.25))
        factor = 0.125
    layer.load_state_dict(state)
    layer.eval()
    x = torch.randn(3, k)
    assert torch.equal(layer(x), (sign(x).float() @ w.t()) * factor)


@pytest.mark.parametrize("cls", range(2))
def test_training_with_flips_falls(cls, device):
    from subbyte.compat.binary import BinaryLinearParameter

    layer = scaled_layers()[cls](32, 4, device=device)
    layer.prepare_params()
    x = torch.randn(256, 32, device=device)
    target = (sign(x) @ sign(torch.randn(4, 32, device=device)).t()).float()
    state = BinaryLinearParameter.initial_state(layer.weight, torch.zeros(4, 32, device=device), torch.float32)
    step, losses = torch.zeros(1), []
    for _ in range(60):
        layer.zero_grad()
        y = layer(x)
        loss = F.mse_loss(y / (layer.scale_a * layer.scale_w).detach(), target)
        loss.backward()
        BinaryLinearParameter.update(layer.weight, **state, step=step, lr=1e-3, beta1=0.5, beta2=0.9)
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and step == 60


def test_binary_update_is_the_written_rule():
    from subbyte.compat.binary import BinaryLinearParameter

    w = BinaryLinearParameter(torch.tensor([[5, -7, 1, -1]], dtype=torch.int8))
    s, average = torch.tensor([[-1e-3, 1e-3, -1e-9, 1e-9]]), torch.zeros(1, 4)
    expected_s, expected_l, values = s.clone(), average.clone(), w.detach().clone().float()
    g, step = torch.tensor([[1.0, 1.0, 1.0, -1.0]]), torch.zeros(1)
    for _ in range(3):
        BinaryLinearParameter.update(w, s, average, step, lr=1e-3, beta1=0.9, beta2=0.99, grad=g)
        expected_l += 0.1 * (g - expected_l)
        expected_s += 0.01 * (1e-3 * expected_l.sign() - expected_s)
        wanted = torch.where(expected_s <= 0, 1.0, -1.0)
        values = torch.where(wanted * values < 0, -values, values)
    torch.testing.assert_close(s, expected_s)
    assert torch.equal(w.detach().float(), values) and w.tolist() == [[5, -7, -1, 1]]


# ---- matmul


@pytest.mark.parametrize("lead, m, n, k", [((12,), 7, 7, 32), ((2, 3), 5, 4, 129), ((1,), 1, 1, 8)])
def test_B6_matmul_is_batched_with_the_true_k(lead, m, n, k, device):
    layer = linear().cutlass.BinaryMatMul(device=device)
    x = torch.randn(*lead, m, k, device=device, requires_grad=True)
    y = (3 * torch.randn(*lead, n, k, device=device)).requires_grad_()
    out = layer(x, y)
    xc, yc = 2 * x.detach().abs().mean(), 2 * y.detach().abs().mean()
    torch.testing.assert_close(layer.x_clip.detach(), xc)
    torch.testing.assert_close(layer.y_clip.detach(), yc)
    expected = (sign(x) @ sign(y).mT) * float(xc) * float(yc)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(out)
    out.backward(g)
    to_x, to_y = float(yc) * g.double() @ sign(y), float(xc) * g.double().mT @ sign(x)
    for v, clip, parameter, to_v in ((x, xc, layer.x_clip, to_x), (y, yc, layer.y_clip, to_y)):
        torch.testing.assert_close(v.grad.double(), to_v * ((v.detach() / clip).abs() <= 1), rtol=1e-5, atol=1e-5)
        expected = (to_v * sign(v.detach())).sum() / math.sqrt(v.numel())
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-4)


# ---- convolution


@pytest.mark.parametrize(
    "c, o, ks, stride, padding, dilation",
    [(8, 5, 3, 1, 1, 1), (32, 16, 7, 2, 3, 1), (8, 4, 1, 1, 0, 1), (5, 3, 3, 2, 2, 2), (64, 8, 5, 1, 2, 1)],
)
def test_C3_C4_C5_cpp_conv_equals_sign_sign_with_borders_of_minus_one(c, o, ks, stride, padding, dilation, device):
    layer = conv("cpp", c, o, ks, stride, padding, dilation, device=device)
    assert torch.isfinite(layer.weight).all() and layer.weight.detach().std() > 0
    x = torch.randn(2, c, 14, 11, device=device)
    padded = F.pad(sign(x), (padding,) * 4, value=-1.0)
    expected = F.conv2d(padded, sign(layer.weight), None, stride, 0, dilation).float()
    assert torch.equal(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), expected)
    layer.generate_quantized_weight(qweight_only=True)
    assert torch.equal(layer(x), expected) and layer.qweight.shape == ((o * c * ks * ks + 7) // 8,)


def test_cpp_conv_packs_one_stream():
    layer = conv("cpp", 8, 3, 3)
    layer.generate_quantized_weight()
    bits = numpy.packbits(layer.weight.detach().flatten().numpy() >= 0, bitorder="little")
    assert numpy.array_equal(layer.qweight.numpy(), bits)


@pytest.mark.parametrize("pad_value", [0, -1])
def test_C1_cutlass_conv_is_a_convolution_with_its_gradients(pad_value, device):
    layer = conv("cutlass", 8, 4, 3, padding=1, device=device, pad_value=pad_value)
    assert conv("cutlass", 8, 4, 3).pad_value == 0
    layer.prepare_params()
    with torch.no_grad():
        layer.bias_a.normal_(0, 0.1)
    x = torch.randn(2, 8, 6, 7, device=device, requires_grad=True)
    y = layer(x)
    sa, sw = float(layer.scale_a.detach()), float(layer.scale_w)
    shifted = (x + layer.bias_a.reshape(1, -1, 1, 1)).detach().double()

    def product(signs, w):
        return F.conv2d(F.pad(signs, (1,) * 4, value=float(pad_value)), w)

    signs, w = sign(shifted).requires_grad_(), sign(layer.weight.detach()).requires_grad_()
    torch.testing.assert_close(y.double(), sa * sw * product(signs, w).detach(), rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    product(signs, w).backward(g.double())
    mask = (shifted / sa).abs() <= 1
    torch.testing.assert_close(x.grad.double(), mask * signs.grad * sw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), w.grad * sa, rtol=1e-4, atol=1e-5)
    assert layer.bias_a.grad.shape == (8,)
    layer.eval()
    packed = layer(x)
    assert torch.equal(packed, y) and layer.qweight.shape == (4, 3, 3, 1)
    torch.testing.assert_close(F.layer_norm(packed, packed.shape[1:]), F.layer_norm(y, y.shape[1:]))


# ---- attention, wrapper, conversion


def test_B7_attention_is_the_formula_and_masks_keys(device):
    from bitorch_engine.layers.qmha.binary import BMHA

    block = BMHA(16, 24, 3, device=device).eval()
    for layer in (block.q_linear, block.k_linear, block.v_linear, block.out_linear):
        assert type(layer) is linear().cutlass.BinaryLinearCutlass
        layer.prepare_params()
        layer.scale_a.data.fill_(0.7)
    x = torch.randn(2, 5, 16, device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device)
    output, probabilities = block(x, mask)

    def heads(layer):
        y = (sign(x) @ sign(layer.weight).t()) * float(layer.scale_a.detach()) * float(layer.scale_w)
        return y.reshape(2, 5, 3, 8).transpose(1, 2)

    scores = heads(block.q_linear) @ heads(block.k_linear).mT / math.sqrt(8)
    expected = torch.softmax(scores.masked_fill(mask[:, None, None] == 0, -1e9), -1)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-4, atol=1e-5)
    assert output.shape == (2, 5, 24) and not probabilities[0, :, :, 3:].any()
    torch.testing.assert_close(block(x, mask[:, None, None])[1], probabilities)
    with pytest.raises(ValueError, match="num_heads"):
        BMHA(16, 24, 5)
    block.train()
    block(x)[0].sum().backward()
    assert block.q_linear.weight.grad is not None


def test_learnable_bias():
    from bitorch_engine.layers.qmha.binary.layer import LearnableBias

    bias = LearnableBias(4)
    bias.bias.data.copy_(torch.arange(4.0))
    assert torch.equal(bias(torch.zeros(2, 3, 4)), torch.arange(4.0).expand(2, 3, 4))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_qlinear_inf(bits):
    from bitorch_engine.layers.qlinear import QLinearInf

    layer = QLinearInf(32, 8, a_bit=bits, w_bit=bits)
    weight = torch.randn(8, 32)
    layer.set_weight_data(weight)
    layer.prepare_params()
    x = torch.randn(4, 32)
    y = layer(x)
    layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert torch.equal(layer(x), y) and layer.weight is None
    with pytest.raises(AssertionError, match="bias"):
        QLinearInf(32, 8, bias=True)
    with pytest.raises(ValueError, match="a_bit"):
        QLinearInf(32, 8, a_bit=1, w_bit=4)


def test_binary_linear_is_the_class_for_this_machine():
    expected = linear().cuda.BinaryLinearCuda if torch.cuda.is_available() else linear().cpp.BinaryLinearCPP
    assert linear().BinaryLinear is expected


@pytest.mark.parametrize("kind", ["q4_linear_cutlass", "binary_linear_cuda"])
def test_conversion_copies_weights_and_warns_of_the_bias(kind):
    import bitorch_engine.utils.convert as convert

    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False)))
    weights = [model[0].weight.detach().clone(), model[1][0].weight.detach().clone()]
    with pytest.warns(UserWarning, match="bias") as warned:
        getattr(convert, f"quantize_linear_with_{kind}")(model, ["0", "1.0"])
    assert len(warned) == 1
    for layer, weight in zip((model[0], model[1][0]), weights):
        if kind.startswith("q4"):
            assert torch.equal(layer.weight.detach(), weight)
        else:
            assert torch.equal(sign(layer.weight), sign(weight - weight.mean()))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[..., 16\]"):
        linear().cpp.BinaryLinearCPP(16, 4)(torch.randn(2, 17))
    with pytest.raises(ValueError, match="set_weight_data"):
        linear().cpp.BinaryLinearCPP(16, 4).set_weight_data(torch.randn(16, 4))
    with pytest.raises(ValueError, match="bmm_type"):
        linear().cuda.BinaryLinearCuda(64, 4, bmm_type=linear().cuda.BMM.BTC32)


def test_X8_a_weight_of_zero_is_plus_one_in_training_and_packed(device):
    for make in (
        lambda: linear().cpp.BinaryLinearCPP(16, 3, device=device),
        *(lambda cls=cls: cls(16, 3, device=device) for cls in scaled_layers()),
        lambda: conv("cpp", 8, 3, 2, device=device),
        lambda: conv("cutlass", 8, 3, 2, device=device),
    ):
        layer = make()
        layer.prepare_params()
        with torch.no_grad():
            layer.weight.data = torch.zeros_like(layer.weight.data)
        x = torch.randn((5, 16) if layer.weight.dim() == 2 else (2, 8, 3, 3), device=device)
        y = layer(x)
        ones = torch.ones(layer.weight.shape, dtype=torch.float64, device=device)
        sums = sign(x) @ ones.t() if ones.dim() == 2 else F.conv2d(sign(x), ones)
        scale = layer.scale_a.double() * layer.scale_w.double() if hasattr(layer, "scale_a") else 1.0
        torch.testing.assert_close(y.double(), sums * scale, rtol=1e-6, atol=0)
        assert torch.equal(layer.eval()(x), y)


def test_B2_qweight_has_the_layout_of_the_constructor_until_forward_names_another(device):
    BMM = linear().cuda.BMM
    packed = {}
    for bmm_type in (BMM.BSTC32, BMM.BTC32, BMM.ADAPTIVE):
        torch.manual_seed(5)
        layer = linear().cuda.BinaryLinearCuda(256, 16, bmm_type=bmm_type, device=device)
        layer.prepare_params()
        x = torch.randn(3, 256, device=device)
        y = layer(x)
        assert torch.equal(layer.eval()(x), y) and layer.bmm_type is bmm_type
        assert torch.equal(layer.qweight, layer.w_pack(layer.weight.float(), bmm_type))
        packed[bmm_type] = layer.qweight
        for given in (BMM.BSTC32, BMM.BTC32, BMM.ADAPTIVE):
            assert torch.equal(layer(x, given), y) and torch.equal(layer(x), y) and layer.bmm_type is given
            assert torch.equal(layer.qweight, layer.w_pack(layer.weight.float(), given))
    assert torch.equal(packed[BMM.BTC32], packed[BMM.ADAPTIVE]) and not torch.equal(packed[BMM.BTC32], packed[BMM.BSTC32])


def test_forward_reads_a_given_qweight_in_the_layout_it_is_told(device):
    """What comes from w_pack or a checkpoint is in the layout that forward's bmm_type names."""
    cuda = linear().cuda
    layer = cuda.BinaryLinearCuda(256, 64, device=device)
    layer.prepare_params()
    x = torch.randn(8, 256, device=device)
    y = layer(x)
    layer.eval()
    for bmm_type in (cuda.BMM.BTC32, cuda.BMM.BSTC32, cuda.BMM.ADAPTIVE):
        layer.set_quantized_weight_data(cuda.BinaryLinearCuda.w_pack(layer.weight, bmm_type=bmm_type))
        assert torch.equal(layer(x, bmm_type=bmm_type), y)
        assert layer.bmm_type is bmm_type and torch.equal(layer(x), y)
    saved = cuda.BinaryLinearCuda(256, 64, device=device)
    layer(x, cuda.BMM.BSTC32)
    layer.generate_quantized_weight(qweight_only=True)
    saved.eval().load_state_dict(layer.state_dict())
    assert torch.equal(saved(x, cuda.BMM.BSTC32), y)


def test_forward_changes_the_layout_of_a_qweight_the_layer_has_packed(device):
    cuda = linear().cuda
    layer = cuda.BinaryLinearCuda(256, 64, device=device)
    layer.prepare_params()
    x = torch.randn(8, 256, device=device)
    y = layer(x)
    weight = layer.weight
    layer.eval()
    layer.generate_quantized_weight(qweight_only=True)
    for bmm_type in (cuda.BMM.BSTC32, cuda.BMM.BTC32, cuda.BMM.BSTC32):
        assert torch.equal(layer(x, bmm_type), y)
        assert torch.equal(layer.qweight, cuda.BinaryLinearCuda.w_pack(weight, bmm_type))
    assert torch.equal(copy.deepcopy(layer)(x, cuda.BMM.BTC32), y)
    with pytest.raises(ValueError, match="k = 40"):
        cuda.BinaryLinearCuda(40, 8)(torch.randn(8, 40), cuda.BMM.BTC32)


@pytest.mark.parametrize("make", ["linear", "conv"])
def test_integers_assigned_to_the_data_of_a_float_weight_make_it_the_integer_parameter(make, device):
    from bitorch_engine.layers.qconv.binary import BinaryConvParameter
    from bitorch_engine.layers.qconv.binary.cutlass import BinaryConv2dCutlass
    from bitorch_engine.layers.qlinear.binary import BinaryLinearParameter
    from bitorch_engine.optim import DiodeMix

    if make == "linear":
        first, second = (linear().cutlass.BinaryLinearCutlass(32, 8, device=device) for _ in range(2))
        x = torch.randn(4, 32, device=device)
    else:
        first, second = (BinaryConv2dCutlass(8, 8, 3, device=device) for _ in range(2))
        x = torch.randn(2, 8, 6, 6, device=device)
    first.prepare_params()
    weight = second.weight
    optimizer = DiodeMix(second.parameters(), lr=1e-2)
    second.weight.data = first.weight.data
    assert second.weight is weight and weight.dtype == torch.int8 and weight.requires_grad and weight.grad is None
    assert type(weight) is (BinaryLinearParameter if make == "linear" else BinaryConvParameter)
    second.scale_w = first.scale_w
    y, expected = second(x), first(x)
    assert torch.equal(y, expected)
    for output in (y, expected):
        output.square().sum().backward()
    assert torch.equal(weight.grad, first.weight.grad)
    optimizer.step()
    assert set(copy.deepcopy(weight).unique().tolist()) <= set(range(-127, 128)) and weight.dtype == torch.int8


def test_float_weights_stay_float_parameters(device):
    layer = linear().cuda.BinaryLinearCuda(32, 8, device=device)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().float()):
        other.weight.data = torch.ones(8, 32, device=device)
        assert isinstance(other.weight, torch.nn.Parameter) and other.weight.requires_grad and other.weight.is_leaf
        other.weight.data = torch.full((8, 32), -3, dtype=torch.int8, device=device)
        assert other.weight.dtype == torch.int8 and torch.equal(
            other(torch.ones(1, 32, device=device)).sign(), -torch.ones(1, 8, device=device)
        )


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_packed_activations_of_the_cpp_layer(shape, device):
    from bitorch_engine.functions.cuda import tensor_to_packed_uint8

    layer = linear().cpp.BinaryLinearCPP(64, 12, device=device)
    x = torch.randn(shape, device=device)
    for mode in (True, False):
        y = layer.train(mode)(tensor_to_packed_uint8(x))
        assert y.dtype == torch.float32 and torch.equal(y, layer(x))
    with pytest.raises(ValueError, match=r"\[\.\.\., 64 / 8\]"):
        layer(torch.zeros(2, 64, dtype=torch.uint8, device=device))


def test_the_scales_multiply_one_after_the_other():
    """torch.equal with sign product * scale_a * scale_w, as the original's tests have it."""
    layer = linear().cuda.BinaryLinearCuda(64, 40)
    layer.prepare_params()
    x = torch.randn(32, 64)
    layer(x)  # the first batch chooses scale_a
    with torch.no_grad():
        layer.scale_a.fill_(0.1)
        layer.scale_w.fill_(0.9)
    product = (sign(x) @ sign(layer.weight).t()).float()
    assert not torch.equal(product * layer.scale_a * layer.scale_w, product * (layer.scale_a * layer.scale_w))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), product * layer.scale_a * layer.scale_w)
