"""bitorch_engine.optim on the parameters of the old layers (SEED_API sections 6.2 and 11)."""

import inspect
import io
import math

import pytest
import torch
import torch.nn.functional as F

from test_compat_mpq import layer_of, operators, packing, random_codes, words_of


def optim():
    import bitorch_engine.optim as module

    return module


def parameter_classes():
    from bitorch_engine.layers.qconv.binary import BinaryConvParameter
    from bitorch_engine.layers.qconv.nbit import nBitConvParameter
    from bitorch_engine.layers.qlinear.binary import BinaryLinearParameter
    from bitorch_engine.layers.qlinear.nbit import MPQWeightParameter, nBitLinearParameter

    return [
        BinaryConvParameter,
        nBitConvParameter,
        BinaryLinearParameter,
        MPQWeightParameter,
        nBitLinearParameter,
    ]


def check_update_signature(cls):
    names = "qweight exp_avg_s exp_avg_l step lr weight_decay beta1 beta2 eps dtype correct_bias projector grad".split()
    defaults = [None, None, None, 1e-4, 0.0, 0.99, 0.9999, 1e-6, torch.float16, None, None, None]
    signature = inspect.signature(cls.update)
    assert list(signature.parameters) == names
    assert [p.default for p in list(signature.parameters.values())[1:]] == defaults
    with pytest.raises(AssertionError, match="Tensor"):
        cls.update(torch.zeros(2, 2))


def test_every_parameter_class_has_the_update_signature():
    for cls in parameter_classes():
        check_update_signature(cls)


def moments(grad):
    return {"exp_avg_s": torch.zeros_like(grad), "exp_avg_l": torch.zeros_like(grad), "step": torch.zeros(1)}


@pytest.mark.parametrize("mode", ["sym", "asym", "gptq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_M1_M2_M4_mpq_update_moves_the_weight_as_adam_does_on_average(bits, mode):
    layer, w = layer_of(64, 48, bits, 32, mode == "asym", gptq=mode == "gptq")
    q = layer.qweight
    g = torch.where(torch.randn(64, 48) > 0, 1.0, -1.0)
    state = moments(g)
    for _ in range(4):  # before the first step of the zeros
        type(q).update(q, **state, lr=1e-3, beta1=0.9, beta2=0.9, correct_bias=True, grad=g)
    assert state["step"] == 4 and q.dtype == torch.int32
    moved = (packing().unpack_qweight(q).double() - w) * g
    # Four steps of 1e-3 against g, but for the codes that already stand at the end that they are pushed to.
    expected = -4e-3 * (1 - 2.0**-bits)
    error_of_mean = math.sqrt(float(layer.scales.mean()) * 4e-3 / moved.numel())
    assert abs(float(moved.mean()) - expected) < 6 * error_of_mean
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ packing().unpack_qweight(q), rtol=1e-4, atol=1e-4)


def test_M3_zeros_move_by_the_step_over_the_scale_and_the_codes_follow():
    layer, w = layer_of(32, 8, 4, 32, True)
    q = layer.qweight
    g = torch.ones(32, 8)
    before = packing().unpack_qweight(q)
    state = moments(g)
    for _ in range(5):
        type(q).update(q, **state, lr=1e-6, beta1=0.9, beta2=0.9, correct_bias=True, grad=g)
    # A step of 1e-6 is far below a level: zeros keep their whole values, no drift.
    torch.testing.assert_close(packing().unpack_qweight(q), before, rtol=0, atol=float(layer.scales.max()) * 1.001)
    assert float((packing().unpack_qweight(q) - before).abs().mean()) < 1e-3


@pytest.mark.parametrize("mode", ["sym", "asym", "mbwq"])
def test_M3_update_zeros_takes_the_mean_of_each_group(mode):
    from bitorch_engine.utils.model_helper import update_zeros

    layer, _ = layer_of(64, 8, 4, 16, mode == "asym")
    q, groups = layer.qweight, torch.arange(64) // 16
    g, before = torch.randn(64, 8), layer.zeros.clone()
    if mode == "mbwq":
        q.layer_type, q.g_idx, q.q_perm = 2, None, torch.randperm(64).to(torch.int16)
        g_stored = g[q.q_perm.long()]
    else:
        g_stored = g
    mean = torch.stack([0.5 * g_stored[groups == i].mean(0) for i in range(4)])
    unpacked = None if mode != "asym" else operators().gptq_style_unpacking(q)[1]
    update_zeros(q, None, g, 0.5)
    if mode == "asym":
        expected = (unpacked + mean / layer.scales).round().clamp(1, 16)
        assert torch.equal(operators().gptq_style_unpacking(q)[1].float(), expected)
    else:
        torch.testing.assert_close(layer.zeros, before + mean)


def test_qweight_update_fn_is_the_rule_of_the_class():
    from bitorch_engine.layers.qlinear.nbit import nBitLinearParameter
    from bitorch_engine.utils.model_helper import qweight_update_fn

    q, g = nBitLinearParameter(torch.full((4, 4), 10, dtype=torch.int8)), torch.ones(4, 4)
    qweight_update_fn(q, **moments(g), lr=2.0, beta1=0.0, beta2=0.0, eps=0.0, correct_bias=False, grad=g)
    assert (q.detach() == 8).all()
    with pytest.raises(NotImplementedError, match="Tensor"):
        qweight_update_fn(torch.zeros(1))


def test_mpq_update_of_mixed_and_permuted_weights():
    from bitorch_engine.layers.qlinear.nbit.cuda import MBWQLinearCuda

    layer = MBWQLinearCuda(128, 16, w_bit=4, dtype=torch.float32, group_size=64, use_mbw=False)
    layer.prepare_params()
    layer.set_qweight_data(words_of(random_codes(128, 16, 4), 4))
    layer.set_scales(0.05 + 0.1 * torch.rand(2, 16))
    layer.set_zeros(layer.scales * 7.5)
    layer.q_perm = torch.randperm(128).to(torch.int16)
    before = packing().unpack_qweight(layer.qweight)
    g = torch.ones(128, 16)
    state = moments(g)
    for _ in range(4):
        type(layer.qweight).update(layer.qweight, **state, lr=5e-3, beta1=0.9, beta2=0.9, correct_bias=True, grad=g)
    moved = packing().unpack_qweight(layer.qweight) - before
    assert abs(float(moved.mean()) + 0.02) < 5e-3
    x = torch.randn(2, 128)
    torch.testing.assert_close(layer(x), x @ packing().unpack_qweight(layer.qweight), rtol=1e-4, atol=1e-4)


def test_O2_nbit_update_is_adam_on_the_values_and_keeps_dtype():
    from bitorch_engine.layers.qlinear.nbit import nBitLinearParameter

    q = nBitLinearParameter(torch.zeros(64, 64, dtype=torch.int8))
    g = torch.ones(64, 64)
    state = moments(g)
    for _ in range(10):
        nBitLinearParameter.update(q, **state, lr=0.05, beta1=0.9, beta2=0.99, correct_bias=True, grad=g)
    assert q.dtype == torch.int8 and abs(float(q.detach().float().mean()) + 0.5) < 0.05


# ---- DiodeMix


def mlp(middle):
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.BatchNorm1d(32),
        middle,
        torch.nn.PReLU(),
        torch.nn.BatchNorm1d(32),
        torch.nn.Linear(32, 2),
    )


def binary_middle():
    from bitorch_engine.layers.qlinear.binary.cuda import BinaryLinearCuda

    return BinaryLinearCuda(32, 32)


def mpq_middle():
    from bitorch_engine.layers.qlinear.nbit.cuda import MPQLinearCuda

    return MPQLinearCuda.from_linear(torch.nn.Linear(32, 32, bias=False), w_bit=4, group_size=32, dtype=torch.float32)


def q4_middle():
    from bitorch_engine.layers.qlinear.nbit.cutlass import Q4LinearCutlass

    return Q4LinearCutlass(32, 32)


@pytest.mark.parametrize("middle", [binary_middle, mpq_middle, q4_middle])
def test_the_reference_recipe_trains(middle):
    """MLP with one quantized middle layer, prepared before the optimizer is built."""
    from bitorch_engine.utils.model_helper import prepare_bie_layers

    model = mlp(middle())
    prepare_bie_layers(model)
    optimizer = optim().DiodeMix(model.parameters(), lr=2e-3, betas=(0.9, 0.99), dtype=torch.float)
    x = torch.randn(256, 16)
    target = (x[:, 0] * x[:, 1] > 0).long()
    before = [p.detach().clone() for p in model[2].parameters()]
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, model[2].parameters()))


def test_O3_galore_works_on_binary_and_mpq_parameters():
    model = mlp(mpq_middle())
    matrices = [model[2].qweight, model[0].weight]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    galore = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}
    optimizer = optim().DiodeMix([{"params": matrices, **galore}, {"params": rest}], lr=2e-3, betas=(0.9, 0.99))
    x = torch.randn(64, 16)
    target = (x[:, 0] > 0).long()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_O4_state_is_plain_and_resumes():
    from bitorch_engine.layers.qlinear.binary.cuda import BinaryLinearCuda

    layer = BinaryLinearCuda(16, 4)
    layer.prepare_params()
    optimizer = optim().DiodeMix(layer.parameters(), lr=1e-3)
    layer(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = optim().DiodeMix(layer.parameters(), lr=1e-3)
    other.load_state_dict(state)
    ours, theirs = optimizer.state[layer.weight], other.state[layer.weight]
    assert torch.equal(ours["exp_avg_s"], theirs["exp_avg_s"]) and ours["exp_avg_s"].shape == (4, 16)


def test_diode_mix_checks_its_arguments():
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}):
        with pytest.raises(ValueError):
            optim().DiodeMix([torch.nn.Parameter(torch.zeros(1))], **wrong)


def test_galore_projector_reproduces_low_rank_gradients():
    projector = optim().GaLoreProjector(rank=3, scale=2.0)
    g = torch.randn(20, 3) @ torch.randn(3, 10)
    torch.testing.assert_close(projector.project_back(projector.project(g, 0)), 2 * g, rtol=1e-4, atol=1e-4)
