"""What code written for torch.nn models does with them, done to models that quantize_ has packed."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import subbyte
from subbyte import PackedWeight


def model(seed=0, bits=4, activation=torch.nn.ReLU):
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 48), activation(), torch.nn.Linear(48, 8))
    subbyte.quantize_(layers, bits=bits, group_size=16, progress=False)
    return layers


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 32, generator=generator), torch.randint(0, 8, (12,), generator=generator)


def step(network, optimizer, seed):
    x, y = batch(seed)
    optimizer.zero_grad()
    F.cross_entropy(network(x), y).backward()
    optimizer.step()


def equal_states(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def saved_and_loaded(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


class Tied(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(20, 32)
        self.head = torch.nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight
        subbyte.quantize_(self, bits=4, group_size=16, progress=False)

    def forward(self, indices):
        return self.head(self.table(indices))


# ---- optimizers

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "maximize": True},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
    "Rprop": {"lr": 0.001},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_and_go_on_after_a_checkpoint_a_copy_and_a_pickle(name):
    make = getattr(torch.optim, name)
    first = model()
    optimizer = make(first.parameters(), **OPTIMIZERS[name])
    before = copy.deepcopy(first)
    for seed in range(2):
        step(first, optimizer, seed)
    assert isinstance(first[0].weight, PackedWeight) and not torch.equal(first[0].weight.codes, before[0].weight.codes)
    saved = saved_and_loaded({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, weights_only=True)
    loaded = model(seed=1)
    loaded.load_state_dict(saved["model"])
    resumed = make(loaded.parameters(), **OPTIMIZERS[name])
    resumed.load_state_dict(saved["optimizer"])
    runs = [(loaded, resumed), copy.deepcopy((first, optimizer)), pickle.loads(pickle.dumps((first, optimizer)))]
    for network, its in (*runs, (first, optimizer)):
        torch.manual_seed(7)
        step(network, its, 5)
    assert all(equal_states(network, first) for network, _ in runs)


def test_gradient_scaler_and_clipping():
    network = model()
    x, y = batch()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(x), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
    torch.testing.assert_close(clip_grad_norm_(network.parameters(), 0.01), norm)
    before = copy.deepcopy(network)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(network[0].weight.codes, before[0].weight.codes)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averaged_models_average(average):
    network = model(bits=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    averaged = AveragedModel(network, multi_avg_fn=average)
    expected = None
    for seed in range(4):
        step(network, optimizer, seed)
        averaged.update_parameters(network)
        new = network[0].weight.dequantize()
        weight = (1 / (seed + 1) if average is None else 0.5) if seed else 1
        expected = new if expected is None else expected + weight * (new - expected)
    error = (averaged.module[0].weight.dequantize() - expected).abs()
    assert (error <= 3 * averaged.module[0].weight.scales.max()).all()  # each of three updates rounds to a neighbour
    again = AveragedModel(model(seed=1, bits=8))
    again.load_state_dict(averaged.state_dict())
    assert torch.equal(again(batch()[0]), averaged(batch()[0]))


# ---- torch.func, forward mode, parametrizations


def test_functional_call_grad_vmap_and_their_composition():
    network = model()
    x, y = batch()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    assert torch.equal(functional_call(network, parameters, (x,)), network(x))
    torch.testing.assert_close(torch.vmap(network)(x), network(x))

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(network, parameters, (x,)), y)

    gradients = torch.func.grad(loss)(parameters, x, y)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], y[:, None])
    F.cross_entropy(network(x), y).backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
        torch.testing.assert_close(each[name].mean(0), p.grad, rtol=1e-4, atol=1e-6)


def test_derivatives_in_the_input_by_torch_func_and_forward_mode():
    network = model(activation=torch.nn.Tanh).double()
    x = batch()[0].double()
    expected = torch.autograd.functional.jacobian(network, x[0])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(network)(x[0]), expected)
    assert torch.func.hessian(lambda x: network(x).sum())(x[0]).shape == (32, 32)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(network(forward_ad.make_dual(x[0], x[1]))).tangent
    torch.testing.assert_close(tangent, expected @ x[1])


def test_torch_func_through_an_embedding():
    network = Tied()
    indices = torch.arange(6).reshape(2, 3)
    torch.testing.assert_close(torch.vmap(network)(indices), network(indices))
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters):
        return functional_call(network, parameters, (indices,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    network(indices).square().sum().backward()
    torch.testing.assert_close(gradients["table.weight"], network.table.weight.grad, rtol=1e-4, atol=1e-5)


def test_vectors_and_parametrizations():
    network = model()
    x, _ = batch()
    before = network(x).detach()
    assert torch.equal(parameters_to_vector(network.parameters())[: 48 * 32].reshape(48, 32), network[0].weight.dequantize())

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(network[0], "weight", Doubled())
    network(x).sum().backward()
    assert isinstance(network[0].parametrizations.weight.original, PackedWeight)
    assert network[0].parametrizations.weight.original.grad is not None
    parametrize.remove_parametrizations(network[0], "weight", leave_parametrized=False)
    assert torch.equal(network(x), before)


# ---- graphs


def test_export_saves_and_loads():
    network = model().eval()
    x, _ = batch()
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x[:5]), network(x[:5]))
    frozen = torch.export.export(network.requires_grad_(False), (x,)).run_decompositions()
    assert torch.equal(frozen.module()(x), network(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_saves_loads_and_trains():
    network = model()
    x, _ = batch()
    traced = torch.jit.trace(network, (x,))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert torch.equal(loaded(x[:5]), network(x[:5]))
    for run in (traced, loaded, network):
        for p in network.parameters():
            p.grad = None
        run(x).sum().backward()
        gradients = {name: p.grad.clone() for name, p in run.named_parameters()}
        if run is traced:
            expected = gradients
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_fx():
    network = model()
    x, _ = batch()
    for graph in (traced := torch.fx.symbolic_trace(network), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(x), network(x))


# ---- where a model lives


def test_shared_memory_holds_the_parts():
    network = model()
    assert not network[0].weight.is_shared()
    network.share_memory()
    assert network[0].weight.is_shared() and all(part.is_shared() for part in network[0].weight.parts.values())
    sent = pickle.loads(ForkingPickler.dumps(network))
    with torch.no_grad():
        network[0].weight[0] = 0.0
    assert equal_states(sent, network)


def test_to_empty_of_a_model_on_the_meta_device_is_packed():
    source = model()
    x, _ = batch()
    for materialized in (copy.deepcopy(source).to("meta").to_empty(device="cpu"), model(seed=1).to("meta")):
        assign = materialized[0].weight.is_meta
        materialized.load_state_dict(source.state_dict(), assign=assign)
        assert isinstance(materialized[0].weight, PackedWeight) and torch.equal(materialized(x), source(x))
    assert type(torch.empty_like(source[0].weight)) is torch.Tensor  # a template for dense buffers otherwise


def test_whole_models_and_parameters_are_saved_with_weights_only():
    network = model()
    x, _ = batch()
    assert torch.equal(saved_and_loaded(network, weights_only=False)(x), network(x))
    with torch.serialization.safe_globals([torch.nn.Sequential, torch.nn.ReLU, subbyte.nn.Linear, set]):
        assert torch.equal(saved_and_loaded(network, weights_only=True)(x), network(x))
    loaded = saved_and_loaded(list(network.parameters()), weights_only=True)
    assert isinstance(loaded[0], torch.nn.Parameter) and torch.equal(loaded[0].codes, network[0].weight.codes)
    assert saved_and_loaded(network[0].weight, weights_only=True, map_location="meta").is_meta


def test_tied_weights_in_copies_safetensors_and_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as checkpoint
    from safetensors.torch import load_model, save_model
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    first, second, third = Tied(), Tied(1), Tied(2)
    indices = torch.arange(6)
    assert copy.deepcopy(first).head.weight is not first.head.weight
    assert (tied := copy.deepcopy(first)).head.weight is tied.table.weight
    save_model(first, str(tmp_path / "model.safetensors"))
    load_model(second, str(tmp_path / "model.safetensors"))
    assert torch.equal(second(indices), first(indices)) and second.head.weight is second.table.weight
    checkpoint.save(get_model_state_dict(first), checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    state = get_model_state_dict(third)
    checkpoint.load(state, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    set_model_state_dict(third, state)
    assert torch.equal(third(indices), first(indices))


def test_the_fast_path_of_the_transformer_encoder():
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    subbyte.quantize_(encoder, bits=4, group_size=16, progress=False)
    x = torch.randn(2, 5, 32)
    expected = encoder.eval()(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


def test_a_model_moves_while_an_output_is_kept():
    network = model()
    x, y = batch()
    kept = network(x)
    F.cross_entropy(kept, y).backward()
    weight, gradient = network[0].weight, network[0].weight.grad
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        network.to(dtype)
        assert network[0].weight is weight and weight.dtype == weight.grad.dtype == network[0].bias.dtype == dtype
        assert network(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(weight.grad, gradient, rtol=2**-8, atol=0)
    assert torch.equal(weight.codes, model()[0].weight.codes) and list(dict(network[0].named_parameters())) == [
        "weight",
        "bias",
    ]
    tied = Tied()
    kept = tied(torch.arange(4))
    assert tied.double().head.weight is tied.table.weight and tied.head.weight.dtype == torch.float64


def test_a_packed_weight_is_not_made_of_another():
    weight = model()[0].weight
    with pytest.raises(ValueError, match="codes is PackedWeight"):
        PackedWeight(weight, requires_grad=True)
    with pytest.raises(ValueError, match="codes is Tensor, expected the parts"):
        PackedWeight(weight.codes)


def test_data_of_a_weight_with_a_residual_can_be_assigned():
    values = torch.randn(8, 32)
    plain = PackedWeight.from_float(values, bits=4, group_size=16)
    fine = PackedWeight.from_float(values, bits=4, group_size=16, residual_bits=4)
    plain.data = fine
    assert plain.residual_bits == 4 and torch.equal(plain.residual, fine.residual)
    assert torch.equal(plain.to(torch.float64).dequantize(), fine.to(torch.float64).dequantize())
