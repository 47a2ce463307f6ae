"""Residual planes: weights of b deployed bits that train with r more.

The oracle is the written grid, value = R (2 q + 1 - L) / L with L levels, and the written rules of the updates, in float64; it
shares nothing with the product but unpack.
"""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight
from subbyte.optim import DiodeMix, PackedAdamW, PackedLion, PackedSGD

ops = torch.ops.subbyte
# (format, residual bits): stored/deployed 8/2, 8/1, 8/ternary, 4/2, 4/1, 8/4, and others.
PAIRS = [("uint2", 6), ("sign", 7), ("ternary", 6), ("uint2", 2), ("sign", 3), ("uint4", 4), ("uint3", 5), ("uint7", 1)]
LEVELS = {"sign": 2, "ternary": 3}
REACH = {"sign": 2, "ternary": 3, "uint2": 2, "uint3": 2.5, "uint4": 3, "uint5": 3.25, "uint6": 3.5, "uint7": 3.75, "uint8": 4}


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def levels_of(format):
    return LEVELS.get(format) or 2 ** int(format[4:])


def normal(n=9, k=70, seed=0, device="cpu"):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).div_(math.sqrt(k)).to(device)


def weight(format="uint2", r=6, data=0, device="cpu", **options):
    options = {"format": format, "group_size": 32, "residual_bits": r, **options}
    return PackedWeight.from_float(normal(seed=data, device=device), **options)


def plane_format(r):
    return "sign" if r == 1 else f"uint{r}"


def fine_codes(w):
    high = ops.unpack(w.codes, w.format, w.in_features).long()
    return high * 2**w.residual_bits + ops.unpack(w.residual, plane_format(w.residual_bits), w.in_features).long()


def columns(part, w):
    """A value a group as one a stored column, float64."""
    return part.double().cpu().repeat_interleave(w.group_size, 1)[:, : w.in_features]


def input_order(stored, w):
    if w.perm is None:
        return stored
    out = torch.empty_like(stored)
    out[:, w.perm.long().cpu()] = stored
    return out


def same(a, b):
    assert list(a.parts) == list(b.parts) and (a.format, a.residual_bits) == (b.format, b.residual_bits)
    return all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)


# ---- the grid


@pytest.mark.parametrize("scheme", ["midrise", "fan_in"])
@pytest.mark.parametrize("format,r", PAIRS)
def test_codes_and_residual_lie_on_nested_mid_rise_grids(format, r, scheme, device):
    w = weight(format, r, scheme=scheme, device=device)
    levels, q = levels_of(format), fine_codes(w).cpu()
    reach = columns(w.scales, w) * levels / 2
    assert bool((q < levels * 2**r).all())
    coarse, fine = ((reach * (2 * code + 1 - n) / n) for code, n in ((q >> r, levels), (q, levels * 2**r)))
    torch.testing.assert_close(w.dequantize().double().cpu(), coarse, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(w.dequantize_fine().double().cpu(), fine, rtol=1e-6, atol=1e-7)
    # A level is the middle of the fine ones in it.
    middle = reach * (2 * ((q >> r) * 2**r) + 2**r - levels * 2**r) / (levels * 2**r)
    torch.testing.assert_close(coarse, middle, rtol=1e-12, atol=1e-15)
    if scheme == "fan_in":
        torch.testing.assert_close(reach, torch.full_like(reach, REACH[format] / math.sqrt(70)), rtol=1e-6, atol=0)
    if format not in LEVELS:
        assert bool((w.zeros == (levels - 1) / 2).all())
    else:
        assert w.zeros is None


@pytest.mark.parametrize("format,r", PAIRS)
def test_rounding_goes_to_the_nearest_fine_level_and_stochastic_rounding_to_a_neighbour_without_bias(format, r, device):
    values = normal(device=device)
    w = weight(format, r, scheme="fan_in", device=device)
    levels = levels_of(format) * 2**r
    step = (2 * REACH[format] / math.sqrt(70)) / levels
    exact = (values.double().cpu() / step + (levels - 1) / 2).clamp(0, levels - 1)
    assert bool(((fine_codes(w).cpu() - exact).abs() <= 0.5 + 1e-4 * (1 + exact.abs())).all())
    total, count = torch.zeros_like(exact), 200
    for seed in range(count):
        drawn = weight(format, r, scheme="fan_in", rounding="stochastic", seed=seed, device=device)
        q = fine_codes(drawn).cpu()
        assert bool(((q - exact).abs() < 1 + 1e-3).all())
        total += q
    fraction = exact - exact.floor()
    error = (total / count - exact).abs()
    # Six standard errors of a mean of `count` draws of 0 or 1, and float32's error of the position.
    assert bool((error <= 6 * (fraction * (1 - fraction) / count).sqrt() + 1e-4 * (1 + exact.abs()) + 6 / count).all())


@pytest.mark.parametrize("kind", ["fixed", "zeros", "offsets"])
@pytest.mark.parametrize("perm", [False, True])
def test_any_grid_has_a_fine_one(kind, perm, device):
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).int().to(device) if perm else None
    grid = {"sym": True} if kind == "fixed" else {"sym": False, "zero_kind": kind}
    w = weight("uint3", 4, perm=order, scale_dtype=torch.float16, device=device, **grid)
    r, q = w.residual_bits, fine_codes(w).cpu().double()
    scale = columns(w.scales, w)
    zero = -columns(w.offsets, w) / scale if kind == "offsets" else columns(w.zeros, w) if kind == "zeros" else 4
    fine = input_order(scale / 2**r * (q - (zero * 2**r + (2**r - 1) / 2)), w)
    torch.testing.assert_close(w.dequantize_fine(torch.float32).double().cpu(), fine, rtol=1e-5, atol=1e-6)
    error = (w.dequantize_fine(torch.float32).double().cpu() - normal().double()).abs()
    inside = input_order(((q > 0) & (q < 127)).double(), w) > 0
    half = input_order(scale / 2**r / 2, w)
    assert bool((error <= half * (1 + 1e-3) + 1e-6)[inside].all()) and int(inside.sum()) > 500


def test_mixed_widths_and_ternary_segments_stay_inside_their_levels(device):
    w = weight("ternary*32+uint2*32+sign*6", 6, scheme="midrise", device=device)
    tops = torch.tensor([192] * 32 + [256] * 32 + [128] * 6)
    w.add_(10)
    assert torch.equal(fine_codes(w).cpu(), (tops - 1).expand(9, 70))
    w.sub_(20)
    assert not bool(fine_codes(w).any())
    assert bool((ops.unpack(w.codes, w.format, 70) == 0).all())


def test_a_residual_costs_its_bits_and_dequantize_says_what_is_deployed():
    w = PackedWeight.from_float(normal(16, 128), bits=2, residual_bits=6, scale_dtype=torch.float16)
    assert w.residual.shape == (16, 96) and w.residual.dtype == torch.uint8
    assert w.bits == 2 and w.bits_per_weight == 2 + 6 + 2 * 16 / 64
    assert "residual_bits=6" in repr(w)
    assert torch.equal(w.dequantize(), w.drop_residual().dequantize())
    assert torch.equal(w.drop_residual().dequantize_fine(), w.dequantize())
    assert torch.equal(subbyte.functional.dequantize(w), w.dequantize())
    fine, coarse = ((t - normal(16, 128)).abs().median() for t in (w.dequantize_fine(), w.dequantize()))
    assert 30 < coarse / fine < 130  # 64 but for what is clipped


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"bits": 2, "residual_bits": 7}, "0 \\(none\\) to 6 beside uint2"),
        ({"bits": 8, "residual_bits": 1}, "to 0 beside uint8"),
        ({"bits": 2, "residual_bits": -1}, "residual_bits is -1"),
        ({"bits": 2, "residual_bits": True}, "residual_bits is True"),
        ({"bits": 2, "residual_bits": 2, "scheme": "midrise", "sym": True}, "leave sym and zero_kind out"),
        ({"bits": 2, "scheme": "fan_in", "zero_kind": "offsets"}, "leave sym and zero_kind out"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_names_it(arguments, says):
    with pytest.raises(ValueError, match=says):
        PackedWeight.from_float(normal(), **arguments)


def test_parts_that_contradict_each_other_are_refused():
    w = weight("uint2", 6)
    parts = {**w.parts}
    shape = dict(format="uint2", in_features=70, group_size=32)
    narrow, short = w.residual[:, 1:], w.residual[1:]
    for change, bits in (({"residual": None}, 6), ({}, 0), ({}, 5), ({"residual": narrow}, 6), ({"residual": short}, 6)):
        with pytest.raises(ValueError, match="residual"):
            PackedWeight(**{**parts, **change}, **shape, residual_bits=bits)
    again = PackedWeight(**parts, **shape, residual_bits=6)
    assert same(again, w)


# ---- reading and writing


def test_products_and_look_ups_do_not_see_the_residual(device):
    w = weight("uint2", 6, device=device)
    plain = w.drop_residual()
    x, rows = torch.randn(5, 70, device=device), torch.tensor([0, 3, 3], device=device)
    before = F.linear(x, w), subbyte.functional.linear_a8(x, w), F.embedding(rows, w), w.abs().sum(), w[1]
    assert torch.equal(before[0], F.linear(x, plain)) and torch.equal(before[2], F.embedding(rows, plain))
    w.residual.random_(0, 256)
    after = F.linear(x, w), subbyte.functional.linear_a8(x, w), F.embedding(rows, w), w.abs().sum(), w[1]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_gradients_are_those_of_the_deployed_weight():
    w = weight("uint2", 6).requires_grad_()
    plain = w.detach().drop_residual().requires_grad_()
    for one in (w, plain):
        x = torch.ones(3, 70, requires_grad=True)
        F.linear(x, one).square().sum().backward()
        one.input_gradient = x.grad
    assert torch.equal(w.grad, plain.grad) and torch.equal(w.input_gradient, plain.input_gradient)


def test_small_steps_accumulate_and_are_lost_without_a_residual_and_with_nearest_rounding(device):
    torch.manual_seed(0)
    fine, plain = (weight("uint2", r, scheme="fan_in", device=device) for r in (6, 0))
    fine.zero_()
    start, level = fine.dequantize_fine().clone(), float(fine.scales[0, 0])
    plain.copy_(fine.dequantize())
    codes = plain.codes.clone()
    for _ in range(50):
        fine.add_(level / 50)
        moved = plain.dequantize() + level / 50
        ops.encode_(plain.codes, moved, plain.scales, plain.zeros, None, None, "uint2", 32, "nearest", 0, 0)
    assert torch.equal(plain.codes, codes)
    # 50 roundings with a deviation of at most half a fine level each: 3.5 / 64 of a level. All weights stay inside the range.
    travelled = (fine.dequantize_fine() - start) / level
    assert bool(((travelled - 1).abs() < 7 * 3.6 / 64).all())
    assert abs(float(travelled.mean()) - 1) < 6 * 3.6 / 64 / math.sqrt(9 * 70)
    assert not torch.equal(fine.dequantize(), weight("uint2", 6, scheme="fan_in", device=device).zero_().dequantize())


IN_PLACE = {
    "add_": lambda w, x: w.add_(x, alpha=0.1),
    "sub_": lambda w, x: w.sub_(x * 0.1),
    "addcdiv_": lambda w, x: w.addcdiv_(x, x.abs() + 1, value=-0.1),
    "addcmul_": lambda w, x: w.addcmul_(x, x, value=0.01),
    "lerp_": lambda w, x: w.lerp_(x * 0.2, 0.3),
    "copy_": lambda w, x: w.copy_(x * 0.1),
    "clamp_": lambda w, x: w.clamp_(-0.05, 0.05),
    "mul_ by a tensor": lambda w, x: w.mul_(torch.sigmoid(x)),
    "_foreach_add_": lambda w, x: torch._foreach_add_([w], [x], alpha=0.1),
    "setitem": lambda w, x: w.__setitem__(3, x[3] * 0.1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_every_in_place_op_moves_the_fine_values_as_on_a_dense_tensor_up_to_one_fine_level(name, device):
    torch.manual_seed(1)
    w = weight("uint2", 6, scheme="fan_in", device=device)
    dense, x = w.dequantize_fine(), normal(seed=5, device=device)
    step = float(w.scales[0, 0]) / 64
    end = step * 127.5
    IN_PLACE[name](w, x)
    IN_PLACE[name](dense, x)
    assert (w.dequantize_fine() - dense.clamp(-end, end)).abs().max() <= step * 1.001


def test_mul_by_a_number_rescales_both_grids_and_leaves_every_bit(device):
    w = weight("uint2", 6, device=device)
    codes, residual, coarse, fine = w.codes.clone(), w.residual.clone(), w.dequantize(), w.dequantize_fine()
    w.mul_(0.75).div_(3)
    assert torch.equal(w.codes, codes) and torch.equal(w.residual, residual)
    torch.testing.assert_close(w.dequantize(), coarse / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(w.dequantize_fine(), fine / 4, rtol=1e-6, atol=0)


def test_copying_keeps_all_bits_between_equal_kinds_and_the_fine_values_between_others():
    a, b = weight("uint2", 6, data=1), weight("uint2", 6, data=2)
    b.copy_(a)
    assert same(a, b) and a.residual.data_ptr() != b.residual.data_ptr()
    wide = weight("uint4", 4, data=3, scheme="fan_in")
    wide.copy_(a)
    inside = a.dequantize_fine().clamp(*(s * float(wide.scales[0, 0]) * 7.9 for s in (-1, 1)))
    assert (wide.dequantize_fine() - inside).abs().max() <= float(wide.scales[0, 0]) / 16 * 1.1
    torch.testing.assert_close(PackedWeight.from_float(a, bits=8).dequantize(), a.dequantize_fine(), rtol=0, atol=0.01)


def test_rows_of_a_sparse_gradient_step_on_the_fine_grid(device):
    torch.manual_seed(0)
    w = weight("sign", 7, scheme="midrise", device=device)
    before, untouched = w.dequantize_fine(), [0, 1, 2, 4, 5, 6, 8]
    step = float(w.scales.max()) / 128
    values = torch.full((2, 70), 3.25 * step, device=device)
    gradient = torch.sparse_coo_tensor(torch.tensor([[7, 3]], device=device), values, (9, 70))
    w.add_(gradient, alpha=-1)
    after = w.dequantize_fine()
    assert torch.equal(after[untouched], before[untouched])
    end = (columns(w.scales, w) * 127.5 / 128 / 2 * 2).float().to(device)
    wanted = torch.maximum(before[[3, 7]] - 3.25 * step, -end[[3, 7]])
    assert ((after[[3, 7]] - wanted).abs() <= step * 1.001).all()
    again = copy.deepcopy(w)
    for one in (w, again):
        subbyte.functional.embedding_add_(one, torch.tensor([3], device=device), values[:1], seed=5)
    assert same(w, again)


# ---- life


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone", "cpu", "half", "permute_rows"])
def test_a_copy_has_the_residual_too(how):
    w = torch.nn.Parameter(weight("uint2", 6))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(w, file)
        file.seek(0)
        copied = torch.load(file, weights_only=True)
    else:
        copied = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda w: pickle.loads(pickle.dumps(w)),
            "clone": lambda w: w.detach().clone(),
            "cpu": lambda w: w.detach().to("cpu", copy=True),
            "half": lambda w: w.detach().half(),
            "permute_rows": lambda w: subbyte.functional.permute_rows(w.detach(), torch.arange(9)),
        }[how](w)
    assert same(copied, w) and copied.residual.data_ptr() != w.residual.data_ptr()


def test_pickles_of_before_there_were_residuals_load():
    from subbyte.packed_weight import _rebuild_packed_weight

    w = weight("uint2", 0, scheme="midrise")
    parts = (w.codes, w.scales, w.zeros, w.offsets, w.perm)
    assert same(_rebuild_packed_weight(parts, "uint2", 70, 32, torch.float32, False, False, False), w)


def model(seed=0, device="cpu", **options):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(20, 70), torch.nn.ReLU(), torch.nn.Linear(70, 12))
    subbyte.quantize_(net, **{"bits": 2, "residual_bits": 6, "group_size": 32, **options})
    return net.to(device)


def weights_of(net):
    return [p for p in net.parameters() if isinstance(p, PackedWeight)]


def same_models(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(same(p, q) if isinstance(p, PackedWeight) else torch.equal(p, q) for p, q in pairs)


def test_a_state_dict_holds_the_residual_and_refuses_another():
    a, b = model(0), model(1)
    state = a.state_dict()
    assert state["0.weight.residual"].dtype == torch.uint8
    assert state._metadata["0"]["subbyte"]["weight"]["residual_bits"] == 6
    b.load_state_dict(state)
    assert same_models(a, b)
    for assign in (False, True):
        c = model(2)
        c.load_state_dict(copy.deepcopy(state), assign=assign)
        assert same_models(a, c)
    with pytest.raises(RuntimeError, match="0.weight.residual"):
        model(1, residual_bits=0, scheme="midrise").load_state_dict(state)
    with pytest.raises(RuntimeError, match="0.weight.residual"):
        b.load_state_dict(model(1, residual_bits=0, scheme="midrise").state_dict())
    with pytest.raises(RuntimeError, match="residual"):
        model(1, residual_bits=5).load_state_dict(state)


def test_a_checkpoint_brings_the_residual_back_and_says_its_bits(tmp_path):
    a, path = model(0), tmp_path / "m.safetensors"
    subbyte.save(a, path)
    loaded = subbyte.load(path)
    assert same(loaded["0.weight"], a[0].weight) and loaded["2.weight"].residual_bits == 6
    net = model(1)
    subbyte.load_weights_(net, loaded)
    assert same_models(net, a)
    subbyte.drop_residuals_(a)
    subbyte.save(a, path)
    deployed = subbyte.load(path)
    assert deployed["0.weight"].residual is None and torch.equal(deployed["0.weight"].codes, a[0].weight.codes)
    subbyte.save({"w": weight("sign", 0), "w.residual": torch.ones(2)}, path)  # a name like any other
    assert torch.equal(subbyte.load(path)["w.residual"], torch.ones(2))


def test_dropping_residuals_frees_their_bytes_and_keeps_every_output(device):
    net, x = model(device=device), torch.randn(6, 20, device=device)
    net.append(net[2].__class__.from_packed(net[2].weight))
    net.append(torch.nn.Linear(70, 20))
    net = torch.nn.ModuleDict({"a": net[0], "b": net[2], "tied": net[3]})
    before = net["b"](F.relu(net["a"](x)))
    bytes_before = sum(w.nbytes for w in {id(w): w for w in weights_of(net)}.values())
    freed = subbyte.drop_residuals_(net)
    assert freed == 70 * 15 + 12 * 53 and net["b"].weight is net["tied"].weight
    assert bytes_before - sum(w.nbytes for w in weights_of(net)) == freed
    assert torch.equal(net["b"](F.relu(net["a"](x))), before)
    assert all(isinstance(w, torch.nn.Parameter) and w.requires_grad and w.residual is None for w in weights_of(net))
    assert subbyte.drop_residuals_(net) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_forward_and_backward_equal_eager(dynamic):
    net = model()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 20)
        gradients = []
        for function in (net, compiled):
            net.zero_grad()
            y = function(x)
            y.square().sum().backward()
            gradients.append((y.detach(), net[0].weight.grad.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
        PackedAdamW(net.parameters(), lr=1e-2).step()


# ---- quantize_


def test_training_gives_a_byte_below_4_bits_and_an_explicit_number_wins():
    for bits, r in ((1, 7), (2, 6), (3, 5), (4, 0), (8, 0)):
        assert [w.residual_bits for w in weights_of(model(bits=bits, residual_bits=None, training=True))] == [r, r]
    assert weights_of(model(bits=None, format="ternary", residual_bits=None, training=True))[0].residual_bits == 6
    assert weights_of(model(bits=2, residual_bits=2, training=True))[0].residual_bits == 2
    assert weights_of(model(bits=2, residual_bits=0, training=True))[0].residual is None
    assert weights_of(model(bits=2, residual_bits=None))[0].residual is None
    mixed = model(residual_bits=None, training=True, overrides={"2": {"bits": 8}, "0": {"bits": 1, "residual_bits": 3}})
    assert [w.residual_bits for w in weights_of(mixed)] == [3, 0]


def test_quantize_refuses_before_it_changes_anything():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="residual_bits is 7"):
        subbyte.quantize_(net, bits=2, residual_bits=7)
    with pytest.raises(ValueError, match="1 is a table"):
        subbyte.quantize_(net, bits=2, training=True, scheme="fan_in")
    assert not weights_of(net)
    report = subbyte.quantize_(net, bits=2, training=True, scheme="fan_in", overrides={"1": {"scheme": "midrise"}})
    assert report.layers[0].bits_per_weight > 8
    assert weights_of(net)[1].residual_bits == 6


def test_layers_are_made_with_a_residual():
    layer = subbyte.nn.Linear(70, 9, bits=1, residual_bits=7, scheme="fan_in")
    assert layer.weight.residual_bits == 7 and "residual_bits=7" in repr(layer)
    assert subbyte.nn.Embedding(9, 70, bits=2, residual_bits=6).weight.residual_bits == 6
    assert subbyte.nn.Linear.from_float(torch.nn.Linear(70, 9), bits=2, residual_bits=2).weight.residual_bits == 2


# ---- training

OPTIMIZERS = {
    "PackedAdamW": lambda p, lr: PackedAdamW(p, lr=lr),
    "PackedSGD": lambda p, lr: PackedSGD(p, lr=30 * lr, momentum=0.9),
    "PackedLion": lambda p, lr: PackedLion(p, lr=lr),
    "DiodeMix": lambda p, lr: DiodeMix(p, lr=lr, betas=(0.9, 0.999), eps=1e-8),
    "torch AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "torch AdamW, no foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False),
    "torch SGD": lambda p, lr: torch.optim.SGD(p, lr=30 * lr, momentum=0.9),
    "torch RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "torch Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=10 * lr),
    "torch NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
}


def train(net, optimizer, steps):
    g = torch.Generator().manual_seed(7)
    device = next(net.parameters()).device
    x = torch.randn(256, 20, generator=g).to(device)
    y = torch.tanh(x @ torch.randn(20, 12, generator=g).to(device) / 3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("format,r", [("uint2", 6), ("sign", 7), ("ternary", 6)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_through_the_residual_with_the_same_bits_for_the_same_seed(name, format, r, device):
    runs = []
    for _ in range(2):
        net = model(bits=None, format=format, residual_bits=r, device=device)
        start = copy.deepcopy(net)
        torch.manual_seed(11)
        losses = train(net, OPTIMIZERS[name](net.parameters(), 2e-3), 60)
        runs.append(net)
        assert min(losses[-5:]) < 0.8 * losses[0], losses[::10]
        for w, old in zip(weights_of(net), weights_of(start)):
            assert not torch.equal(w.codes, old.codes) and not torch.equal(w.residual, old.residual)
    assert same_models(*runs)


@pytest.mark.parametrize("name", ["PackedAdamW", "PackedSGD", "DiodeMix", "torch AdamW", "torch SGD"])
@pytest.mark.parametrize("format,r", [("uint2", 6), ("sign", 7), ("ternary", 6), ("uint2", 2)])
def test_the_first_step_is_that_of_the_optimizer_on_the_fine_values_up_to_one_fine_level(name, format, r, device):
    torch.manual_seed(0)
    w = torch.nn.Parameter(weight(format, r, scheme="fan_in", device=device))
    dense = torch.nn.Parameter(w.detach().dequantize_fine())
    gradient = normal(seed=9, device=device)
    for p in (w, dense):
        p.grad = gradient.clone()
        twin = {"PackedAdamW": "torch AdamW", "PackedSGD": "torch SGD"}.get(name, name)
        OPTIMIZERS[name if p is w else twin]([p], 0.003).step()
    levels = levels_of(format) * 2**r
    step = 2 * REACH[format] / math.sqrt(70) / levels
    end = step * (levels - 1) / 2
    # torch AdamW on w rescales the grid by its weight decay, by 3e-5 of the value.
    assert (w.detach().dequantize_fine() - dense.detach().clamp(-end, end)).abs().max() <= step * 1.001 + 3e-5 * end


def test_steps_of_many_seeds_have_the_mean_of_the_exact_step():
    exact, count = None, 300
    total = torch.zeros(9, 70, dtype=torch.float64)
    for seed in range(count):
        w = torch.nn.Parameter(weight("sign", 3, scheme="fan_in"))
        start = w.detach().dequantize_fine().double()
        w.grad = normal(seed=9)
        PackedSGD([w], lr=0.05, seed=seed).step()
        total += w.detach().dequantize_fine().double() - start
        exact = -0.05 * w.grad.double()
    step = 2 * 2 / math.sqrt(70) / 16
    q = fine_codes(weight("sign", 3, scheme="fan_in"))
    inside = (q > 1) & (q < 14)
    fraction = (exact / step).abs() % 1
    bound = step * (6 * (fraction * (1 - fraction) / count).sqrt() + 6 / count)
    assert bool(((total / count - exact).abs() <= bound)[inside].all()) and int(inside.sum()) > 300


def test_update_in_backward_has_the_bits_of_the_ordinary_mode(device):
    nets = []
    for in_backward in (False, True):
        net = model(device=device)
        optimizer = PackedAdamW(net.parameters(), lr=2e-3)
        if in_backward:
            optimizer.update_in_backward()
        train(net, optimizer, 5)
        nets.append(net)
    assert same_models(*nets)


def test_a_run_resumed_from_a_file_goes_on_bit_for_bit(tmp_path):
    nets = []
    for resumed in (False, True):
        net = model()
        optimizer = PackedAdamW(net.parameters(), lr=2e-3)
        train(net, optimizer, 4)
        if resumed:
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
            net = model(seed=5)
            optimizer = PackedAdamW(net.parameters(), lr=2e-3)
            state = torch.load(tmp_path / "run.pt", weights_only=True)
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        train(net, optimizer, 4)
        nets.append(net)
    assert same_models(*nets)


def test_rules_that_know_no_residual_refuse_it():
    w = torch.nn.Parameter(weight("sign", 7))
    w.grad = normal(seed=9)
    with pytest.raises(ValueError, match="drop_residual"):
        DiodeMix([{"params": [w], "rule": "binary"}]).step()
    with pytest.raises(ValueError, match="drop_residual"):
        subbyte.mpq.mpq_update_(w, w.grad, torch.zeros(9, 70), torch.zeros(9, 70), 1)
