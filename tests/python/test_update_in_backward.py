"""Update in backward where graphs are not a plain chain: shared weights, unused ones, checkpoints, errors, retained graphs."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import subbyte
from subbyte import PackedWeight
from subbyte.optim import PackedAdamW, PackedLion, PackedSGD

OPTIMIZERS = {
    "adamw": lambda p: PackedAdamW(p, lr=1e-2),
    "sgd": lambda p: PackedSGD(p, lr=0.1, momentum=0.9),
    "lion": lambda p: PackedLion(p, lr=3e-3),
}


class Net(torch.nn.Module):
    """A table and a head that share one weight, a layer used twice, an unused and a frozen layer."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.table = torch.nn.Embedding(24, 32)
        self.twice = torch.nn.Linear(32, 32)
        self.last = torch.nn.Linear(32, 32)
        self.unused = torch.nn.Linear(32, 8)
        self.frozen = torch.nn.Linear(32, 32).requires_grad_(False)
        self.head = torch.nn.Linear(32, 24, bias=False)
        self.head.weight = self.table.weight
        self.reentrant = reentrant

    def block(self, h):
        return torch.tanh(self.last(torch.relu(self.frozen(h))))

    def forward(self, ids):
        h = self.twice(torch.relu(self.twice(self.table(ids))))
        h = self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(h)


def build(device, reentrant=None, bits=4):
    torch.manual_seed(3)
    net = Net(reentrant)
    subbyte.quantize_(net, bits=bits, group_size=32)
    assert net.head.weight is net.table.weight and isinstance(net.table.weight, PackedWeight)
    return net.to(device)


def loss_of(net, step, device):
    ids = torch.randint(0, 24, (16,), generator=torch.Generator().manual_seed(step)).to(device)
    return F.cross_entropy(net(ids), (ids * 7 + 1) % 24)


def train(net, optimizer, device, steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, step, device).backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_unused_frozen_and_checkpointed_weights_get_the_bits_of_the_ordinary_mode(name, reentrant, device):
    ordinary, fused = build(device), build(device, reentrant)
    a, b = OPTIMIZERS[name](ordinary.parameters()), OPTIMIZERS[name](fused.parameters())
    start = copy.deepcopy(fused)
    b.update_in_backward()
    train(ordinary, a, device)
    train(fused, b, device)
    assert same(ordinary, fused) and not same(start, fused)
    for layer in ("unused", "frozen"):
        assert same(getattr(start, layer), getattr(fused, layer))
        assert all(p not in b.state for p in getattr(fused, layer).parameters())
    assert int(b.state[fused.table.weight]["step"]) == 4  # once a pass, whatever the number of uses
    assert all(p.grad is None for p in fused.parameters())


def test_a_retained_graph_is_refused_the_second_time(device):
    net = build(device)
    PackedAdamW(net.parameters()).update_in_backward()
    loss = loss_of(net, 0, device)
    loss.backward(retain_graph=True)
    after = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # The head comes first and was refused: no parameter before it took a step of a wrong gradient.
    assert all(torch.equal(v, after[k]) for k, v in net.state_dict().items() if k.startswith(("twice", "last")))


def test_an_exception_in_the_middle_leaves_what_was_not_reached_and_the_next_pass_works(device):
    net, reference = build(device), build(device)
    optimizer, other = PackedAdamW(net.parameters()), PackedAdamW(reference.parameters())
    optimizer.update_in_backward()
    broken = [True]

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if broken[0]:
                raise ArithmeticError("in the middle")
            return g

    inner = net.block
    net.block = lambda h: inner(Break.apply(h))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ArithmeticError, match="in the middle"):
        loss_of(net, 0, device).backward()
    # `last` lies after the break, `twice` and the table before it.
    loss_of(reference, 0, device).backward()
    for name, p in reference.named_parameters():
        p.grad = p.grad if name.startswith("last") else None
    other.step()
    assert same(net.last, reference.last)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k.startswith(("twice", "table")))
    assert all(p.grad is None for p in net.parameters())
    broken[0] = False
    other.zero_grad()
    train(net, optimizer, device, 2)
    train(reference, other, device, 2)
    assert same(net, reference)


def test_the_gradient_of_a_layer_is_freed_before_that_of_the_next_is_made(device):
    """Counts live gradients by weak references, so that a copy that somebody keeps would show."""
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(6))).to(device)
    subbyte.quantize_(net, bits=4, group_size=64)
    for in_backward, most in ((False, 6), (True, 1)):
        optimizer, alive, counts = PackedAdamW(net.parameters()), [], []

        def count(p, alive=alive, counts=counts):
            alive.append(weakref.ref(p.grad))
            counts.append(sum(r() is not None for r in alive))

        hooks = [p.register_post_accumulate_grad_hook(count) for p in net.parameters()]
        handle = optimizer.update_in_backward() if in_backward else None
        net(torch.randn(4, 64, device=device)).square().sum().backward()
        assert max(counts) == most and len(counts) == 6
        for hook in hooks:
            hook.remove()
        if handle is not None:
            handle.remove()
        net.zero_grad()


def test_the_mode_is_refused_where_it_cannot_be():
    net = build("cpu")
    optimizer = PackedAdamW(net.parameters())
    handle = optimizer.update_in_backward()
    with pytest.raises(ValueError, match="grad_factor comes too late"):
        optimizer.step(grad_factor=torch.ones(1))
    with pytest.raises(RuntimeError, match="end update_in_backward first"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="average_over"):
        subbyte.distributed.DistributedDataParallel(net)
    handle.remove()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
