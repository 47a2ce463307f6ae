"""PackedWeight is a float tensor to PyTorch and packed codes to memory."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight

FORMATS = ["sign", "ternary", *(f"uint{b}" for b in range(2, 9))]


def weight(n=12, k=37, device="cpu", **options):
    options = {"bits": 4, "group_size": 16, **({} if "format" not in options else {"bits": None}), **options}
    return torch.nn.Parameter(PackedWeight.from_float(torch.randn(n, k), **options).to(device))


def dense_twin(w):
    return w.detach().dequantize().clone().requires_grad_()


def same_parts(a, b):
    return list(a.parts) == list(b.parts) and all(torch.equal(p, b.parts[name]) for name, p in a.parts.items())


# ---- what it says it is


@pytest.mark.parametrize("format", FORMATS)
def test_it_has_the_shape_of_the_values_and_the_bytes_of_the_codes(format):
    w = PackedWeight.from_float(torch.randn(6, 100), format=format, group_size=32)
    bits = {"sign": 1, "ternary": 2}.get(format) or int(format[4:])
    assert w.shape == (6, 100) and w.dtype == torch.float32 and w.bits == bits and w.format == format and w.group_size == 32
    assert w.codes.shape == (6, -(-100 * bits // 8)) and w.scales.shape == (6, 4)
    kinds = 1 if format in ("sign", "ternary") else 2
    assert w.nbytes == 6 * -(-100 * bits // 8) + kinds * 6 * 4 * 4 and w.bits_per_weight == w.nbytes * 8 / 600
    assert format in repr(w) and "[6, 100]" in repr(w) and "group_size=32" in repr(w)


def test_mixed_width_counts_the_mean_bits_and_has_no_single_width():
    w = PackedWeight.from_float(torch.randn(3, 128), format="uint8*64+uint2*64", group_size=32)
    assert w.bits == 5 and w.codes.shape == (3, 80)
    assert torch.equal(w.dequantize(), subbyte.functional.dequantize(w))


def test_symmetric_weights_have_neither_zeros_nor_offsets_and_the_kind_can_be_chosen():
    w = torch.randn(4, 64)
    assert list(PackedWeight.from_float(w, bits=4, sym=True).parts) == ["codes", "scales"]
    assert list(PackedWeight.from_float(w, bits=4).parts) == ["codes", "scales", "offsets"]
    assert list(PackedWeight.from_float(w, bits=4, zero_kind="zeros").parts) == ["codes", "scales", "zeros"]
    assert PackedWeight.from_float(w, bits=4, group_size=-1).group_size == 64
    assert PackedWeight.from_float(w, bits=4, scale_dtype=torch.float16).scales.dtype == torch.float16


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(), "one of bits and format"),
        (dict(bits=4, format="uint4"), "one of bits and format"),
        (dict(bits=9), "1 to 8"),
        (dict(bits=4.0), "1 to 8"),
        (dict(format="uint9"), "uint9"),
        (dict(bits=4, group_size=0), "group_size"),
        (dict(bits=4, sym=True, zero_kind="zeros"), "zero_kind"),
        (dict(bits=4, scheme="best"), "best"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_names_it(arguments, says):
    with pytest.raises(ValueError, match=says):
        PackedWeight.from_float(torch.randn(4, 32), **arguments)


def test_parts_that_contradict_each_other_are_refused():
    w = weight()
    parts = dict(w.parts)
    with pytest.raises(ValueError, match="scales"):
        PackedWeight(**{**parts, "scales": parts["scales"][:, :1]}, format="uint4", in_features=37, group_size=16)
    with pytest.raises(ValueError, match="codes"):
        PackedWeight(**parts, format="uint5", in_features=37, group_size=16)
    with pytest.raises(ValueError, match="3|three|\\[N, K\\]"):
        PackedWeight.from_float(torch.randn(2, 3, 4), bits=4)


# ---- products and gradients

PRODUCTS = {
    "linear": lambda w, x: F.linear(x, w),
    "linear of a vector": lambda w, x: F.linear(x[0, 0], w),
    "linear with bias": lambda w, x: F.linear(x, w, torch.arange(float(w.shape[0]), device=x.device)),
    "matmul with t": lambda w, x: x @ w.t(),
    "matmul with T": lambda w, x: x[0] @ w.T,
    "matmul with mT": lambda w, x: torch.matmul(x, w.mT),
    "transpose and mm": lambda w, x: torch.mm(x[0], w.transpose(0, 1)),
    "addmm": lambda w, x: torch.addmm(torch.ones(w.shape[0], device=x.device), x[0], w.t(), alpha=2, beta=3),
    "from the left": lambda w, x: w @ x[0].t(),
    "mv": lambda w, x: w @ x[0, 0],
    "transposed from the left": lambda w, x: w.t() @ torch.ones(w.shape[0], 2, device=x.device),
    "einsum": lambda w, x: torch.einsum("bik,nk->bin", x, w),
    "embedding": lambda w, x: F.embedding(torch.tensor([[1, 2], [0, 1]], device=x.device), w),
    "embedding with padding": lambda w, x: F.embedding(
        torch.tensor([[1, 2], [0, 1]], device=x.device), w, padding_idx=-w.shape[0] + 1
    ),
    "abs": lambda w, x: w.abs().sum(),
    "slice": lambda w, x: w[2:4, 3:7],
    "view": lambda w, x: w.view(-1).sum(),
    "times itself": lambda w, x: w * w,
    "norm": lambda w, x: torch.linalg.vector_norm(w),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_are_those_of_the_dense_values(name, device):
    for options in (dict(), dict(sym=True), dict(format="ternary"), dict(zero_kind="zeros", perm=torch.randperm(37).int())):
        w = weight(device=device, **options)
        d, x = dense_twin(w), torch.randn(3, 5, 37, device=device)
        a, b = PRODUCTS[name](w, x), PRODUCTS[name](d, x)
        assert type(a) is torch.Tensor and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
        assert type(w.grad) is torch.Tensor and w.grad.shape == w.shape and w.grad.dtype == w.dtype
        torch.testing.assert_close(w.grad, d.grad, atol=2e-3, rtol=1e-4)


def test_products_do_not_dequantize(monkeypatch):
    import subbyte.packed_weight as module

    def refuse(*args):
        raise AssertionError("the dense values were formed")

    monkeypatch.setattr(module, "_run_dense", refuse)
    monkeypatch.setattr(PackedWeight, "dequantize", refuse)
    w, x = weight(), torch.randn(5, 37, requires_grad=True)
    for y in (
        F.linear(x, w),
        x @ w.t(),
        torch.mm(x, w.t()),
        torch.addmm(torch.zeros(12), x, w.T),
        w @ x.t(),
        F.embedding(torch.tensor([1, 2]), w),
    ):
        y.sum().backward()
    assert w.grad is not None and x.grad is not None
    with torch.inference_mode():
        x.detach() @ w.t(), F.linear(x.detach(), w), F.embedding(torch.tensor([1]), w)


def test_gradients_reach_x_and_bias_also_where_the_weight_is_frozen(device):
    w, x, b = (
        weight(device=device).requires_grad_(False),
        torch.randn(3, 37, device=device, requires_grad=True),
        torch.zeros(12, device=device, requires_grad=True),
    )
    F.linear(x, w, b).sum().backward()
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(3, 37), atol=1e-5, rtol=1e-5)
    assert torch.equal(b.grad, torch.full((12,), 3.0, device=device)) and w.grad is None


def test_autocast_computes_in_the_narrow_type_and_gives_the_gradient_in_the_weights(device):
    w, x = weight(device=device), torch.randn(4, 37, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = F.linear(x, w)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ w.detach().dequantize().t(), atol=0.2, rtol=0.05)


def test_inference_mode_works_on_weights_made_outside_and_inside_it(device):
    w, x = weight(device=device), torch.randn(4, 37, device=device)
    expected = F.linear(x, w).detach()
    with torch.inference_mode():
        inside = PackedWeight.from_float(torch.randn(3, 37, device=device), bits=3)
        assert F.linear(x, inside).shape == (4, 3) and (x @ inside.t()).shape == (4, 3)
        for y in (F.linear(x, w), x @ w.t(), torch.nn.functional.linear(x[None], w)[0]):
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        assert w[0].shape == (37,)


# ---- moving, copying, storing


def test_to_another_dtype_keeps_every_stored_bit(device):
    w = weight(device=device)
    half = w.half()
    assert half.dtype == torch.float16 and same_parts(half, w) and same_parts(half.float(), w)
    assert half.dequantize().dtype == torch.float16 and torch.equal(half.dequantize(torch.float32), w.detach().dequantize())
    assert w.to(torch.int32).dtype == torch.int32
    assert w.to("meta").codes.is_meta and w.cpu().codes.device.type == "cpu"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "torch.save, weights_only", "clone", "cpu"])
def test_a_copy_has_the_same_parts_in_other_memory(how):
    w = weight(zero_kind="zeros", perm=torch.randperm(37).int())
    w.grad = torch.ones(12, 37)

    def through_file(**options):
        file = io.BytesIO()
        torch.save({"w": w}, file)
        file.seek(0)
        return torch.load(file, **options)["w"]

    c = {
        "deepcopy": lambda: copy.deepcopy(w),
        "pickle": lambda: pickle.loads(pickle.dumps(w)),
        "clone": lambda: w.detach().clone(),
        "torch.save": lambda: through_file(weights_only=False),
        "torch.save, weights_only": lambda: through_file(weights_only=True),
        "cpu": lambda: w.detach().to("cpu", copy=True),
    }[how]()
    assert type(c) is PackedWeight and same_parts(c, w) and c.dtype == w.dtype
    assert all(p.data_ptr() != w.parts[name].data_ptr() for name, p in c.parts.items())
    if how not in ("clone", "cpu"):
        assert isinstance(c, torch.nn.Parameter) and c.requires_grad
    if how == "deepcopy":
        assert torch.equal(c.grad, w.grad) and c.grad is not w.grad


def test_a_model_moves_between_types_and_keeps_its_parameter_objects_in_the_optimizer(device):
    model = subbyte.nn.Linear(37, 12, bits=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.to(device).half().float().to(torch.float64).float()
    assert optimizer.param_groups[0]["params"][0] is model.weight and model.weight.device.type == device
    assert isinstance(model.weight, torch.nn.Parameter) and type(model.weight) is PackedWeight
    model(torch.randn(2, 37, device=device)).sum().backward()
    optimizer.step()


def test_copying_between_equal_grids_is_exact_and_from_dense_rounds_onto_the_own_grid(device):
    a, b = weight(device=device).detach(), weight(device=device).detach()
    a.copy_(b)
    assert same_parts(a, b)
    scales = a.scales.clone()
    values = torch.rand(12, 37, device=device) * 0.2
    a.copy_(values)
    steps = a.scales.repeat_interleave(16, 1)[:, :37]
    assert torch.equal(a.scales, scales) and bool(((a.dequantize() - values).abs() <= steps * 1.0001).all())


# ---- in-place updates


def test_every_in_place_op_moves_the_values_as_on_a_dense_tensor_up_to_one_level(device):
    g, h = torch.randn(12, 37, device=device) * 0.1, torch.rand(12, 37, device=device) + 0.5
    updates = {
        "add_": lambda p: p.add_(g, alpha=-0.5),
        "sub_": lambda p: p.sub_(g),
        "addcdiv_": lambda p: p.addcdiv_(g, h, value=-0.3),
        "addcmul_": lambda p: p.addcmul_(g, h, value=0.3),
        "lerp_": lambda p: p.lerp_(g, 0.1),
        "clamp_": lambda p: p.clamp_(-0.5, 0.5),
        "mul_ by a tensor": lambda p: p.mul_(h),
        "div_ by a tensor": lambda p: p.div_(h + 1),
        "zero_": lambda p: p.zero_(),
        "fill_": lambda p: p.fill_(0.25),
        "+=": lambda p: p.__iadd__(g),
        "foreach add": lambda p: torch._foreach_add_([p], [g], alpha=-1),
        "foreach addcdiv": lambda p: torch._foreach_addcdiv_([p], [g], [h], -0.3),
        "out=": lambda p: torch.sub(p, g, out=p),
        "copy_": lambda p: p.copy_(g),
        "masked_fill_": lambda p: p.masked_fill_(h > 1, 0.1),
        "setitem": lambda p: p.__setitem__((slice(2, 4), 5), 0.1),
    }
    for name, update in updates.items():
        w = weight(device=device, bits=6).detach()
        d = w.dequantize()
        lowest, highest = d.clone().fill_(0), None
        levels = subbyte.functional.unpack(w.codes, w.format, 37)
        assert levels.max() <= 63
        steps = w.scales.repeat_interleave(16, 1)[:, :37]
        lowest = w.offsets.repeat_interleave(16, 1)[:, :37]
        highest = lowest + steps * 63
        update(w)
        update(d)
        clipped = torch.minimum(torch.maximum(d, lowest), highest)
        difference = (w.dequantize() - clipped).abs()
        assert bool((difference <= steps * 1.001 + 1e-6).all()), f"{name}: off by {float((difference / steps).max())} levels"


def test_mul_by_a_number_rescales_the_grid_and_leaves_the_codes(device):
    for options in (dict(), dict(zero_kind="zeros"), dict(sym=True)):
        w = weight(device=device, **options).detach()
        codes, values = w.codes.clone(), w.dequantize()
        w.mul_(0.999)
        assert torch.equal(w.codes, codes)
        torch.testing.assert_close(w.dequantize(), values * 0.999, atol=1e-6, rtol=1e-6)
        before = w.dequantize()
        torch._foreach_mul_([w], -2.0)
        assert torch.equal(w.codes, codes) and torch.equal(w.dequantize(), before * -2)
        w.div_(torch.tensor(4.0, device=device)).neg_()
        assert torch.equal(w.codes, codes) and torch.equal(w.dequantize(), before / 2)


def test_mul_on_16_bit_scales_rounds_codes_instead_of_losing_the_factor():
    w = weight(n=64, k=512, bits=8, group_size=512, scale_dtype=torch.bfloat16).detach()
    scales, mean = w.scales.clone(), w.dequantize().abs().mean()
    for _ in range(20):
        w.mul_(0.999)
    assert torch.equal(w.scales, scales)
    assert abs(float(w.dequantize().abs().mean() / mean) - 0.999**20) < 2e-3
    w.mul_(0.5)
    assert torch.equal(w.scales, scales * 0.5)


def test_small_steps_are_not_lost_but_taken_with_their_probability():
    w = PackedWeight.from_float(torch.zeros(256, 256) + torch.linspace(-1, 1, 256), bits=4, group_size=256)
    before = w.dequantize()
    step = float(w.scales[0, 0]) / 100  # nearest rounding would never move
    for _ in range(10):
        w.add_(torch.full_like(w, step))
    inside = before < 0.9
    moved = (w.dequantize() - before)[inside].mean()
    deviation = float(w.scales[0, 0]) * (10 * 0.01 * 0.99 / int(inside.sum())) ** 0.5
    assert abs(float(moved) - 10 * step) < 6 * deviation + 1e-5


def test_bfloat16_weights_take_steps_far_below_the_precision_of_bfloat16():
    w = PackedWeight.from_float(
        torch.full((128, 128), 100.0) + torch.linspace(-1, 1, 128), bits=8, group_size=128, dtype=torch.bfloat16
    )
    before = w.dequantize(torch.float32)
    for _ in range(50):
        w.add_(torch.full((128, 128), 0.001, dtype=torch.bfloat16))
    moved = (w.dequantize(torch.float32) - before)[:, 1:-16].mean()
    assert 0.04 < float(moved) < 0.06


def test_manual_seed_repeats_an_update_and_a_generator_of_its_own_leaves_the_default_one_alone():
    g = torch.randn(12, 37)

    def run():
        w = PackedWeight.from_float(torch.linspace(-1, 1, 12 * 37).view(12, 37), bits=2, group_size=16)
        return w.add_(g, alpha=0.1).codes

    torch.manual_seed(5)
    first, other = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run()) and not torch.equal(first, other)
    try:
        subbyte.set_rounding_generator(torch.Generator().manual_seed(9))
        state = torch.get_rng_state()
        ours = run()
        assert torch.equal(state, torch.get_rng_state())
        subbyte.set_rounding_generator(torch.Generator().manual_seed(9))
        assert torch.equal(ours, run())
    finally:
        subbyte.set_rounding_generator(None)


def test_an_update_between_forward_and_backward_is_an_error_as_for_any_tensor():
    w, x = weight(), torch.randn(3, 37, requires_grad=True)
    y = F.linear(x, w).sum()
    with torch.no_grad():
        w.add_(torch.ones(12, 37))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward()


def test_values_that_are_not_finite_are_refused_and_leave_the_weight_alone():
    w = weight().detach()
    codes = w.codes.clone()
    with pytest.raises(ValueError, match="finite|NaN|nan|inf"):
        w.add_(torch.full((12, 37), float("nan")))
    assert torch.equal(w.codes, codes)


# ---- compile


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_forward_and_backward_equal_eager_without_a_graph_break(dynamic, trained, device):
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        subbyte.nn.Embedding(20, 37, bits=8, group_size=16, scale_dtype=torch.float16),
        subbyte.nn.Linear(37, 12, bits=4, group_size=16),
        torch.nn.ReLU(),
        subbyte.nn.Linear(12, 5, format="ternary", group_size=8),
    ).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(trained or parameter.dim() == 1)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for count in (4, 6):
        x = torch.randint(0, 20, (count, 3), device=device)
        model.zero_grad()
        expected = model(x)
        expected.square().sum().backward()
        expected_grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        y = compiled(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        y.square().sum().backward()
        for p, g in zip(model.parameters(), expected_grads):
            assert (p.grad is None) == (g is None)
            if g is not None:
                assert type(p.grad) is torch.Tensor
                torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=1e-4)
    # The optimizer steps outside; compiled code sees the new codes.
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_compiling_an_update_is_refused_because_its_seed_would_be_frozen():
    torch._dynamo.reset()
    w = weight().detach()

    def update(w, g):
        w.add_(g)
        return w.abs().sum()

    with pytest.raises(Exception, match="cannot be compiled"):
        torch.compile(update, fullgraph=True)(w, torch.ones(12, 37))


def test_shared_memory_holds_the_parts():
    layer = subbyte.nn.Linear(16, 8, bits=4, group_size=8)
    with torch.no_grad():
        expected = layer(torch.ones(2, 16))
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.codes.is_shared() and layer.weight.scales.is_shared()
    assert isinstance(layer.weight, PackedWeight) and torch.equal(layer(torch.ones(2, 16)), expected)


def test_to_empty_makes_packed_storage_to_load_into(device):
    layer = subbyte.nn.Linear(16, 8, bits=4, group_size=8, device=device)
    empty = copy.deepcopy(layer).to("meta").to_empty(device=device)
    assert isinstance(empty.weight, PackedWeight) and empty.weight.requires_grad and empty.weight.device.type == device
    empty.load_state_dict(layer.state_dict())
    x = torch.ones(2, 16, device=device)
    assert torch.equal(empty(x), layer(x))
    assert type(torch.empty_like(layer.weight)) is torch.Tensor  # an optimizer's state


def test_assigning_data_changes_the_packed_values():
    weight = torch.nn.Parameter(PackedWeight.from_float(torch.randn(8, 16), bits=4, group_size=8))
    level = float(weight.scales.max())
    weight.data = torch.full((8, 16), 0.25)
    assert float((weight.dequantize() - 0.25).abs().max()) <= level
    torch.nn.utils.vector_to_parameters(torch.full((128,), -0.25), [weight])
    assert float((weight.dequantize() + 0.25).abs().max()) <= level
    other = PackedWeight.from_float(torch.randn(8, 16), bits=3, sym=True, dtype=torch.float16)
    weight.data = other
    assert weight.format == "uint3" and weight.dtype == torch.float16 and weight.offsets is None and weight.requires_grad
    assert torch.equal(weight.dequantize(), other.dequantize())
    with pytest.raises(ValueError, match=r"data of shape \[3\] is assigned to a weight of shape \[8, 16\]"):
        weight.data = torch.zeros(3)


def test_an_exchange_of_memory_that_holds_no_values_is_refused():
    weight = PackedWeight.from_float(torch.randn(8, 16), bits=4)
    with pytest.raises(TypeError, match="dequantize"):
        torch.from_dlpack(weight)
