"""bitorch_engine's packed weight-only layers (SEED_API section 6) against transcriptions with Python integers and float64."""

import copy
import io
import pickle

import pytest
import torch

WIDTHS = [1, 2, 4, 8]


def cuda():
    import bitorch_engine.layers.qlinear.nbit.cuda as module

    return module


def packing():
    import bitorch_engine.layers.qlinear.nbit.cuda.utils as module

    return module


def operators():
    import bitorch_engine.utils.quant_operators as module

    return module


def as_int32(value):
    return value - 2**32 if value >= 2**31 else value


def words_of(codes, bits):
    """Codes [k, n] as GPTQ rows, by Python integers: code of row r in word r * b // 32 at shift r mod (32 / b) * b."""
    k, n = codes.shape
    rows = [[0] * n for _ in range(-(-k * bits // 32))]
    for r in range(k):
        for c in range(n):
            rows[r * bits // 32][c] |= int(codes[r, c]) << (r * bits % 32)
    return torch.tensor([[as_int32(v) for v in row] for row in rows], dtype=torch.int32)


def zero_words_of(zeros, bits):
    """Zeros [Gr, n] as packed (z - 1), along columns."""
    return words_of((zeros - 1).remainder(2**bits).t(), bits).t().contiguous()


def random_codes(k, n, bits):
    return torch.randint(0, 2**bits, (k, n))


def dense(codes, scales, zeros, groups, asym):
    s, z = scales.double()[groups], zeros.double()[groups]
    return s * (codes - z) if asym else codes * s - z


def layer_of(k, n, bits, group_size, asym, dtype=torch.float32, device="cpu", gptq=False, **options):
    """A prepared layer of random content, and its dense weight [k, n] in float64."""
    layer = cuda().MPQLinearCuda(
        k, n, w_bit=bits, dtype=dtype, group_size=group_size, asym=asym, use_gba_quant=not gptq, device=device, **options
    )
    layer.prepare_params()
    g = -(-k // layer.group_size)
    codes, scales = random_codes(k, n, bits), (0.01 + 0.1 * torch.rand(g, n)).to(dtype)
    groups = torch.arange(k) // layer.group_size
    layer.set_qweight_data(words_of(codes, bits).to(device))
    layer.scales = scales.to(device)
    if asym or gptq:
        zeros = torch.randint(1, 2**bits + 1, (g, n))
        layer.zeros = zero_words_of(zeros, bits).to(device)
    else:
        zeros = (scales * (2**bits - 1) / 2).to(dtype)
        layer.zeros = zeros.to(device)
    return layer, dense(codes, scales, zeros, groups, asym or gptq)


# ---- MPQLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("mode", ["sym", "asym", "gptq"])
def test_M1_M6_forward_and_gradients_are_the_formula_in_every_mode(bits, mode, dtype, device):
    k, n, gs = 96, 40, 32
    layer, w = layer_of(k, n, bits, gs, mode == "asym", dtype, device, gptq=mode == "gptq")
    assert layer.qweight.dtype == torch.int32 and layer.qweight.shape == (k * bits // 32, n)
    x = torch.randn(2, 3, k, device=device).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (2, 3, n) and y.dtype == dtype
    # Of the operands' magnitudes: dequantized weights, products and the result each round once.
    unit = 4 * {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]

    def close(got, a, b):
        assert bool(((got.cpu().double() - a @ b).abs() <= unit * (a.abs() @ b.abs())).all())

    xd = x.detach().cpu().double()
    close(y, xd, w)
    g = torch.randn_like(y)
    y.backward(g)
    gd = g.cpu().double()
    close(x.grad, gd, w.t())
    assert layer.qweight.privileged_grad.shape == (k, n) and layer.qweight.privileged_grad.dtype == dtype
    close(layer.qweight.privileged_grad, xd.flatten(0, 1).t(), gd.flatten(0, 1))


@pytest.mark.parametrize("k, n, gs", [(32, 3, 32), (96, 33, 8), (64, 1, 128), (40, 5, 16)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_M6_any_sizes(k, n, gs, bits):
    for asym in (False, True):
        layer, w = layer_of(k, n, bits, gs, asym)
        x = torch.randn(4, k)
        torch.testing.assert_close(layer(x).double(), x.double() @ w, rtol=1e-5, atol=1e-4)
        assert layer(x[:0]).shape == (0, n)


def test_M5_gradients_accumulate_and_nothing_is_allocated_before(device):
    layer, w = layer_of(32, 8, 4, 32, False, device=device)
    assert layer.qweight.privileged_grad is None and layer.qweight.grad is None
    x, g = torch.randn(5, 32, device=device), torch.randn(5, 8, device=device)
    layer(x).backward(g)
    once = layer.qweight.privileged_grad.clone()
    layer(x).backward(g)
    torch.testing.assert_close(layer.qweight.privileged_grad, 2 * once)
    assert layer.qweight.grad is layer.qweight.privileged_grad
    layer.zero_grad()
    assert layer.qweight.privileged_grad is None
    layer.qweight.requires_grad = False
    layer(x.requires_grad_()).backward(g)
    assert layer.qweight.privileged_grad is None and x.grad is not None


def test_M4_layer_and_parameter_share_their_quantization_data():
    layer, w = layer_of(32, 8, 4, 16, False)
    q, x = layer.qweight, torch.randn(3, 32)
    assert q.scales is layer.scales and q.zeros is layer.zeros and q.g_idx is layer.g_idx
    assert (q.w_bit, q.asym, q.group_size, q.layer_type) == (4, False, 16, 1)
    q.zeros = torch.zeros_like(layer.zeros)
    assert layer.zeros is q.zeros
    torch.testing.assert_close(layer(x), x @ packing().unpack_qweight(q))
    layer.scales = layer.scales * 2
    assert q.scales is layer.scales
    torch.testing.assert_close(layer(x), x @ packing().unpack_qweight(q))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.qweight.scales is copied.scales and copied.scales is not layer.scales
        assert torch.equal(copied(x), layer(x))
        copied.qweight.scales = copied.scales * 0
        assert torch.equal(layer(x), layer(x)) and layer.scales.any()


def test_X4_every_way_of_writing_the_data_is_seen_by_the_next_forward():
    layer, w = layer_of(32, 8, 4, 16, False)
    x = torch.randn(3, 32)

    def check(change):
        before = layer(x)
        change()
        after = layer(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, x @ packing().unpack_qweight(layer.qweight), rtol=1e-5, atol=1e-5)

    other = torch.randint(-(2**31), 2**31, (4, 8), dtype=torch.int64).to(torch.int32)
    check(lambda: setattr(layer.qweight, "data", other.clone()))
    check(lambda: layer.qweight.data.copy_(other.flip(0)))
    check(lambda: layer.set_qweight_data(other.to(torch.int64)))
    check(lambda: layer.scales.mul_(2))
    check(lambda: setattr(layer, "zeros", layer.zeros + 1))
    check(lambda: layer.load_state_dict({**layer.state_dict(), "qweight": other.flip(1)}))


def test_g_idx_in_any_order_is_followed():
    layer, _ = layer_of(64, 8, 4, 16, False)
    codes = random_codes(64, 8, 4)
    layer.set_qweight_data(words_of(codes, 4))
    layer.g_idx = torch.randint(0, 4, (64,), dtype=torch.int32)
    w = dense(codes, layer.scales, layer.zeros, layer.g_idx.long(), False)
    x = torch.randn(3, 64)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x).double(), x.double() @ w, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.qweight.privileged_grad, x.sum(0)[:, None].expand(64, 8))
    torch.testing.assert_close(packing().unpack_qweight(layer.qweight).double(), w, rtol=1e-5, atol=1e-6)


def test_construction_checks_M7_M12():
    make = cuda().MPQLinearCuda
    for wrong, error, text in (
        ({"w_bit": 3}, AssertionError, "w_bit is 3"),
        ({"a_bit": 8}, AssertionError, "a_bit is 8"),
        ({"dq_mode": 1}, ValueError, "dq_mode 1"),
        ({"dq_mode": 3}, ValueError, "dq_mode is 3"),
        ({"group_size": 0}, ValueError, "group_size"),
    ):
        with pytest.raises(error, match=text):
            make(32, 8, **wrong)
    layer, _ = layer_of(32, 8, 4, 16, False)
    layer.scales = torch.ones(3, 5)
    with pytest.raises(ValueError, match="scales"):
        layer.check_parameters()


def test_M10_packing_a_model_with_mpq_layers_is_silent(tmp_path):
    from bitorch_engine.utils.model_helper import load_checkpoint, save_checkpoint

    layer, _ = layer_of(32, 8, 4, 16, True)
    model = torch.nn.Sequential(layer)
    x = torch.randn(2, 32)
    save_checkpoint(model, tmp_path / "m.safetensors")
    other = torch.nn.Sequential(cuda().MPQLinearCuda(32, 8, w_bit=4, dtype=torch.float32, group_size=16, asym=True))
    load_checkpoint(other, tmp_path / "m.safetensors")
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("mode", [{}, {"asym": True}, {"use_gba_quant": False}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_M11_from_linear_quantizes_the_weight(bits, mode):
    linear = torch.nn.Linear(64, 24)
    layer = cuda().MPQLinearCuda.from_linear(linear, w_bit=bits, group_size=16, dtype=torch.float32, **mode)
    w = packing().unpack_qweight(layer.qweight).t()
    widest = (linear.weight.reshape(24, 4, 16).amax(2) - linear.weight.reshape(24, 4, 16).amin(2)) / (2**bits - 1)
    if not mode:
        assert ((w - linear.weight).reshape(24, 4, 16).abs() <= 0.5001 * widest[..., None]).all()
    else:
        assert (w - linear.weight).norm() < {2: 0.5, 4: 0.12, 8: 0.01}[bits] * linear.weight.norm()
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ w.t() + linear.bias, rtol=1e-4, atol=1e-5)


def test_quantize_linear_with_mpq_copies_weights_and_bias():
    from bitorch_engine.utils.convert import collect_layers, quantize_linear_with_mpq_linear_cuda

    model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    x = torch.randn(4, 256)
    expected = model(x)
    quantize_linear_with_mpq_linear_cuda(model, list(collect_layers(model)), "8-128-256", dtype=torch.float32)
    assert [type(m).__name__ for m in model] == ["MPQLinearCuda", "ReLU", "MPQLinearCuda"]
    torch.testing.assert_close(model(x), expected, atol=0.02, rtol=0.05)


# ---- dequantize and pack


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("asym", [False, True])
def test_unpack_and_pack_are_inverse_and_unpack_is_the_formula(bits, asym, device):
    layer, w = layer_of(64, 32, bits, 16, asym, device=device)
    unpacked = packing().unpack_qweight(layer.qweight)
    torch.testing.assert_close(unpacked.cpu().double(), w, rtol=1e-6, atol=1e-6)
    assert torch.equal(packing().pack_fp_weight(unpacked, layer.qweight), layer.qweight.detach())
    weights, zeros = operators().gptq_style_unpacking(layer.qweight)
    assert torch.equal(weights, unpacked) and zeros.shape == (4, 32)


def test_unpack_without_a_layer_type_is_refused():
    from bitorch_engine.layers.qlinear.nbit import MPQWeightParameter

    words = torch.zeros(4, 8, dtype=torch.int32)
    parameter = MPQWeightParameter(words, scales=torch.ones(1, 8), zeros=torch.zeros(1, 8), w_bit=4)
    assert parameter.layer_type == -1 and parameter.group_size == -1 and parameter.asym is False
    with pytest.raises(ValueError, match="layer_type"):
        packing().unpack_qweight(parameter)
    parameter.layer_type = 3
    with pytest.raises(NotImplementedError):
        packing().unpack_qweight(parameter)


def test_zeros_packing_rounds():
    zeros = torch.tensor([[7.9999, 1.0, 16.0, 8.4, 3.0, 2.0, 1.6, 5.0]])
    packed = operators().gptq_style_zeros_packing(zeros, 4, 8, 32)
    expected = torch.tensor([[8, 1, 16, 8, 3, 2, 2, 5]])
    assert torch.equal(packed, zero_words_of(expected, 4))
    assert packed.dtype == torch.int32 and packed.shape == (1, 1)


# ---- checkpoints of the original


def test_raw_gba_checkpoint_symmetric():
    """qstatistic, qscales_* and qzeros_* as the original saved them, by hand: high nibble scale code, low nibble zero code."""
    k, n, gs, dq = 32, 4, 16, 2
    layer = cuda().MPQLinearCuda(k, n, w_bit=2, dtype=torch.float32, group_size=gs, dq_group_size=dq)
    codes = random_codes(k, n, 2)
    state = layer.state_dict()
    shapes = {key: (tuple(v.shape), v.dtype) for key, v in state.items()}
    assert shapes == {
        "qweight": ((2, 4), torch.int32),
        "g_idx": ((32,), torch.int32),
        "bias": ((4,), torch.float32),
        "wf": ((1, 16), torch.int32),
        "scales": ((2, 4), torch.float32),
        "zeros": ((2, 4), torch.float32),
        "qstatistic": ((2, 2, 2), torch.uint8),
        "qzeros_zeros": ((2, 2, 1), torch.float32),
        "qzeros_scales": ((2, 2, 1), torch.float32),
        "qscales_zeros": ((2, 2, 1), torch.float32),
        "qscales_scales": ((2, 2, 1), torch.float32),
    }
    state["qweight"] = words_of(codes, 2)
    state["qstatistic"] = torch.tensor([[[0x31, 0x52], [0xF0, 0x0F]], [[0x11, 0x22], [0x33, 0x44]]], dtype=torch.uint8)
    state["qscales_zeros"] = torch.full((2, 2, 1), -1.0)
    state["qscales_scales"] = torch.tensor([[[0.5], [0.25]], [[1.0], [2.0]]])
    state["qzeros_zeros"] = torch.full((2, 2, 1), 1.0)
    state["qzeros_scales"] = torch.tensor([[[0.1], [0.2]], [[0.3], [0.4]]])
    layer.load_state_dict(state)
    layer.prepare_params()
    scales = torch.tensor([[2.0, 3.0, 4.0, 0.25], [2.0, 3.0, 8.0, 10.0]])
    zeros = torch.tensor([[0.0, 0.1, -0.2, 2.8], [0.0, 0.3, 0.8, 1.2]])
    torch.testing.assert_close(layer.scales, scales)
    torch.testing.assert_close(layer.zeros, zeros)
    x = torch.randn(3, k)
    w = dense(codes, scales, zeros, torch.arange(k) // gs, False)
    torch.testing.assert_close(layer(x).double(), x.double() @ w, rtol=1e-5, atol=1e-5)
    assert sorted(layer.state_dict()) == ["g_idx", "qweight", "scales", "zeros"]
    prepared = cuda().MPQLinearCuda(k, n, w_bit=2, dtype=torch.float32, group_size=gs, dq_group_size=dq)
    prepared.load_state_dict(layer.state_dict())
    prepared.prepare_params()
    assert torch.equal(prepared(x), layer(x))


@pytest.mark.parametrize("bits, shape", [(4, (2, 2, 2)), (2, (2, 4))])
def test_raw_gba_checkpoint_asymmetric(bits, shape):
    k, n, gs, dq = 32, 4, 16, 2
    layer = cuda().MPQLinearCuda(k, n, w_bit=bits, dtype=torch.float32, group_size=gs, dq_group_size=dq, asym=True)
    codes, z = random_codes(k, n, bits), torch.randint(1, 2**bits + 1, (2, n))
    state = layer.state_dict()
    assert state["qscales"].shape == shape and state["qzeros"].shape == (2, 1) and "qstatistic" not in state
    state["qweight"], state["qzeros"] = words_of(codes, bits), zero_words_of(z, bits)
    state["qscales"] = torch.tensor([3, 5, 15, 0, 1, 2, 3, 4], dtype=torch.uint8).reshape(shape)
    state["qscales_zeros"] = torch.full((2, 2, 1), -1.0)
    state["qscales_scales"] = torch.tensor([[[0.5], [0.25]], [[1.0], [2.0]]])
    layer.load_state_dict(state)
    layer.prepare_params()
    scales = torch.tensor([[2.0, 3.0, 4.0, 0.25], [2.0, 3.0, 8.0, 10.0]])
    x = torch.randn(3, k)
    w = dense(codes, scales, z, torch.arange(k) // gs, True)
    torch.testing.assert_close(layer(x).double(), x.double() @ w, rtol=1e-5, atol=1e-4)
    assert layer.zeros.dtype == torch.int32 and torch.equal(layer.zeros, state["qzeros"])
    assert sorted(layer.state_dict()) == ["g_idx", "qweight", "qzeros", "scales", "zeros"]
    fresh = cuda().MPQLinearCuda(k, n, w_bit=bits, dtype=torch.float32, group_size=gs, dq_group_size=dq, asym=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_gptq_checkpoint_reads_the_highest_field_as_two_to_the_bits():
    k, n = 32, 8
    layer = cuda().MPQLinearCuda(k, n, w_bit=4, dtype=torch.float32, group_size=32, use_gba_quant=False, disable_bias=False)
    codes, z = random_codes(k, n, 4), torch.tensor([[16, 1, 2, 3, 4, 5, 6, 7]])
    state = layer.state_dict()
    assert sorted(state) == ["bias", "g_idx", "qweight", "qzeros", "scales", "wf"]
    state["qweight"], state["qzeros"], state["scales"] = words_of(codes, 4), zero_words_of(z, 4), torch.rand(1, n)
    state["bias"] = torch.randn(n)
    assert int(state["qzeros"][0, 0]) % 16 == 15
    layer.load_state_dict(state)
    x = torch.randn(3, k)
    w = dense(codes, state["scales"], z, torch.zeros(k, dtype=torch.long), True)
    torch.testing.assert_close(layer(x).double(), x.double() @ w + state["bias"].double(), rtol=1e-5, atol=1e-4)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert sorted(loaded) == ["bias", "g_idx", "qweight", "qzeros", "scales"]
    fresh = cuda().MPQLinearCuda(k, n, w_bit=4, dtype=torch.float32, group_size=32, use_gba_quant=False, disable_bias=False)
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh(x), layer(x))


# ---- MBWQ


def test_M8_the_rank_of_the_input_is_kept(device):
    layer = cuda().MBWQLinearCuda(64, 8, w_bit=4, dtype=torch.half, group_size=32, use_mbw=False, device=device)
    layer.prepare_params()
    layer.channel_scale.uniform_(0.5, 2)  # [1, 1, k]
    x = torch.randn(2, 3, 64, device=device, dtype=torch.half)
    y = layer(x)
    for shape in ((6,), (2, 1, 3), (1, 1, 2, 3)):
        assert torch.equal(layer(x.reshape(*shape, 64)), y.reshape(*shape, 8))
    assert layer(x[0, 0]).shape == (8,) and layer(x[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize("bits, gs", [(2, 32), (4, 32), (4, 64), (4, 256)])
@pytest.mark.parametrize("permuted", [False, True])
def test_mbwq_of_one_width(bits, gs, permuted, device):
    k, n = 256, 24
    layer = cuda().MBWQLinearCuda(k, n, w_bit=bits, dtype=torch.half, group_size=gs, use_mbw=False, device=device)
    layer.prepare_params()
    codes = random_codes(k, n, bits)
    perm = torch.randperm(k) if permuted else torch.arange(k)
    layer.set_qweight_data(words_of(codes, bits).to(device))
    layer.set_scales(torch.rand(k // gs, n).half() * 0.1)
    layer.set_zeros(torch.rand(k // gs, n).half() * 0.1)
    if permuted:
        layer.q_perm = perm.to(torch.int16).to(device)
    w = torch.empty(k, n, dtype=torch.float64)
    w[perm] = dense(codes, layer.scales.cpu(), layer.zeros.cpu(), torch.arange(k) // gs, False)
    x = torch.randn(3, k, device=device).half()
    y = layer(x)
    assert y.shape == (3, n)  # M8: the rank of the input
    torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ w, rtol=2e-3, atol=2e-2)
    values = layer.q42fp_weight(layer.qweight, layer.scales, layer.zeros, gs, bits, layer.q_perm)
    torch.testing.assert_close(values.cpu().double(), w, rtol=1e-3, atol=1e-3)
    assert layer(x.unsqueeze(0)).shape == (1, 3, n)
    layer.channel_scale = torch.full_like(layer.channel_scale, 2.0)
    torch.testing.assert_close(layer(x), layer(x * 1.0))
    torch.testing.assert_close(layer(x).cpu().double(), 2 * x.cpu().double() @ w, rtol=2e-3, atol=4e-2)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected = 2 * x.cpu().double().t() @ g.cpu().double()
    torch.testing.assert_close(layer.qweight.privileged_grad.cpu().double(), expected, rtol=2e-2, atol=5e-2)


def mixed(k_by_width, n, group):
    """Codes of several widths as EXL2-like words: (qweight, q_groups, codes [k, n], group of each row)."""
    words, q_groups, all_codes, groups = [], [], [], []
    row = 0
    for bits, k in k_by_width:
        codes = random_codes(k, n, bits)
        streams = [sum(int(codes[r, c]) << (r * bits) for r in range(k)) for c in range(n)]
        count = k * bits // 32
        words.append(torch.tensor([[as_int32((s >> (32 * i)) % 2**32) for s in streams] for i in range(count)]))
        for first in range(0, k, group):
            q_groups += [bits, row + first * bits // 32]
            groups += [len(q_groups) // 2 - 1] * min(group, k - first)
        row += count
        all_codes.append(codes)
    return torch.cat(words), torch.tensor(q_groups, dtype=torch.int16), torch.cat(all_codes), torch.tensor(groups)


@pytest.mark.parametrize("widths", [[(4, 64), (2, 64)], [(8, 32), (6, 32), (5, 64), (4, 32), (3, 32), (2, 96)]])
def test_mbwq_of_mixed_widths_takes_int64_words(widths, device):
    n, k = 8, sum(count for _, count in widths)
    qweight, q_groups, codes, groups = mixed(widths, n, 32)
    layer = cuda().MBWQLinearCuda(
        k, n, w_bit=4, dtype=torch.half, groups=len(q_groups) // 2, rows_packed=len(qweight), device=device
    )
    perm = torch.randperm(k)
    layer.q_perm = perm.to(torch.int16).to(device)
    layer.q_groups = q_groups.to(device)
    layer.qweight.data = qweight.to(torch.int64).to(device)
    layer.scales = (0.01 + 0.1 * torch.rand(len(q_groups) // 2, n)).half().to(device)
    layer.zeros = torch.rand(len(q_groups) // 2, n).half().to(device)
    layer.prepare_params()
    w = torch.empty(k, n, dtype=torch.float64)
    w[perm] = dense(codes, layer.scales.cpu(), layer.zeros.cpu(), groups, False)
    x = torch.randn(3, k, device=device).half()
    torch.testing.assert_close(layer(x).cpu().double(), x.cpu().double() @ w, rtol=2e-3, atol=3e-2)
    ends, end = [], 0
    for bits in (8, 6, 5, 4, 3, 2):
        end += dict(widths).get(bits, 0)
        ends.append(end)
    assert layer.rows == [*ends, sum(2 ** (bits - 1) for bits, _ in widths)]
    group_map = layer.q_group_map.cpu()
    left = [int((groups[i:] == groups[i]).sum()) for i in range(k)]
    assert torch.equal(group_map[0::2].long(), groups) and group_map[1::2].tolist() == left
    values = layer.exl2fp_weight(layer.qweight, layer.scales, layer.zeros, layer.q_perm, layer.q_group_map, layer.qweight.rows)
    torch.testing.assert_close(values.cpu().double(), w, rtol=1e-3, atol=1e-3)


def test_M9_a_parent_loads_mixed_layers_of_other_sizes():
    qweight, q_groups, codes, groups = mixed([(4, 64), (2, 64)], 8, 32)
    perm = torch.randperm(128)
    state = {
        "0.qweight": qweight.to(torch.int32),
        "0.q_groups": q_groups,
        "0.scales": torch.rand(4, 8).half(),
        "0.zeros": torch.rand(4, 8).half(),
        "0.q_perm": perm.to(torch.int16),
        "0.channel_scale": torch.ones(1, 1, 128).half(),
    }
    model = torch.nn.Sequential(cuda().MBWQLinearCuda(128, 8, w_bit=4))
    model.load_state_dict(state)
    model[0].prepare_params()
    w = torch.empty(128, 8, dtype=torch.float64)
    w[perm] = dense(codes, state["0.scales"], state["0.zeros"], groups, False)
    x = torch.randn(2, 128).half()
    torch.testing.assert_close(model(x).double(), x.double() @ w, rtol=2e-3, atol=3e-2)


def test_M9_int16_permutations_that_overflowed_are_put_right():
    k = 32768 + 64
    layer = cuda().MBWQLinearCuda(k, 2, w_bit=4, group_size=k, use_mbw=False)
    assert layer.q_perm.dtype == torch.int32
    perm = torch.randperm(k)
    state = layer.state_dict()
    state["q_perm"] = torch.where(perm > 32767, perm - 65536, perm).to(torch.int16)
    layer.load_state_dict(state)
    assert torch.equal(layer.q_perm.long(), perm)


def test_mlx_layer_is_the_same_layer_transposed(device):
    from bitorch_engine.layers.qlinear.nbit.mps import MPQLinearMlx

    k, n = 64, 24
    reference, w = layer_of(k, n, 4, 32, False, torch.half, device)
    layer = MPQLinearMlx(k, n, w_bit=4, dtype=torch.half, group_size=32, device=device)
    layer.set_qweight_data(reference.qweight.detach())
    layer.prepare_params()
    layer.scales, layer.zeros = reference.scales.t().contiguous(), -reference.zeros.t().contiguous()
    assert layer.qweight.shape == (n, k * 4 // 32)
    x = torch.randn(3, k, device=device).half()
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-3, atol=1e-3)
    layer(x).sum().backward()
    assert layer.qweight.privileged_grad.shape == (k, n)


def test_function_apply_brings_the_gradients(device):
    from bitorch_engine.layers.qlinear.nbit.cuda.mpq_layer import MPQLinearCudaFunction

    layer, w = layer_of(64, 8, 4, 16, False, device=device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    q = layer.qweight
    y = MPQLinearCudaFunction.apply(x, q, 16, 4, q.scales, q.zeros, q.g_idx, False, True)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), w.sum(1).expand(3, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.privileged_grad, x.detach().sum(0)[:, None].expand(64, 8))


@pytest.mark.parametrize("kind", ["MPQLinearCuda", "MBWQLinearCuda"])
def test_a_qweight_made_anew_from_outside_belongs_to_its_layer(kind):
    """accelerate.init_empty_weights calls type(p)(p.to("meta"), **p.__dict__), its loading type(p)(values, requires_grad)."""
    import bitorch_engine.layers.qlinear.nbit.cuda as cuda

    options = {"w_bit": 4, "group_size": 32, "dq_group_size": 32, "dtype": torch.half}
    options.update({"use_mbw": False} if kind == "MBWQLinearCuda" else {})
    layer, source = (getattr(cuda, kind)(64, 32, **options) for _ in range(2))
    for name, buffer in source.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape))
    source.set_qweight_data(torch.randint(-(2**31), 2**31, source.qweight.shape, dtype=torch.int64).to(torch.int32))
    parameter = layer._parameters["qweight"]
    empty = type(parameter)(parameter.to("meta"), **{**parameter.__dict__, "requires_grad": True})
    assert empty.is_meta and empty.w_bit == 4 and empty.requires_grad
    layer._parameters["qweight"] = type(parameter)(source.qweight.detach().clone(), requires_grad=True)
    for name, buffer in source.named_buffers():
        layer._buffers[name] = buffer.clone()
    for module in (layer, source):
        module.prepare_params()
    x = torch.randn(3, 64).half()
    assert torch.equal(layer(x), source(x)) and layer.qweight.scales is layer.scales and layer.qweight.w_bit == 4
    layer(x).sum().backward()
    assert layer.qweight.privileged_grad.shape == (64, 32)
    with pytest.raises(TypeError, match="unknown argument width"):
        type(parameter)(parameter.detach(), width=3)
