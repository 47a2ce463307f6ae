"""BinaryEmbedding, BinaryEmbeddingBag, sparse gradients of packed tables, and what the originals got wrong (E1 to E12)."""

import copy
import io
import time

import pytest
import torch

import subbyte
from subbyte import PackedWeight, functional
from subbyte.nn import BinaryEmbedding, BinaryEmbeddingBag, Embedding


def bits_of(module):
    d = module.embedding_dim
    return ((module.qweight.unsqueeze(-1).long() >> torch.arange(8, device=module.qweight.device)) & 1).flatten(1)[:, :d].bool()


def values_of(module):
    return module.scale_w.detach().double() * (2 * bits_of(module).double() - 1)


def pack8(bits):
    pad = -bits.shape[1] % 8
    b = torch.nn.functional.pad(bits.long(), (0, pad)).reshape(bits.shape[0], (bits.shape[1] + pad) // 8, 8)
    return (b << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)


def step_descends(module, indices, g):
    """One backward pass with gradient g of the output; the change of the weights against the gradient."""
    (module(indices) * g).sum().backward()


# ---- the defect list


def test_E1_gradients_touch_active_rows_alone_ignore_the_padding_bits_and_never_write_into_the_incoming_gradient(device):
    for d in (16, 13):
        module = BinaryEmbedding(50, d, gradient="packed", device=device)
        indices = torch.tensor([[3, 7], [3, 49]], device=device)
        g = torch.randn(2, 2, d, device=device)
        kept = g.clone()
        module(indices).backward(g)
        assert torch.equal(g, kept)
        rows, bits = module.packed_grad
        assert rows.tolist() == [3, 7, 49] and bits.shape == (3, (d + 7) // 8)
        a = torch.stack([g[0, 0] + g[1, 0], g[0, 1], g[1, 1]])
        assert torch.equal(bits, pack8(a >= 0))  # spare bits are 0
        module.zero_grad()
        assert module.packed_grad is None


@pytest.mark.parametrize("gradient", ["sparse", "packed", "dense"])
def test_E2_descent_moves_every_active_bit_against_its_gradient_where_xor_moves_half_of_them_uphill(device, gradient):
    moved = {}
    for mode in ("descent", "xor"):
        module = BinaryEmbedding(60, 21, gradient=gradient, device=device)
        indices = torch.tensor([5, 8, 5, 31], device=device)
        g = torch.randn(4, 21, device=device)
        before, old = values_of(module), bits_of(module)
        step_descends(module, indices, g)
        module.update_(mode)
        change = values_of(module) - before
        a = torch.zeros(60, 21, device=device).index_add_(0, indices, g)
        idle = [v for v in range(60) if v not in (5, 8, 31)]
        assert (change[idle] == 0).all()
        moved[mode] = (change * a.double()).sum().item()
        want = ~(a >= 0) if mode == "descent" else old ^ (a >= 0)
        assert torch.equal(bits_of(module)[[5, 8, 31]], want[[5, 8, 31]])
        uphill = (change * a.double() > 0).sum().item()
        assert uphill == 0 if mode == "descent" else uphill > 5
    assert moved["descent"] < 0


def test_E3_sparse_update_embedding_qweight(device):
    qweight = torch.randint(0, 256, (10, 3), dtype=torch.uint8, device=device)
    grad = torch.randint(0, 256, (10, 3), dtype=torch.uint8, device=device)
    active = torch.tensor([[4, 1], [4, 9]], device=device)
    for mode, rule in [("descent", lambda q, g: ~g), ("xor", lambda q, g: q ^ g)]:
        want = qweight.clone()
        want[[1, 4, 9]] = rule(qweight, grad)[[1, 4, 9]]
        for g in (grad, grad[[1, 4, 9]]):
            got = functional.sparse_update_embedding_qweight(qweight.clone(), g, active, mode=mode)
            assert torch.equal(got, want)
    cut = functional.sparse_update_embedding_qweight(qweight.clone(), grad, active.int(), embedding_dim=20)
    assert torch.equal(cut[:, 2] >> 4, qweight[:, 2] >> 4) and torch.equal(cut[[1, 4, 9], 0], ~grad[[1, 4, 9], 0])
    with pytest.raises(ValueError, match="mode is 'up'"):
        functional.sparse_update_embedding_qweight(qweight, grad, active, mode="up")
    with pytest.raises(IndexError, match="reach from 2 to 10"):
        functional.sparse_update_embedding_qweight(qweight, grad, active + 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_E4_the_update_keeps_state_for_the_rows_touched_alone(device, dtype):
    module = BinaryEmbedding(10000, 24, device=device)
    for first in (0, 3):
        indices = torch.arange(first, first + 6, device=device) * 100
        step_descends(module, indices, torch.randn(6, 24, device=device))
        module.update_(momentum_dtype=dtype)
    assert len(module.momentum) == 9 and module.momentum.momentum.shape[0] < 40
    assert module.momentum.rows.tolist() == [i * 100 for i in range(9)]
    assert module.momentum.momentum.dtype == dtype and module.momentum.momentum.shape[1] == 24
    state = io.BytesIO()
    torch.save(module.momentum.state_dict(), state)
    state.seek(0)
    again = functional.RowMomentum(24)
    again.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(again.slots_of(again.rows, module.qweight), module.momentum.slots)


def test_E5_momentum_waits_and_then_goes_downhill(device):
    module = BinaryEmbedding(30, 64, device=device)
    before = bits_of(module)[4].clone()
    g = torch.where(torch.arange(64, device=device) % 2 == 0, 1.0, -1.0)
    flipped = []
    for _ in range(12):
        step_descends(module, torch.tensor([4], device=device), g[None])
        module.update_(beta=0.9, momentum_dtype=torch.float32)
        now = bits_of(module)[4]
        flipped.append(int((now != before).sum()))
        assert torch.equal(now == (g < 0), (now == before) == (before == (g < 0)))  # no bit ends up with its gradient by moving
    # ln(1.5) / -ln(0.9) = 3.85: bits against the gradient flip at step 4, all at once, and the others never.
    wrong = int((before == (g > 0)).sum())
    assert flipped[:3] == [0, 0, 0] and flipped[3:] == [wrong] * 9
    assert torch.equal(bits_of(module)[4], g < 0)


def test_E6_active_indices_belong_to_the_instance(device):
    one, other = (BinaryEmbedding(20, 8, device=device) for _ in range(2))
    a, b = torch.tensor([1, 2], device=device), torch.tensor([[3]], device=device)
    one(a)
    assert other.active_indices is None
    other(b)
    assert torch.equal(one.active_indices, a) and torch.equal(other.active_indices, b)
    bag = BinaryEmbeddingBag(20, 8, device=device)
    bag(b)
    assert torch.equal(bag.active_indices, b) and torch.equal(one.active_indices, a)
    with torch.no_grad():
        one(b)
    assert torch.equal(one.active_indices, a)


def test_E7_any_padding_idx_inside_the_table_works_and_others_are_a_value_error(device):
    for cls in (BinaryEmbedding, BinaryEmbeddingBag):
        assert cls(10, 8, 3, device=device).padding_idx == 3
        assert cls(10, 8, -1, device=device).padding_idx == 9
        assert cls(10, 8, 0, device=device).padding_idx == 0
        for bad in (10, -11):
            with pytest.raises(ValueError, match=f"padding_idx is {bad}"):
                cls(10, 8, bad, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_E8_scales_are_means_over_the_real_columns_in_the_layers_dtype_and_the_padding_row_is_zero(device, dtype):
    dense = torch.nn.Embedding(12, 13, padding_idx=5, device=device, dtype=dtype)
    module = BinaryEmbedding.from_float(dense)
    w = dense.weight.detach().double()
    w = w - w.mean()
    w[5] = 0
    assert module.scale_w.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert torch.allclose(module.scale_w.double(), w.abs().mean(1, keepdim=True), rtol=tolerance, atol=tolerance)
    near = w.abs() > tolerance
    assert torch.equal(bits_of(module)[near], (w >= 0)[near]) and module.scale_w[5] == 0
    y = module(torch.tensor([5, 2], device=device))
    assert y.dtype == dtype and (y[0] == 0).all()
    y.sum().backward()
    assert module.weight.grad.coalesce().indices()[0].tolist() == [2]


def test_E9_indices_of_any_shape_and_both_integer_types(device):
    module = BinaryEmbedding(15, 11, device=device)
    values = values_of(module)
    for shape in [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)]:
        for index_type in (torch.int64, torch.int32):
            indices = torch.randint(0, 15, shape, device=device).to(index_type)
            y = module(indices)
            assert y.shape == (*shape, 11) and torch.allclose(y.detach().double(), values[indices.long()])
            y.sum().backward()
            assert torch.equal(module.weight.grad.coalesce().indices()[0], torch.unique(indices.long()))
            module.weight.grad = None
    if device == "cpu":
        with pytest.raises(IndexError, match="index 15 at position 1"):
            module(torch.tensor([0, 15]))


def test_E10_prepare_params_may_be_called_any_number_of_times_and_keeps_what_was_loaded(device):
    module = BinaryEmbedding(9, 10, 4, device=device)
    before = values_of(module)
    module.prepare_params()
    module.prepare_params()
    assert torch.equal(values_of(module), before)
    with torch.no_grad():
        module.weight.scales.zero_()  # as after loading nothing
    module.prepare_params()
    after = values_of(module)
    assert (after != 0).any() and (after[4] == 0).all()
    module.prepare_params()
    assert torch.equal(values_of(module), after)


def test_E11_bags_are_float_and_the_gradient_of_a_bag_goes_to_its_own_look_ups(device):
    module = BinaryEmbeddingBag(20, 9, device=device)
    indices = torch.tensor([[1, 2, 3], [4, 5, 1]], device=device)
    y = module(indices)
    assert y.dtype == torch.float32 and y.requires_grad
    votes = bits_of(module)[indices].sum(1)
    assert torch.equal(y.detach(), torch.where(votes >= 2, 1.0, -1.0))
    g = torch.randn(2, 9, device=device)
    y.backward(g)
    gradient = module.weight.grad.coalesce()
    assert gradient.indices()[0].tolist() == [1, 2, 3, 4, 5]
    assert torch.allclose(gradient.values(), torch.stack([g[0] + g[1], g[0], g[0], g[1], g[1]]))
    even = module(torch.tensor([[6, 7]], device=device))
    assert torch.equal(even[0].detach() == 1, bits_of(module)[6] | bits_of(module)[7])  # ties go up
    assert module.to(torch.bfloat16)(indices).dtype == torch.bfloat16


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_E12_scales_train_when_asked_to(device, gradient):
    module = BinaryEmbedding(20, 13, 6, gradient=gradient, train_scale=True, device=device)
    indices = torch.tensor([2, 6, 2, 11], device=device)
    g = torch.randn(4, 13, device=device)
    sign, scale = 2 * bits_of(module).double() - 1, module.scale.detach().double()
    y = module(indices)
    assert torch.allclose(y.detach().double(), (scale * sign)[indices])
    y.backward(g)
    want = torch.zeros(20, 1, dtype=torch.float64, device=device)
    weights = torch.zeros(20, 13, dtype=torch.float64, device=device)
    for j, v in enumerate(indices.tolist()):
        if v != 6:
            want[v] += (g[j].double() * sign[v]).sum()
            weights[v] += scale[v] * g[j].double()
    assert torch.allclose(module.scale.grad.to_dense().double(), want, atol=1e-5)
    assert torch.allclose(module.weight.grad.to_dense().double(), weights, atol=1e-5)
    assert module.scale.grad.layout == (torch.sparse_coo if gradient == "sparse" else torch.strided)


# ---- modules


def test_sparse_gradients_add_up_over_backward_passes_and_shared_uses(device):
    module = BinaryEmbedding(12, 10, device=device)
    a, b = torch.tensor([1, 4], device=device), torch.tensor([4, 7], device=device)
    ga, gb = torch.randn(2, 10, device=device), torch.randn(2, 10, device=device)
    (module(a) * ga).sum().backward()
    ((module(b) * gb).sum() + (module(a) * ga).sum()).backward()
    want = torch.zeros(12, 10, device=device).index_add_(0, a, 2 * ga).index_add_(0, b, gb)
    assert torch.allclose(module.weight.grad.to_dense(), want, atol=1e-6)
    module.update_("descent")
    assert torch.equal(bits_of(module)[[1, 4, 7]], (want < 0)[[1, 4, 7]])


def test_state_dict_copies_and_pickles_hold_the_table(device):
    for make in (
        lambda: BinaryEmbedding(17, 13, 2, device=device),
        lambda: BinaryEmbedding(17, 13, train_scale=True, device=device),
        lambda: BinaryEmbeddingBag(17, 13, 2, mode="mean", device=device),
    ):
        module, other = make(), make()
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        whole = io.BytesIO()
        torch.save(module, whole)
        whole.seek(0)
        for same in (other, copy.deepcopy(module), torch.load(whole, weights_only=False)):
            assert torch.equal(values_of(same), values_of(module)) and same.padding_idx == module.padding_idx
        other.weight.codes.zero_()
        assert not torch.equal(values_of(other), values_of(module))
    assert "weight.codes" in module.state_dict()


def test_moving_and_converting(device):
    module = BinaryEmbedding(17, 13, train_scale=True)
    module(torch.tensor([1])).sum().backward()
    module.update_()
    module = module.to(device, torch.float16)
    y = module(torch.tensor([1, 4], device=device))
    assert y.dtype == torch.float16 and y.device.type == device and module.qweight.dtype == torch.uint8
    module.zero_grad()  # PyTorch does not add sparse float16 tensors on the CPU
    y.sum().backward()
    module.update_()


def test_bags_take_offsets_weights_and_padding(device):
    module = BinaryEmbeddingBag(20, 9, 3, mode="sum", device=device)
    values = values_of(module)
    flat = torch.tensor([1, 3, 2, 3, 7], device=device)
    weights = torch.randn(5, device=device, requires_grad=True)
    y = module(flat, torch.tensor([0, 1, 1], device=device), weights)
    w = weights.detach().double()
    want = torch.stack([w[0] * values[1], torch.zeros(9, dtype=torch.float64, device=device), w[2] * values[2] + w[4] * values[7]])
    assert torch.allclose(y.detach().double(), want, atol=1e-6)
    y.sum().backward()
    assert weights.grad[1] == 0 and weights.grad[4] != 0
    packed = BinaryEmbeddingBag.from_float(torch.nn.EmbeddingBag(6, 4, device=device), mode="mean", gradient="packed")
    packed(torch.tensor([[1, 2]], device=device)).sum().backward()
    assert packed.packed_grad[0].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="signs do not add up"):
        packed(torch.tensor([[1, 2]], device=device)).sum().backward()
    with pytest.raises(ValueError, match="mode is 'max'"):
        BinaryEmbeddingBag(3, 4, mode="max")
    with pytest.raises(ValueError, match="gradient is 'none'"):
        BinaryEmbedding(3, 4, gradient="none")


def test_a_frozen_table_passes_gradients_to_what_stands_around_it(device):
    module = BinaryEmbedding(10, 8, device=device).eval().requires_grad_(False)
    head = torch.nn.Linear(8, 1, device=device)
    head(module(torch.tensor([1, 2], device=device))).sum().backward()
    assert head.weight.grad is not None and module.weight.grad is None
    assert not module(torch.tensor([1], device=device)).requires_grad


def test_a_dense_gradient_compiles(device):
    module = BinaryEmbedding(10, 8, gradient="dense", device=device)
    indices = torch.tensor([[1, 2], [2, 9]], device=device)
    compiled = torch.compile(lambda i: functional.embedding(i, module.weight).square().sum(), backend="aot_eager", fullgraph=True)
    compiled(indices).backward()
    kept = module.weight.grad.clone()
    module.weight.grad = None
    module(indices).square().sum().backward()
    assert torch.allclose(kept, module.weight.grad)


# ---- sparse steps of torch.optim on packed tables of any width


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_sgd_with_sparse_gradients_steps_the_touched_rows_alone(device, bits, monkeypatch):
    table = Embedding(40, 32, bits=bits, device=device)
    before = table.weight.dequantize()
    codes = table.weight.codes.clone()
    indices = torch.tensor([3, 9, 3], device=device)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        y = functional.embedding(indices, table.weight, sparse=True)
        (y - 0.1).square().sum().backward()
        assert table.weight.grad.layout == torch.sparse_coo
        with monkeypatch.context() as patch:
            patch.setattr(PackedWeight, "dequantize", None)  # the table as a whole is never decoded
            optimizer.step()
    idle = [v for v in range(40) if v not in (3, 9)]
    assert torch.equal(table.weight.codes[idle], codes[idle])
    after = table.weight.dequantize()
    assert (after[[3, 9]] - 0.1).square().sum() <= (before[[3, 9]] - 0.1).square().sum()
    assert not torch.equal(table.weight.codes, codes)


def test_the_cost_of_a_step_does_not_grow_with_the_table(device):
    seconds = {}
    for v in (10**4, 10**6):
        module = BinaryEmbedding(v, 32, device=device)
        indices = torch.randint(0, v, (64, 16), device=device)
        g = torch.randn(64, 16, 32, device=device)

        def step():
            module(indices).backward(g)
            module.update_(momentum_dtype=torch.int8)

        step()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[v] = min(times)
    # A pass over the large table's 4 MB of codes or of scales, let alone 128 MB of gradient, would show.
    assert seconds[10**6] < 4 * seconds[10**4] + 2e-3, seconds


# ---- training


@pytest.mark.parametrize("gradient, dtype", [("sparse", torch.int8), ("packed", torch.int8), ("sparse", torch.float32)])
def test_a_character_model_on_the_text_of_matthew_learns(matthew, device, gradient, dtype):
    text = matthew[:12000]
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(c) for c in text], device=device)
    context, width = 4, 64
    # A row for every place and character: the model knows which of the last four places a character stood at.
    table = BinaryEmbedding(context * len(alphabet), width, gradient=gradient, device=device)
    head = torch.nn.Sequential(
        torch.nn.Linear(context * width, 64), torch.nn.ReLU(), torch.nn.Linear(64, len(alphabet))
    ).to(device)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    windows = ids.unfold(0, context + 1, 1)
    place = torch.arange(context, device=device) * len(alphabet)
    start_bits = bits_of(table)
    losses = []
    for _ in range(120):
        batch = windows[torch.randint(0, len(windows), (128,), device=device)]
        logits = head(table(batch[:, :context] + place).flatten(1))
        loss = torch.nn.functional.cross_entropy(logits, batch[:, context])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        table.update_(beta=0.97, momentum_dtype=dtype)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.72 * sum(losses[:5]) * 2
    assert (bits_of(table) != start_bits).any()


def test_the_table_alone_learns(device):
    """Head frozen: only bits can lower the loss. Topics: words of one topic share the sign pattern that the head reads."""
    torch.manual_seed(0)
    topics, words, width = 6, 30, 48
    head = torch.randn(topics, width, device=device)
    losses = {}
    for mode in ("momentum", "descent", "none"):
        torch.manual_seed(1)
        bag = BinaryEmbeddingBag(topics * words, width, device=device)
        history = []
        for _ in range(120):
            label = torch.randint(0, topics, (64,), device=device)
            docs = label[:, None] * words + torch.randint(0, words, (64, 9), device=device)
            loss = torch.nn.functional.cross_entropy(bag(docs) @ head.t() / width**0.5, label)
            loss.backward()
            if mode != "none":
                bag.update_(mode, beta=0.9)
            bag.zero_grad()
            history.append(loss.item())
        losses[mode] = sum(history[-10:]) / 10
    assert losses["momentum"] < 0.5 * losses["none"], losses
    assert losses["momentum"] < losses["descent"], losses


def test_elements_without_a_finite_gradient_stay(device):
    for gradient in ("sparse", "dense"):
        module = BinaryEmbedding(3, 4, gradient=gradient, device=device)
        before = values_of(module)
        g = before[1].sign().float()[None]  # descent flips every bit
        g[0, :3] = torch.tensor([torch.nan, torch.inf, 0.0])
        module(torch.tensor([1], device=device)).backward(g)
        module.update_("descent")
        want = before.clone()
        want[1, 3] *= -1
        assert torch.equal(values_of(module), want)


def test_values_that_are_not_finite_and_indices_of_other_types_are_value_errors(device):
    for cls in (BinaryEmbedding, BinaryEmbeddingBag):
        module = cls(3, 4, device=device)
        before = module.qweight.clone()
        w = torch.zeros(3, 4)
        for value in (torch.nan, torch.inf):
            w[1, 2] = value
            with pytest.raises(ValueError, match=rf"reset_parameters: weight\[1, 2\] is {value}, expected finite"):
                module.reset_parameters(w)
        assert torch.equal(module.qweight, before)
        with pytest.raises(ValueError, match="indices is Float"):
            module(torch.ones(2, 2, device=device))
    table, grad = torch.zeros(4, 1, dtype=torch.uint8, device=device), torch.zeros(4, 1, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="active_indices is torch.float32, expected int64 or int32"):
        functional.sparse_update_embedding_qweight(table, grad, torch.tensor([1.5], device=device))


def test_public_names():
    assert subbyte.nn.BinaryEmbedding is BinaryEmbedding and subbyte.nn.BinaryEmbeddingBag is BinaryEmbeddingBag
    assert "1000, 10, padding_idx=3, gradient='sparse'" in repr(BinaryEmbedding(1000, 10, 3))
    assert "mode='majority'" in repr(BinaryEmbeddingBag(10, 10))
