"""NaN and infinite gradients: skipped element by element, or refused; never packed."""

import pytest
import torch
import torch.nn.functional as F

from subbyte import PackedWeight
from subbyte.nn import BinaryEmbedding, BinaryEmbeddingBag
from subbyte.optim import DiodeMix, PackedAdamW, PackedLion, PackedSGD

FORMATS = ["sign", "ternary", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8", "uint8*64+uint3*32+sign*8"]
N, K = 6, 104
BROKEN = (float("nan"), float("inf"), float("-inf"))
FUSED = {
    "adamw": lambda p: PackedAdamW(p, lr=0.5, weight_decay=0.1),
    "adamw 4bit": lambda p: PackedAdamW(p, lr=0.5, moments="4bit"),
    "sgd": lambda p: PackedSGD(p, lr=5.0, momentum=0.9, weight_decay=0.1),
    "lion": lambda p: PackedLion(p, lr=0.5),
    "adamw, trained scales": lambda p: PackedAdamW(p, lr=0.5, scales="trained"),
}


def weight(fmt, device, seed=0, **options):
    torch.manual_seed(seed)
    return torch.nn.Parameter(PackedWeight.from_float(torch.randn(N, K, device=device), format=fmt, group_size=32, **options))


def codes_of(w):
    return torch.ops.subbyte.unpack(w.codes, w.format, K)


def gradient(device, value, seed=1):
    """(gradient, which elements are sound): every other element is `value`, the last row wholly."""
    torch.manual_seed(seed)
    g = torch.randn(N, K, device=device)
    sound = torch.zeros(N, K, dtype=torch.bool, device=device)
    sound[:-1, ::2] = True
    return torch.where(sound, g, value), sound


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("fmt", FORMATS)
def test_fused_optimizers_skip_broken_elements_and_step_the_others(fmt, name, value, device):
    w = weight(fmt, device)
    optimizer = FUSED[name]([w])
    for seed in (1, 2):
        w.grad, sound = gradient(device, value, seed)
        before = codes_of(w)
        optimizer.step()
        moved = codes_of(w) != before
        assert not moved[~sound].any() and moved[sound].any()
    for key, state in optimizer.state[w].items():
        assert torch.isfinite(state.float()).all(), key
    assert torch.isfinite(w.detach().dequantize()).all()


@pytest.mark.parametrize("name", FUSED)
def test_a_gradient_that_is_broken_throughout_leaves_weight_and_moments_as_they_are(name, device):
    w = weight("uint4", device)
    optimizer = FUSED[name]([w])
    w.grad = torch.randn(N, K, device=device)
    optimizer.step()
    parts = {key: part.clone() for key, part in w.parts.items()}
    moments = {k: t.clone() for k, t in optimizer.state[w].items() if k in ("m_absmax", "v_absmax", "affine")}
    w.grad = torch.full((N, K), float("nan"), device=device)
    optimizer.step()
    w.grad = torch.randn(N, K, device=device)
    optimizer.step(grad_factor=torch.tensor([float("inf")], device=device) * 0)  # what an overflowed scale leaves
    assert all(torch.equal(part, parts[key]) for key, part in w.parts.items())
    # A skipped element is stored again: absmax times a factor of its grid that may round by half a unit, in each of the two steps.
    for k, t in moments.items():
        torch.testing.assert_close(optimizer.state[w][k], t, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("fmt", FORMATS)
def test_stock_optimizers_refuse_on_the_cpu_and_skip_on_a_gpu(fmt, value, device):
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    ):
        w = weight(fmt, device)
        before, optimizer = codes_of(w), make([w])
        w.grad, sound = gradient(device, value)
        if device == "cpu":
            with pytest.raises(ValueError, match="encode_?: .*(nan|inf)"):
                optimizer.step()
            assert torch.equal(codes_of(w), before)
        else:
            optimizer.step()
            assert not (codes_of(w) != before)[~sound].any()


def test_in_place_operations_refuse_or_skip_what_is_not_finite(device):
    for write in (
        lambda w, v: w.add_(v),
        lambda w, v: w.copy_(v),
        lambda w, v: w.sub_(v, alpha=2),
        lambda w, v: w.addcmul_(v, v),
        lambda w, v: w.add_(torch.sparse_coo_tensor([[1, 4]], v[:2], (N, K)).to(v.device)),
        lambda w, v: w.__setitem__(2, v[2]),
    ):
        w = weight("uint4", device).detach()
        before = w.codes.clone()
        values = torch.full((N, K), float("nan"), device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match="(?i)nan"):
                write(w, values)
        else:
            write(w, values)
        assert torch.equal(w.codes, before)


@pytest.mark.parametrize("state_bits", [32, 16, 8])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("fmt", FORMATS)
def test_diode_mix_skips_broken_elements_of_packed_weights(fmt, value, state_bits, device):
    w = weight(fmt, device)
    optimizer = DiodeMix([w], lr=0.5, betas=(0.5, 0.5), state_bits=state_bits)
    for seed in (1, 2, 3):
        w.grad, sound = gradient(device, value, seed)
        before = codes_of(w)
        optimizer.step()
        moved = codes_of(w) != before
        assert not moved[~sound].any()
    assert torch.isfinite(w.detach().dequantize()).all()
    for key, t in optimizer.state[w].items():
        assert not isinstance(t, torch.Tensor) or torch.isfinite(t.float()).all(), key


@pytest.mark.parametrize("value", BROKEN)
def test_diode_mix_skips_broken_elements_of_integer_binary_and_projected_parameters(value, device):
    integers = torch.nn.Parameter(torch.randint(-99, 99, (N, K), dtype=torch.int8, device=device), requires_grad=False)
    integers.privileged_grad, sound = gradient(device, value)
    binary = torch.nn.Parameter(torch.randn(N, K, device=device))
    binary.grad, _ = gradient(device, value)
    signs, before = binary.detach().sign(), integers.detach().clone()
    groups = [dict(params=[integers], rule="nbit"), dict(params=[binary], rule="binary", lr=1e3)]
    optimizer = DiodeMix(groups, lr=0.5, betas=(0.5, 0.5), rounding="nearest")
    scale = optimizer.state[integers]["scale"] = torch.ones((), device=device)
    optimizer.step()
    assert torch.equal(binary.detach().sign()[~sound], signs[~sound]) and (binary.detach().sign() != signs)[sound].any()
    back = integers.detach().float() * scale
    assert bool(((back - before.float()).abs() <= scale / 2 + 1e-4)[~sound].all())
    assert optimizer.state[binary]["exp_avg_s"].isfinite().all()
    for fmt in ("sign", "uint4"):
        w = weight(fmt, device)
        w.grad, _ = gradient(device, value)
        optimizer = DiodeMix([dict(params=[w], rank=3, update_proj_gap=1, scale=1.0, proj_type="std")], lr=0.5)
        optimizer.step()
        assert torch.isfinite(w.detach().dequantize()).all()
        assert all(torch.isfinite(t).all() for t in optimizer.state[w].values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("value", BROKEN)
def test_binary_tables_keep_the_bits_whose_gradient_is_broken(value, device):
    for step in ("diode", "momentum", "descent"):
        table = BinaryEmbedding(8, 20, device=device)
        before = table.weight.codes.clone()
        table.weight.grad = torch.sparse_coo_tensor([[2, 5]], torch.full((2, 20), value), (8, 20)).to(device)
        if step == "diode":
            optimizer = DiodeMix(table.parameters(), lr=1e3, betas=(0.5, 0.5))
            optimizer.step()
            assert optimizer.state[table.weight]["exp_avg_s"].isfinite().all()
        else:
            table.update_(step)
        assert torch.equal(table.weight.codes, before)
    for module in (BinaryEmbedding, BinaryEmbeddingBag):
        table = module(8, 20, gradient="packed", device=device)
        y = table(torch.tensor([[1, 2]], device=device))
        if device == "cpu":
            with pytest.raises(RuntimeError, match=f"{module.__name__}: the gradient is not finite"):
                y.backward(torch.full_like(y, value))
            assert table.packed_grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_any_float_type_are_taken(dtype, device):
    torch.manual_seed(0)
    g = torch.randn(N, K, device=device).to(torch.bfloat16).to(torch.float16)  # a value in all four types
    for make in (*FUSED.values(), lambda p: DiodeMix(p, lr=0.5, betas=(0.5, 0.5))):
        w, same = weight("uint4", device, dtype=dtype), weight("uint4", device, dtype=torch.float32)
        for p in (w, same):
            torch.manual_seed(5)
            p.grad = g.to(p.dtype)
            make([p]).step()
        assert torch.equal(w.codes, same.codes)
    x = torch.randn(3, K, device=device, dtype=dtype)
    w = weight("uint4", device, dtype=dtype)
    F.linear(x, w).sum().backward()
    assert w.grad.dtype == dtype
