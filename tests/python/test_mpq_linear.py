"""subbyte.nn.MPQLinear and subbyte.mpq.mpq_update_ against the written formulas, in float64, and byte-exact old checkpoints."""

import copy
import io
import math
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F

import subbyte
from mpq_layers import exl2, mbwq, mpq
from subbyte import mpq as M
from subbyte.nn import MPQLinear

RUNS = [(8, 32), (6, 64), (5, 32), (4, 128), (4, 96), (3, 32), (2, 64)]

LAYERS = {
    **{f"gptq-{b}": (lambda b=b: mpq(b, asym=True, gptq=True)) for b in (1, 2, 3, 4, 8)},
    "gptq-act-order": lambda: mpq(4, asym=True, gptq=True, act_order=True, bias=True),
    **{f"asym-{b}": (lambda b=b: mpq(b, asym=True)) for b in (1, 2, 4, 8)},
    "asym-columns": lambda: mpq(2, asym=True, dq_mode=1, dq=1),
    "asym-256": lambda: mpq(4, asym=True, k=512, group_size=256, bias=True),
    **{f"sym-{b}": (lambda b=b: mpq(b, asym=False)) for b in (1, 2, 4, 8)},
    "sym-act-order": lambda: mpq(4, asym=False, act_order=True, bias=True),
    "sym-columns": lambda: mpq(4, asym=False, dq_mode=1, dq=1),
    "sym-columns-blocked": lambda: mpq(4, asym=False, dq_mode=1, dq=8),
    "sym-256": lambda: mpq(4, asym=False, k=512, group_size=256),
    "sym-odd": lambda: mpq(4, asym=False, k=93, n=37, group_size=20),
    "asym-odd": lambda: mpq(3, asym=True, k=93, n=37, group_size=20),
    **{f"mbwq-{b}": (lambda b=b: mbwq(b)) for b in (2, 4)},
    "mbwq-identity": lambda: mbwq(4, permuted=False),
    "exl2": lambda: exl2(RUNS),
    "exl2-two": lambda: exl2([(4, 64), (2, 64)], permuted=False),
}


def build(layer, dtype=torch.half, **more):
    return MPQLinear(**{**layer.arguments, "dtype": dtype, **more})


def loaded(name, device="cpu", raw=True, dtype=torch.half):
    layer = LAYERS[name]()
    module = build(layer, dtype).to(device)
    module.load_state_dict(layer.raw if raw else layer.prepared)
    return layer, module


def exact(module):
    return module.weight.dequantize(torch.float32).double().t().cpu()


# ---- the old checkpoints


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "prepared"])
@pytest.mark.parametrize("name", LAYERS)
def test_old_checkpoints_load_give_the_stated_outputs_and_are_written_back(name, raw, device):
    layer, module = loaded(name, device, raw)
    assert torch.equal(exact(module), layer.weight)
    x = torch.randn(2, 3, layer.weight.shape[0], dtype=torch.float32)
    scale = layer.prepared.get("channel_scale", torch.ones(())).double().view(-1)
    bias = layer.prepared.get("bias", torch.zeros(())).double()
    wanted = (x.double() * scale) @ layer.weight + bias
    found = module(x.to(device)).double().cpu()
    span = (x.double() * scale).abs() @ layer.weight.abs() + bias.abs()
    assert ((found - wanted).abs() <= 1e-5 * span).all()
    out = module.export_state(raw=raw)
    stored = dict(layer.raw if raw else layer.prepared)
    if raw and layer.arguments["layout"] in ("mbwq", "exl2"):
        del stored["g_idx"]  # never read
    if 32 % layer.arguments["bits"]:
        stored.pop("wf", None)
    assert sorted(out) == sorted(stored)
    for key, value in stored.items():
        assert out[key].dtype == value.dtype and torch.equal(out[key].cpu(), value), key


def test_a_raw_layer_exports_what_prepare_would_have_made():
    for name in ("asym-4", "sym-2", "asym-columns", "gptq-act-order"):
        layer, module = loaded(name, raw=True)
        for key, value in module.export_state().items():
            assert torch.equal(value, layer.prepared[key]), key


def test_M9_a_parent_module_loads_old_keys_and_mixed_layers_report_a_wrong_shape():
    layer, other = LAYERS["exl2"](), LAYERS["sym-4"]()
    model = torch.nn.Sequential(torch.nn.Linear(4, 448), build(layer), torch.nn.Linear(40, 96), build(other)).half()
    before = model[1].weight
    state = {**model.state_dict(), **{f"1.{k}": v for k, v in layer.raw.items()}, **{f"3.{k}": v for k, v in other.raw.items()}}
    for i in (1, 3):
        state = {k: v for k, v in state.items() if not k.startswith(f"{i}.weight")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model.load_state_dict(state).missing_keys == []
    assert model[1].weight is before and any(p is before for p in optimizer.param_groups[0]["params"])
    assert torch.equal(exact(model[1]), layer.weight) and torch.equal(exact(model[3]), other.weight)
    assert model[1].weight.perm.dtype == torch.int32
    wrong = {**state, "1.qweight": state["1.qweight"][:, :8]}
    with pytest.raises(RuntimeError, match="1: .*scales is"):
        model.load_state_dict(wrong)
    assert torch.equal(exact(model[1]), layer.weight)
    with pytest.raises(RuntimeError, match="scales is missing"):
        model.load_state_dict({k: v for k, v in state.items() if k != "1.scales"})
    with pytest.raises(RuntimeError, match="Unexpected key.*1.extra"):
        model.load_state_dict({**state, "1.extra": torch.zeros(1)})


def test_int64_words_are_cast():
    layer = LAYERS["exl2"]()
    module = build(layer)
    module.load_state_dict({**layer.raw, "qweight": layer.raw["qweight"].long()})
    assert torch.equal(exact(module), layer.weight)


def test_a_checkpoint_with_a_bias_does_not_lose_it():
    layer = mpq(4, asym=False, bias=True)
    with pytest.raises(RuntimeError, match="has a bias"):
        build(layer, bias=False).load_state_dict(layer.raw)
    with pytest.raises(RuntimeError, match="bias is missing"):
        build(layer).load_state_dict({k: v for k, v in layer.raw.items() if k != "bias"})


def test_requantized_scales_stay_close_and_untouched_blocks_keep_their_bytes():
    layer, module = loaded("sym-4")
    with torch.no_grad():
        module.weight.scales[0, 0] *= 1.5  # output feature 0, so block 0 of group 0
    out = module.export_state(raw=True)
    again = build(layer)
    again.load_state_dict(out)
    assert torch.equal(out["qstatistic"][1:], layer.raw["qstatistic"][1:])
    assert torch.equal(out["qstatistic"][0, 1:], layer.raw["qstatistic"][0, 1:])
    change = (again.weight.scales - module.weight.scales).abs().float()
    assert change[8:].max() == 0 and change.max() <= 0.55 * module.weight.scales[:8, 0].float().max() / 15


# ---- construction


def test_M11_from_linear_keeps_the_weights():
    torch.manual_seed(0)
    for bits, step in ((2, 1 / 3), (3, 1 / 7), (4, 1 / 15), (8, 1 / 255)):
        for layout, asym in (("gba", False), ("gba", True), ("gptq", True), ("mbwq", False)):
            linear = torch.nn.Linear(72, 20)
            module = MPQLinear.from_linear(linear, bits, 24, asym=asym, layout=layout)
            error = (module.weight.dequantize() - linear.weight).abs().max()
            span = 2 / math.sqrt(72)
            assert error <= span * step * 0.75, (bits, layout, asym)
            assert module.bias is linear.bias
            x = torch.randn(5, 72)
            torch.testing.assert_close(module(x), F.linear(x, module.weight.dequantize(), linear.bias), rtol=1e-4, atol=1e-5)
            again = MPQLinear(72, 20, bits, 24, asym=asym, layout=layout, bias=True)
            again.load_state_dict(module.export_state())
            assert torch.equal(again.weight.dequantize(), module.weight.dequantize())
    positive = torch.nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        positive.weight.uniform_(0.5, 1.0)
    module = MPQLinear.from_linear(positive, 4, asym=True)
    assert module.weight.zeros.min() == 1
    assert (module.weight.dequantize() - positive.weight).abs().max() <= 0.5 / 14 + 1e-6
    half = MPQLinear.from_linear(positive, 4, dtype=torch.half)
    assert half.weight.scales.dtype == half.weight.dtype == torch.half
    perm = torch.randperm(72).to(torch.int32)
    act_order = MPQLinear.from_linear(torch.nn.Linear(72, 20), 4, 24, layout="gptq", perm=perm)
    again = MPQLinear(72, 20, 4, 24, layout="gptq", bias=True)
    again.load_state_dict(act_order.export_state())
    assert torch.equal(again.weight.dequantize(), act_order.weight.dequantize())
    mixed = MPQLinear.from_linear(torch.nn.Linear(96, 20), group_size=32, layout="exl2", format="uint8*32+uint4*64")
    again = MPQLinear(96, 20, group_size=32, layout="exl2", bias=True)
    again.load_state_dict(mixed.export_state())
    assert again.weight.format == mixed.weight.format and torch.equal(again.weight.dequantize(), mixed.weight.dequantize())


def test_M7_what_cannot_be_is_refused_when_it_is_built():
    for arguments, text in (
        (dict(bits=9), "bits is 9"),
        (dict(group_size=0), "group_size is 0"),
        (dict(layout="awq"), "layout is 'awq'"),
        (dict(layout="mbwq", asym=True), "expected asym=False"),
        (dict(dq_mode=3), "dq_mode is 3"),
        (dict(dq_group_size=0), "dq_group_size is 0"),
        (dict(format="uint4"), "one width"),
    ):
        with pytest.raises(ValueError, match=text):
            MPQLinear(64, 32, **arguments)
    with pytest.raises(ValueError, match="leave no positive value"):
        MPQLinear.from_linear(torch.nn.Linear(64, 32), 1, layout="gptq")
    assert MPQLinear(64, 32, layout="gptq").asym and MPQLinear(64, 32).weight.group_size == 64


def test_M8_the_rank_of_the_input_is_kept():
    _, module = loaded("mbwq-4")
    assert module.channel_scale is not None
    for shape in ((128,), (3, 128), (2, 3, 128), (0, 128), (2, 0, 128)):
        assert module(torch.randn(shape).half()).shape == shape[:-1] + (40,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_M6_any_sizes_any_activation_type_same_bits_every_run(dtype, device):
    for k, n in ((93, 37), (1, 1), (257, 65)):
        module = MPQLinear(k, n, 4, 20, asym=True, bias=True, dtype=torch.float16).to(device)
        x = torch.randn(5, k, device=device).to(dtype)
        y = module(x)
        wanted = x.double() @ module.weight.dequantize(torch.float32).double().t() + module.bias.double()
        span = x.double().abs() @ module.weight.dequantize(torch.float32).double().abs().t() + 1
        assert y.dtype == dtype and ((y.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * span + 1e-5 * span).all()
        assert torch.equal(y, module(x))


def test_X10_device_and_dtype_are_honoured(device):
    module = MPQLinear(40, 12, 4, 20, bias=True, channel_scale=True, device=device, dtype=torch.bfloat16)
    for t in (module.weight.scales, module.weight.offsets, module.bias, module.channel_scale):
        assert t.device.type == device and t.dtype == torch.bfloat16


# ---- gradients


@pytest.mark.parametrize("name", ["gptq-act-order", "sym-4", "mbwq-4", "exl2"])
def test_M5_gradients_are_dense_accumulate_and_appear_on_demand(name, device):
    layer, module = loaded(name, device, dtype=torch.float32)
    assert module.weight.grad is None
    k, n = layer.weight.shape
    scale = layer.prepared.get("channel_scale", torch.ones(())).double().view(-1)
    total = torch.zeros(n, k, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(4, 3, k, device=device, requires_grad=True)
        gy = torch.randn(4, 3, n, device=device)
        module(x).backward(gy)
        xs, g = (x.detach().double().cpu() * scale).reshape(-1, k), gy.double().cpu().reshape(-1, n)
        total += g.t() @ xs
        wanted = (g @ layer.weight.t()) * scale
        torch.testing.assert_close(x.grad.double().cpu().reshape(-1, k), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.weight.grad.double().cpu(), total, rtol=1e-4, atol=1e-3)
    # Two layers may share one weight: both gradients arrive.
    module.weight.grad = None
    x = torch.randn(2, k, device=device)
    (module(x).sum() + 2 * module(x).sum()).backward()
    shared = module.weight.grad.clone()
    module.weight.grad = None
    (3 * module(x).sum()).backward()
    torch.testing.assert_close(shared, module.weight.grad, rtol=1e-4, atol=1e-4)


def test_X11_gradients_flow_in_eval_and_through_a_frozen_weight():
    _, module = loaded("sym-4", dtype=torch.float32)
    module.eval()
    x = torch.randn(3, 96, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is not None
    module.weight.requires_grad_(False)
    module.weight.grad, x.grad = None, None
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is None
    module.weight.requires_grad_(True)
    with torch.no_grad():
        assert not module(x).requires_grad


def test_X5_a_transposed_view_is_read_as_what_it_means(device):
    _, module = loaded("mbwq-4", device, dtype=torch.float32)
    x = torch.randn(128, 6, device=device).t()
    torch.testing.assert_close(module(x), module(x.contiguous()), rtol=0, atol=0)


def test_autocast_and_compile():
    _, module = loaded("mbwq-4", dtype=torch.float32)
    x = torch.randn(4, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    grad, module.weight.grad = module.weight.grad, None
    module(x).sum().backward()
    torch.testing.assert_close(grad, module.weight.grad)


# ---- life


@pytest.mark.parametrize("name", ["gptq-act-order", "sym-2", "mbwq-4", "exl2"])
def test_M10_copies_pickles_and_native_checkpoints_keep_everything(name, tmp_path):
    layer, module = loaded(name)
    x = torch.randn(3, layer.weight.shape[0]).half()
    wanted = module(x).detach()
    fresh = build(layer)
    assert fresh.load_state_dict(module.state_dict()).missing_keys == []
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    parent, again = torch.nn.Sequential(build(layer)), build(layer)
    again.load_state_dict(torch.load(file, weights_only=True))
    parent.load_state_dict({f"0.{k}": v for k, v in module.export_state().items()})
    for other in (fresh, again, parent[0], copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu")):
        assert torch.equal(other(x), wanted)
        exported = other.export_state()
        assert all(torch.equal(exported[key], value) for key, value in module.export_state().items())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        exported = other.export_state(raw=True)
        assert all(torch.equal(exported[key], value) for key, value in module.export_state(raw=True).items())
    subbyte.save(module, tmp_path / "layer.safetensors")
    stored = subbyte.load(tmp_path / "layer.safetensors")
    assert torch.equal(stored["weight"].dequantize(), module.weight.dequantize())


def test_M12_no_message_or_page_names_what_does_not_exist():
    root = pathlib.Path(subbyte.__file__).parent
    for file in [*root.rglob("*.py")]:
        text = file.read_text()
        assert "finalize_quantized_layers" not in text and "mpq_adamw" not in text, file


def test_the_printed_form_says_what_it_is():
    _, module = loaded("exl2")
    text = repr(module)
    assert "in_features=448" in text and "layout=exl2" in text and "groups=7" in text and "uint8*32" in text


# ---- the update


class Reference:
    """The written rule in float64. Groups by the file's own numbers: g(k) of each input feature."""

    def __init__(self, module):
        self.w = module.weight.dequantize(torch.float32).double().cpu()
        packed = module.weight
        pieces = torch.arange(packed.in_features) // packed.group_size
        if module.parent is not None:
            pieces = module.parent.cpu()[pieces]
        perm = torch.arange(packed.in_features) if packed.perm is None else packed.perm.long().cpu()
        self.group = torch.empty(packed.in_features, dtype=torch.long)
        self.group[perm] = pieces
        self.m = self.v = torch.zeros_like(self.w)

    def step(self, g, t, lr, wd, beta1, beta2, eps, correct_bias):
        g = g.double().cpu()
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        r = self.m / (self.v.sqrt() + eps)
        eta = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) if correct_bias else lr
        target = (self.w - eta * r) * (1 - lr * wd)
        means = torch.stack([(eta * r)[:, self.group == g].mean(1) for g in range(int(self.group.max()) + 1)], 1)
        return target, means


def _by_feature(module, parts):
    """[N, G'] of the weight -> [N, K] in the order of input features."""
    packed = module.weight
    spread = parts.double().cpu().repeat_interleave(packed.group_size, 1)[:, : packed.in_features]
    out = torch.empty_like(spread)
    perm = torch.arange(packed.in_features) if packed.perm is None else packed.perm.long().cpu()
    out[:, perm] = spread
    return out


def _bits(module):
    layout = module.weight.format
    widths = [(int(p.split("*")[0][4:] or 1), int(p.split("*")[1])) for p in layout.split("+")] if "*" in layout else None
    if widths is None:
        widths = [(1 if layout == "sign" else int(layout[4:]), module.in_features)]
    stored = torch.cat([torch.full((count,), bits) for bits, count in widths])
    perm = torch.arange(module.in_features) if module.weight.perm is None else module.weight.perm.long().cpu()
    out = torch.empty_like(stored)
    out[perm] = stored
    return out


@pytest.mark.parametrize("correct_bias,wd", [(True, 0.0), (False, 0.5)])
@pytest.mark.parametrize(
    "name",
    ["sym-4", "sym-act-order", "sym-odd", "asym-4", "asym-odd", "gptq-act-order", "gptq-2", "sym-1", "mbwq-4", "exl2"],
)
def test_M1_the_update_follows_the_written_rule_for_every_layer_type(name, correct_bias, wd, device):
    torch.manual_seed(5)
    _, module = loaded(name, device, dtype=torch.float32)
    n, k = module.weight.shape
    m, v = torch.zeros(n, k, device=device), torch.zeros(n, k, device=device)
    asym, levels = module.asym, 2.0 ** _bits(module).double()
    for t in range(1, 11):
        reference = Reference(module)
        reference.m, reference.v = m.double().cpu(), v.double().cpu()
        g = torch.randn(n, k, device=device)
        lr = 0.05
        target, means = reference.step(g, t, lr, wd, 0.9, 0.99, 1e-6, correct_bias)
        zero = (module.weight.zeros if asym else module.weight.offsets).clone()
        M.mpq_update_(module.weight, g, m, v, t, lr=lr, weight_decay=wd, betas=(0.9, 0.99), correct_bias=correct_bias,
                      parent=module.parent, rounding="nearest")  # fmt: skip
        torch.testing.assert_close(m.double().cpu(), reference.m, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v.double().cpu(), reference.v, rtol=1e-5, atol=1e-6)
        scale, zero_now = _by_feature(module, module.weight.scales), module.weight.zeros if asym else module.weight.offsets
        moved = _by_feature(module, zero_now)
        if t % 5:
            assert torch.equal(zero_now, zero), "zeros move every fifth step alone"
        elif asym:
            wanted = (_by_feature(module, zero) + means[:, reference.group] / scale).clamp(min=1)
            wanted = torch.minimum(wanted, levels)
            assert ((moved - wanted).abs() <= 0.5 + 1e-4).all() and torch.equal(moved, moved.round())
        else:
            torch.testing.assert_close(moved, _by_feature(module, zero) - means[:, reference.group], rtol=1e-4, atol=1e-5)
        grid = target / scale + moved if asym else (target - moved) / scale
        found = module.weight.dequantize(torch.float32).double().cpu()
        code = found / scale + moved if asym else (found - moved) / scale
        assert ((code - code.round()).abs() < 1e-3).all() and (code.round() >= 0).all() and (code.round() < levels).all()
        wanted = torch.minimum(grid.clamp(min=0), levels - 1)
        assert ((code.round() - wanted).abs() <= 0.5 + 1e-3).all()


def test_M1_the_projector_sees_moments_of_its_own_shape():
    _, module = loaded("sym-4", dtype=torch.float32)
    n, k = module.weight.shape
    basis = torch.linalg.qr(torch.randn(k, 4)).Q  # r = g basis, back: r basis^T
    g = torch.randn(n, k)
    m, v = torch.zeros(n, 4), torch.zeros(n, 4)
    before = module.weight.dequantize()
    M.mpq_update_(module.weight, g @ basis, m, v, 1, lr=0.1, betas=(0.9, 0.99), project_back=lambda r: r @ basis.t(), seed=3)
    eta = 0.1 * math.sqrt(1 - 0.99) / (1 - 0.9)
    r = m / (v.sqrt() + 1e-6)
    step = (module.weight.dequantize() - before) + eta * (r @ basis.t())
    inside = step.abs() <= module.weight.scales.repeat_interleave(32, 1)[:, :k] * 1.001
    assert inside.float().mean() > 0.9  # others hit the ends of their range


def test_M2_stochastic_rounding_moves_the_mean_where_nearest_freezes():
    torch.manual_seed(0)
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = subbyte.PackedWeight.from_float(torch.randn(64, 256), bits=4, group_size=64)
        # Codes from the middle of the range, so that no step meets an end.
        weight.offsets.copy_(-7.5 * weight.scales)
        subbyte.mpq._ops.encode_(weight.codes, torch.zeros(64, 256), weight.scales, None, weight.offsets, None, "uint4", 64)
        before = weight.dequantize()
        m, v = torch.zeros(64, 256), torch.zeros(64, 256)
        for t in range(1, 101):
            M.mpq_update_(
                weight, torch.ones(64, 256), m, v, t, lr=1e-3, betas=(0.9, 0.99), zeros_every=0, rounding=rounding, seed=9
            )
        moved[rounding] = (weight.dequantize() - before).mean().item()
    assert moved["nearest"] == 0
    assert abs(moved["stochastic"] + 0.1) < 0.01  # 100 steps of 1e-3 against a constant gradient


def test_M2_the_loss_of_a_four_bit_layer_falls_with_stochastic_and_not_with_nearest_rounding(device):
    final = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(1)
        x, target = torch.randn(256, 64, device=device), torch.randn(64, 16, device=device) / 8
        module = MPQLinear.from_linear(torch.nn.Linear(64, 16, bias=False), 4, 32).to(device)
        module.weight.scales.mul_(3)
        module.weight.offsets.mul_(3)
        m = v = None
        y = x @ target
        first = F.mse_loss(module(x), y).item()
        for t in range(1, 201):
            module.weight.grad = None
            loss = F.mse_loss(module(x), y)
            loss.backward()
            g = module.weight.grad
            m, v = (torch.zeros_like(g), torch.zeros_like(g)) if m is None else (m, v)
            M.mpq_update_(module.weight, g, m, v, t, lr=4e-3, betas=(0.9, 0.99), zeros_every=0, rounding=rounding)
        final[rounding] = F.mse_loss(module(x), y).item() / first
    assert final["nearest"] > 0.98 and final["stochastic"] < 0.35


def test_M2_two_four_bit_layers_learn_fashion_mnist(fashion_mnist):
    torch.manual_seed(2)
    (x, labels), _ = fashion_mnist
    model = torch.nn.Sequential(
        MPQLinear.from_linear(torch.nn.Linear(784, 64), 4, 56, asym=True, layout="gptq"), torch.nn.ReLU(),
        MPQLinear.from_linear(torch.nn.Linear(64, 10), 4, 32),
    )  # fmt: skip
    state, losses = {}, []
    for t in range(1, 61):
        rows = torch.randint(0, len(x), (128,))
        loss = F.cross_entropy(model(x[rows]), labels[rows])
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for layer in (model[0], model[2]):
            g = layer.weight.grad
            m, v = state.setdefault(layer, (torch.zeros_like(g), torch.zeros_like(g)))
            M.mpq_update_(layer.weight, g, m, v, t, lr=2e-3, betas=(0.9, 0.99), seed=7)
    assert losses[0] > 2.0 and sum(losses[-10:]) / 10 < 1.1
    zeros = model[0].weight.zeros
    assert torch.equal(zeros, zeros.round()) and zeros.min() >= 1 and zeros.max() <= 16


def test_M3_zeros_keep_still_without_a_gradient_and_follow_it_with_the_right_sign():
    for name in ("asym-4", "gptq-act-order", "sym-4"):
        _, module = loaded(name, dtype=torch.float32)
        n, k = module.weight.shape
        codes, zeros = module.weight.codes.clone(), (module.weight.zeros if module.asym else module.weight.offsets).clone()
        m, v = torch.zeros(n, k), torch.zeros(n, k)
        for t in range(1, 26):
            M.mpq_update_(module.weight, torch.zeros(n, k), m, v, t, lr=0.1, rounding="nearest")
        assert torch.equal(module.weight.codes, codes)
        assert torch.equal(module.weight.zeros if module.asym else module.weight.offsets, zeros)
    # A constant positive gradient: weights go down, so zeros (s (q - z)) go up by eta / s.
    layer, module = loaded("asym-4", dtype=torch.float32)
    n, k = module.weight.shape
    with torch.no_grad():
        module.weight.scales.fill_(0.01)
        module.weight.zeros.fill_(5)
        module.weight.copy_(torch.zeros(n, k))
    before = module.weight.dequantize()
    M.mpq_update_(module.weight, torch.ones(n, k), torch.zeros(n, k), torch.zeros(n, k), 5, lr=0.02, betas=(0.0, 0.0), eps=0.0,
                  rounding="nearest")  # fmt: skip
    assert torch.equal(module.weight.zeros, torch.full_like(module.weight.zeros, 7))  # eta r = 0.02 = 2 steps
    torch.testing.assert_close(module.weight.dequantize() - before, torch.full((n, k), -0.02))  # on the new zeros


def test_M3_stochastic_zeros_move_by_their_mean_and_stay_integers():
    n, k = 2048, 64
    weight = subbyte.PackedWeight.from_float(torch.randn(n, k), bits=4, group_size=32, zero_kind="zeros")
    weight.scales.fill_(0.1)
    weight.zeros.fill_(8)
    m, v = torch.zeros(n, k), torch.zeros(n, k)
    M.mpq_update_(weight, torch.ones(n, k), m, v, 5, lr=0.03, betas=(0.0, 0.0), eps=0.0, seed=4)
    assert set(weight.zeros.unique().tolist()) == {8.0, 9.0}
    assert abs(weight.zeros.mean().item() - 8.3) < 6 * math.sqrt(0.21 / (2 * n))
    again = subbyte.PackedWeight.from_float(torch.randn(n, k), bits=4, group_size=32, zero_kind="zeros")
    again.scales.fill_(0.1)
    again.zeros.fill_(8)
    M.mpq_update_(again, torch.ones(n, k), m.zero_(), v.zero_(), 5, lr=0.03, betas=(0.0, 0.0), eps=0.0, seed=4)
    assert torch.equal(weight.zeros, again.zeros)


def test_M4_forward_backward_and_checkpoint_see_the_same_zeros():
    for name in ("asym-4", "sym-act-order", "mbwq-4"):
        layer, module = loaded(name, dtype=torch.float32)
        n, k = module.weight.shape
        m, v = torch.zeros(n, k), torch.zeros(n, k)
        zeros = module.export_state()["zeros"]
        for t in range(1, 6):
            M.mpq_update_(module.weight, torch.ones(n, k), m, v, t, lr=0.5, parent=module.parent)
        assert not torch.equal(module.export_state()["zeros"], zeros)
        fresh = build(layer, torch.float32)
        fresh.load_state_dict({**layer.prepared, **module.export_state()})
        x = torch.randn(3, k, requires_grad=True)
        a, b = module(x), fresh(x)
        assert torch.equal(a, b)
        (ga,), (gb,) = (torch.autograd.grad(y.sum(), x) for y in (a, b))
        assert torch.equal(ga, gb)


def test_O7_weight_decay_shrinks_the_weights():
    weight = subbyte.PackedWeight.from_float(torch.randn(64, 128), bits=8, group_size=64)
    before = weight.dequantize()
    z = torch.zeros(64, 128)
    M.mpq_update_(weight, z, z.clone(), z.clone(), 1, lr=0.1, weight_decay=1.0)
    ratio = (weight.dequantize() * before).sum() / (before * before).sum()
    assert abs(ratio - 0.9) < 0.005


def test_the_update_names_a_wrong_argument():
    weight = subbyte.PackedWeight.from_float(torch.randn(4, 8), bits=4, group_size=8)
    g = torch.zeros(4, 8)
    good = dict(lr=0.1)
    for arguments, text in (
        ((torch.randn(4, 8), g, g, g, 1), "weight is Tensor"),
        ((weight, g, g, g, 0), "step is 0"),
        ((weight, g[:3], g, g, 1), "exp_avg is"),
        ((weight, g.int(), g, g, 1), "grad is"),
        ((weight, g[:3], g[:3].clone(), g[:3].clone(), 1), "delta is"),
    ):
        with pytest.raises(ValueError, match=text):
            M.mpq_update_(*arguments, **good)
    with pytest.raises(ValueError, match="beta1 is 1"):
        M.mpq_update_(weight, g, g.clone(), g.clone(), 1, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="rounding 'up'"):
        M.mpq_update_(weight, g, g.clone(), g.clone(), 1, rounding="up")
    codes = weight.codes.clone()
    with pytest.raises(ValueError, match="grad.* is nan"):
        M.mpq_update_(weight, g * float("nan"), g.clone(), g.clone(), 1)
    assert torch.equal(weight.codes, codes)
