"""bitorch_engine.layers.qembedding.binary (SEED_API section 5) against transcriptions in plain PyTorch."""

import copy
import io
import pickle

import numpy
import pytest
import torch
from test_compat_optim import check_update_signature

from subbyte.compat.embedding import sparse_update_embedding_qweight


def layers():
    import bitorch_engine.layers.qembedding.binary.layer as module

    return module


def signs_of(qweight, dim):
    """-1 and +1 of a packed table, by numpy."""
    bits = numpy.unpackbits(qweight.detach().cpu().numpy(), axis=-1, bitorder="little")[:, :dim]
    return torch.from_numpy(bits.astype(numpy.float32) * 2 - 1).to(qweight.device)


def made(v, d, device="cpu", **options):
    layer = layers().BinaryEmbeddingCuda(num_embeddings=v, embedding_dim=d, device=device, **options)
    layer.prepare_params()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v, d", [(50, 8), (33, 13), (300, 256), (7, 1)])
def test_forward_is_the_formula(v, d, dtype, device):
    layer = made(v, d, device, dtype=dtype)
    indices = torch.randint(v, (4, 6), device=device)
    expected = (signs_of(layer.qweight, d) * layer.scale_w.float())[indices].to(dtype)
    out = layer(indices)
    assert out.shape == (4, 6, d) and out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3), ()])
def test_E9_indices_of_any_shape(shape, device):
    layer = made(9, 20, device)
    indices = torch.randint(9, shape, device=device)
    out = layer(indices)
    assert out.shape == (*shape, 20)
    assert torch.equal(out, (signs_of(layer.qweight, 20) * layer.scale_w)[indices])


def test_prepare_packs_the_centred_weight():
    layer = layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10)
    weight = layer.weight.detach().clone()
    assert weight.dtype == torch.float32 and not layer.weight.requires_grad
    assert layer.qweight.dtype == torch.uint8 and layer.qweight.shape == (11, 2)
    layer.prepare_params()
    centred = weight - weight.mean()
    assert torch.equal(signs_of(layer.qweight, 10), torch.where(centred >= 0, 1.0, -1.0))
    assert list(layer.state_dict()) == ["qweight", "scale_w"] and layer.weight is None


def test_E8_the_scale_is_the_mean_over_the_real_columns_and_the_padding_row_is_zero():
    layer = layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10, padding_idx=2, dtype=torch.bfloat16)
    weight = layer.weight.detach().clone()
    layer.prepare_params()
    centred = weight - weight.mean()
    centred[2] = 0
    assert layer.scale_w.dtype == torch.bfloat16
    torch.testing.assert_close(layer.scale_w.float(), centred.abs().mean(1, keepdim=True), rtol=4e-3, atol=0)
    assert layer.scale_w[2] == 0 and not layer(torch.tensor([2])).any()


def test_E7_padding_idx_is_checked_and_may_be_negative():
    assert layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10, padding_idx=3).padding_idx == 3
    assert layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10, padding_idx=-1).padding_idx == 10
    assert layers().BinaryEmbeddingBag(num_embeddings=11, embedding_dim=10, padding_idx=-2).padding_idx == 9
    for wrong in (11, -12):
        with pytest.raises(ValueError, match="padding_idx"):
            layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10, padding_idx=wrong)


def test_E10_prepare_twice_and_after_loading_keeps_the_table():
    layer = made(11, 10)
    before = copy.deepcopy(layer.state_dict())
    layer.prepare_params()
    other = layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10)
    other.load_state_dict(before)
    other.prepare_params()
    for key in before:
        assert torch.equal(layer.state_dict()[key], before[key]) and torch.equal(other.state_dict()[key], before[key])
    unprepared = layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10)
    layer.load_state_dict(unprepared.state_dict())
    assert torch.equal(layer.weight, unprepared.weight)


def expected_gradient(layer, indices, gradient):
    """A [V, D] in float64 by a loop over the look-ups."""
    accumulated = torch.zeros(layer.num_embeddings, layer.embedding_dim, dtype=torch.float64)
    for index, row in zip(indices.flatten().tolist(), gradient.reshape(-1, layer.embedding_dim).double().cpu()):
        accumulated[index] += layer.scale_w[index].double().cpu() * row
    return accumulated


@pytest.mark.parametrize("v, d", [(50, 8), (33, 13), (300, 256)])
def test_E1_gradient_has_the_touched_rows_alone_no_padding_bits_and_leaves_the_incoming_one(v, d, device):
    layer = made(v, d, device)
    layer.scale_w[::2] *= -1
    indices = torch.randint(v, (3, 5), device=device)
    gradient = torch.randn(3, 5, d, device=device)
    kept = gradient.clone()
    layer(indices).backward(gradient)
    assert torch.equal(gradient, kept)
    assert torch.equal(layer.qweight.active_indices, indices)
    grad = layer.qweight.grad
    rows = torch.unique(indices)
    assert grad.dtype == torch.uint8 and grad.shape == layer.qweight.shape
    assert torch.equal(grad.indices()[0], rows)
    expected = expected_gradient(layer, indices, gradient)[rows.cpu()]
    packed = numpy.packbits(expected.numpy() >= 0, axis=-1, bitorder="little")
    assert numpy.array_equal(grad.values().cpu().numpy(), packed)


def test_gradients_of_several_passes_add_in_float():
    layer = made(6, 8)
    a, b = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    first, second = torch.randn(1, 2, 8), -3 * torch.randn(1, 2, 8)
    layer(a).backward(first)
    layer(b).backward(second)
    expected = expected_gradient(layer, a, first) + expected_gradient(layer, b, second)
    assert layer.qweight.grad.indices()[0].tolist() == [0, 1, 2]
    packed = numpy.packbits(expected[:3].numpy() >= 0, axis=-1, bitorder="little")
    assert numpy.array_equal(layer.qweight.grad.values().numpy(), packed)
    layer.zero_grad()
    assert layer.qweight.grad is None


def test_E12_the_scale_gets_its_gradient_when_it_wants_one():
    layer = made(7, 13)
    scale = layer.scale_w.clone().requires_grad_()
    indices, gradient = torch.tensor([[1, 5, 1]]), torch.randn(1, 3, 13)
    layers().BinaryEmbeddingForward.apply(indices, layer.qweight, scale, 13, True).backward(gradient)
    signs = signs_of(layer.qweight, 13)
    expected = torch.zeros(7, 1)
    for index, row in zip([1, 5, 1], gradient[0]):
        expected[index] += (signs[index] * row).sum()
    torch.testing.assert_close(scale.grad, expected)


def test_X11_gradient_reaches_the_table_in_eval_and_not_when_it_wants_none():
    layer = made(7, 8).eval()
    layer(torch.tensor([1])).sum().backward()
    assert layer.qweight.grad is not None
    layer.requires_grad_(False)
    assert not layer(torch.tensor([1])).requires_grad


def test_the_padding_row_gets_no_gradient():
    layer = made(7, 8, padding_idx=1)
    layer(torch.tensor([[1, 2]])).sum().backward()
    assert layer.qweight.grad.indices()[0].tolist() == [2]


def test_an_index_outside_the_table_is_an_index_error():
    layer = made(7, 8)
    for wrong in (7, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("mode", ["descent", "xor"])
def test_E2_E3_sparse_update_moves_active_rows_alone(mode, device):
    layer = made(20, 16, device)
    before = signs_of(layer.qweight, 16)
    indices = torch.tensor([[3, 4, 3]], device=device)
    gradient = torch.randn(1, 3, 16, device=device)
    layer(indices).backward(gradient)
    wanted = torch.where(expected_gradient(layer, indices, gradient) >= 0, 1.0, -1.0).to(device)
    sparse_update_embedding_qweight(layer.qweight, layer.qweight.grad, layer.qweight.active_indices, mode)
    after = signs_of(layer.qweight, 16)
    rows = torch.tensor([3, 4], device=device)
    expected = -wanted[rows] if mode == "descent" else torch.where(wanted[rows] > 0, -before[rows], before[rows])
    assert torch.equal(after[rows], expected)
    untouched = [r for r in range(20) if r not in (3, 4)]
    assert torch.equal(after[untouched], before[untouched])
    dense = layer.qweight.grad.to_dense()
    again = copy.deepcopy(layer.qweight)
    sparse_update_embedding_qweight(layer.qweight, layer.qweight.grad, None, mode)
    sparse_update_embedding_qweight(again, dense, indices, mode)
    assert torch.equal(again, layer.qweight)


@pytest.mark.parametrize("kind", ["packed", "bool"])
def test_E4_E5_update_goes_against_the_gradient(kind, device):
    parameter = layers().BinaryEmbeddingParameter
    if kind == "packed":
        layer = made(5, 8, device)
        q, read = layer.qweight, lambda: signs_of(layer.qweight, 8)
    else:
        layer = layers().BinaryEmbeddingBag(num_embeddings=5, embedding_dim=8, device=device)
        q, read = layer.weight, lambda: layer.weight.detach().float() * 2 - 1
    before = read().clone()
    target = torch.where(torch.randn(8, device=device) > 0, 1.0, -1.0)
    s, step = torch.zeros(5, 8, device=device), torch.zeros(1)
    for _ in range(3):
        q.grad = None
        layer(torch.tensor([[1], [3]], device=device)).mul(-target).sum().backward()  # the loss falls towards target
        parameter.update(q, exp_avg_s=s, step=step, lr=1e-2, beta2=0.9)
    assert step == 3
    assert torch.equal(read()[[1, 3]], target.expand(2, 8))
    assert torch.equal(read()[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(s[0], torch.zeros(8, device=device))
    v = 1e-2 * -target
    torch.testing.assert_close(s[1], v * (1 - 0.9**3))


def test_E6_active_indices_belong_to_the_instance():
    a, b = made(5, 8), made(5, 8)
    a(torch.tensor([1])).sum().backward()
    assert b.qweight.active_indices is None and a.qweight.active_indices.tolist() == [1]


@pytest.mark.parametrize("kind", ["BinaryEmbeddingCuda", "BinaryEmbeddingBag"])
def test_O1_E4_embeddings_train_with_diode_mix(kind):
    from bitorch_engine.layers.qembedding import binary
    from bitorch_engine.optim import DiodeMix
    from bitorch_engine.utils.model_helper import prepare_bie_layers

    layer = getattr(binary, kind)(num_embeddings=50, embedding_dim=16)
    prepare_bie_layers(layer)
    optimizer = DiodeMix(layer.parameters(), lr=1e-2, betas=(0.9, 0.9))
    target = torch.where(torch.randn(50, 16) > 0, 1.0, -1.0)
    losses = []
    for _ in range(30):
        indices = torch.randint(50, (64, 1))
        optimizer.zero_grad()
        out = layer(indices).reshape(64, 16)
        wanted = target[indices[:, 0]]
        loss = (1 - out.sign() * wanted).mean() + 0 * out.mean()
        (-(out * wanted).sum()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]


def test_update_has_the_signature_of_all_parameter_classes():
    check_update_signature(layers().BinaryEmbeddingParameter)


# ---- bag


@pytest.mark.parametrize("shape", [(10, 3), (4, 4), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize("d", [8, 13, 200])
def test_bag_is_the_majority_and_ties_give_plus_one(shape, d, device):
    layer = layers().BinaryEmbeddingBag(num_embeddings=20, embedding_dim=d, padding_idx=4, device=device)
    assert layer.weight.dtype == torch.bool and not layer.weight[4].any()
    indices = torch.randint(20, shape, device=device)
    out = layer(indices)
    count = layer.weight.detach().float()[indices].sum(-2)
    expected = torch.where(count >= -(-shape[-1] // 2), 1.0, -1.0)
    assert torch.equal(out, expected) and out.dtype == torch.float32


def test_E11_bag_gradient_pairs_rows_with_their_own_bag(device):
    # The original's CPU case: shape, weight.grad not None, weight.active_indices equals the input, out.sum().backward().
    layer = layers().BinaryEmbeddingBag(num_embeddings=10, embedding_dim=6, device=device)
    indices = torch.tensor([[1, 2], [2, 3]], device=device)
    out = layer(indices)
    out.sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.active_indices, indices)
    layer.zero_grad()
    gradient = torch.randn(2, 6, device=device)
    layer(indices).backward(gradient)
    expected = torch.stack([gradient[0], gradient[0] + gradient[1], gradient[1]]) >= 0
    assert layer.weight.grad.indices()[0].tolist() == [1, 2, 3] and layer.weight.grad.dtype == torch.bool
    assert torch.equal(layer.weight.grad.values(), expected)


def test_bag_output_dtype_option():
    layer = layers().BinaryEmbeddingBag(num_embeddings=10, embedding_dim=6, dtype=torch.float16)
    assert layer(torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float16


# ---- life


def test_copies_pickles_and_checkpoints():
    layer = made(11, 10, padding_idx=1)
    indices = torch.randint(11, (2, 3))
    expected = layer(indices)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = layers().BinaryEmbeddingCuda(num_embeddings=11, embedding_dim=10, padding_idx=1)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(indices), expected)
        assert other.qweight.padding_idx == 1 and type(other.qweight) is layers().BinaryEmbeddingParameter


def test_old_layout_fixture():
    """State as the original wrote it: bytes by hand. Row 0: bits 0 and 9; row 1: bits 1..7; row 2: the padding bits set."""
    state = {
        "qweight": torch.tensor([[0b00000001, 0b10], [0b11111110, 0], [0, 0b11111100]], dtype=torch.uint8),
        "scale_w": torch.tensor([[0.5], [2.0], [1.0]]),
    }
    layer = layers().BinaryEmbeddingCuda(num_embeddings=3, embedding_dim=10)
    layer.load_state_dict(state)
    layer.prepare_params()
    out = layer(torch.arange(3))
    assert out[0].tolist() == [0.5] + [-0.5] * 8 + [0.5]
    assert out[1].tolist() == [-2.0] + [2.0] * 7 + [-2.0] * 2
    assert out[2].tolist() == [-1.0] * 10


def test_prepare_bie_layers_reaches_embeddings_and_the_root():
    from bitorch_engine.utils.model_helper import prepare_bie_layers

    root = layers().BinaryEmbeddingCuda(num_embeddings=3, embedding_dim=10)
    prepare_bie_layers(root)
    prepare_bie_layers(root)
    inner = torch.nn.Sequential(layers().BinaryEmbeddingCuda(num_embeddings=3, embedding_dim=10))
    prepare_bie_layers(inner)
    assert root.weight is None and inner[0].weight is None
