"""Stock optimizers of PyTorch take steps on packed weights, and the loss of a real task goes down."""

import copy

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023): an optimizer that this package knows nothing of."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * 0.01).add_(m.mul(0.9).add(p.grad, alpha=0.1).sign_(), alpha=-group["lr"])
                m.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-2, weight_decay=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=3e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD momentum foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=5e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=5e-2),
    "Lion": lambda p: Lion(p, lr=2e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss_and_keeps_dense_state(name, device):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(device)
    subbyte.quantize_(model, bits=6, group_size=32)
    x = torch.randn(256, 32, device=device)
    y = torch.tanh(x @ torch.randn(32, 8, device=device) / 3)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses[::10]
    for p in model.parameters():
        assert not isinstance(p, PackedWeight) or p.codes.dtype == torch.uint8
        for value in optimizer.state[p].values():
            assert not isinstance(value, torch.Tensor) or type(value) is torch.Tensor


def test_lbfgs_with_a_line_search_lowers_the_loss(device):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(device)
    subbyte.quantize_(model, bits=6, group_size=32)
    x = torch.randn(256, 32, device=device)
    y = torch.tanh(x @ torch.randn(32, 8, device=device) / 3)
    optimizer, losses = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe"), []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(20):
        optimizer.step(closure)
    assert losses[-1] < 0.7 * losses[0], losses[::20]


def test_a_step_is_the_dense_step_up_to_one_level_and_no_gradient_moves_no_code(device):
    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ):
        w = torch.nn.Parameter(PackedWeight.from_float(torch.randn(24, 64, device=device), bits=8, group_size=32))
        d = w.detach().dequantize().requires_grad_()
        g = torch.randn(24, 64, device=device)
        for p in (w, d):
            optimizer = make([p])
            p.grad = g.clone()
            optimizer.step()
        steps, lowest = (part.repeat_interleave(32, 1) for part in (w.scales, w.offsets))
        expected = torch.minimum(torch.maximum(d.detach(), lowest), lowest + 255 * steps)  # clipped at the ends of the grid
        assert bool(((w.detach().dequantize() - expected).abs() <= steps * 1.001 + 1e-6).all())
    w = torch.nn.Parameter(PackedWeight.from_float(torch.randn(24, 64, device=device), bits=3, group_size=32))
    before, codes = w.detach().dequantize(), w.codes.clone()
    w.grad = torch.zeros(24, 64, device=device)
    torch.optim.SGD([w], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(w.detach().dequantize(), before) and torch.equal(w.codes, codes)


def test_parameter_groups_clipping_accumulation_and_a_resumed_run_work(tmp_path):
    def build():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        subbyte.quantize_(model, bits=4, group_size=16)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        return model, torch.optim.AdamW(groups, lr=1e-2)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.ones(4, 16)).square().sum().backward()
            total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert torch.isfinite(total)
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    torch.manual_seed(11)
    train(model, optimizer, 3)
    resumed, optimizer2 = build()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer2.load_state_dict(state["optimizer"])
    torch.manual_seed(11)
    train(resumed, optimizer2, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))


def test_distributed_data_parallel_of_one_process_gives_the_gradients_of_the_bare_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    subbyte.quantize_(model, bits=4, group_size=16)
    bare, x = copy.deepcopy(model), torch.randn(8, 16)
    bare(x).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(x).square().sum().backward()
        for a, b in zip(model.parameters(), bare.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
        torch.optim.AdamW(parallel.parameters(), lr=1e-2, foreach=False).step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bits, optimizer", [(4, "AdamW"), (8, "SGD")])
def test_fashion_mnist_is_learnt_on_packed_weights(fashion_mnist, bits, optimizer, device):
    (x, y), (test_x, test_y) = ((a.to(device), b.to(device)) for a, b in fashion_mnist)
    model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
    subbyte.quantize_(model, bits=bits, group_size=64)
    make = {"AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3), "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)}[
        optimizer
    ]
    optimizer, losses = make(model.parameters()), []
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    for batch in order[: 150 * 128].split(128):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.5 * first and accuracy > 0.75, (first, last, accuracy)
    assert all(isinstance(m.weight, PackedWeight) for m in model if isinstance(m, torch.nn.Linear))
