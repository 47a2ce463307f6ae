"""DiodeMix with every rule, option and kind of parameter in one optimizer: each steps as it does alone."""

import copy

import torch

from subbyte import PackedWeight
from subbyte.nn import BinaryEmbedding
from subbyte.optim import DiodeMix


class Own(torch.nn.Parameter):
    """A class with a rule of its own."""

    @staticmethod
    def update(
        qweight, exp_avg_s=None, exp_avg_l=None, step=None, lr=1e-4, weight_decay=0.0, beta1=0.99, beta2=0.9999, eps=1e-6,
        dtype=torch.float16, correct_bias=None, projector=None, grad=None,
    ):  # fmt: skip
        step += 1
        exp_avg_l.mul_(beta1).add_(grad, alpha=1 - beta1)
        qweight.sub_(lr * exp_avg_l)


def packed(shape, device, **options):
    return torch.nn.Parameter(PackedWeight.from_float(torch.randn(shape, device=device), group_size=16, **options))


def groups(device):
    """name -> group. Nearest rounding throughout, so that nothing but the start of binary averages is random."""
    torch.manual_seed(0)
    integers = torch.nn.Parameter(torch.randint(-99, 99, (6, 20), dtype=torch.int8, device=device), requires_grad=False)
    floats = torch.nn.Parameter(torch.randn(3, 4, device=device))
    galore = dict(rank=3, update_proj_gap=2, scale=0.5, proj_type="std")
    return {
        "ordinary": dict(params=[torch.nn.Parameter(torch.randn(5, 7, device=device))], weight_decay=0.1, correct_bias=False),
        "half": dict(params=[torch.nn.Parameter(torch.randn(9, device=device).bfloat16())], dtype=torch.float64, eps=1e-3),
        "n-bit": dict(params=[packed((6, 40), device, bits=4)], lr=0.3, weight_decay=0.2),
        "mixed width": dict(params=[packed((6, 40), device, format="uint8*16+uint3*24")], lr=0.3, state_bits=32),
        "integers": dict(params=[integers], rule="nbit", lr=5.0),
        "own class": dict(params=[Own(torch.randn(4, 4, device=device))], betas=(0.5, 0.5)),
        "projected": dict(params=[torch.nn.Parameter(torch.randn(8, 5, device=device))], **galore),
        "projected n-bit": dict(params=[packed((6, 40), device, bits=4)], **{**galore, "proj_type": "full"}, lr=0.3),
        "binary": dict(params=[packed((6, 40), device, bits=1)], lr=1.0, betas=(0.0, 0.5)),
        "binary floats": dict(params=[floats], rule="binary", lr=1.0, betas=(0.0, 0.5)),
        "table": dict(params=list(BinaryEmbedding(9, 24, device=device).parameters()), lr=1.0, betas=(0.0, 0.5)),
    }


def give_gradient(name, p, step):
    g = torch.Generator().manual_seed(100 * step + len(name))
    if name == "table":
        rows = torch.tensor([[1, 4, 7]])
        p.grad = torch.sparse_coo_tensor(rows, torch.randn(3, 24, generator=g), (9, 24), check_invariants=True).to(p.device)
        return
    grad = torch.randn(p.shape, generator=g).to(p.device)
    if p.is_floating_point():
        p.grad = grad.to(p.dtype)
    else:
        p.privileged_grad = grad


def contents(p):
    return list(p.parts.values()) if isinstance(p, PackedWeight) else [p.detach()]


def test_every_rule_in_one_optimizer_steps_as_alone(device):
    together, alone = groups(device), groups(device)
    one = DiodeMix(list(together.values()), lr=1e-2, rounding="nearest")
    many = {name: DiodeMix([group], lr=1e-2, rounding="nearest") for name, group in alone.items()}
    start = {name: [t.clone() for t in contents(group["params"][0])] for name, group in together.items()}
    for step in range(3):
        for name in together:
            for p in (together[name]["params"][0], alone[name]["params"][0]):
                give_gradient(name, p, step)
        one.step()
        for optimizer in many.values():
            optimizer.step()
        for name in together:
            a, b = together[name]["params"][0], alone[name]["params"][0]
            # A step of half of lr 1 outweighs any start of a binary average.
            assert all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True)), (name, step)
    for name, group in together.items():
        assert any(not torch.equal(x, y) for x, y in zip(contents(group["params"][0]), start[name])), name
    # The state of all of them is plain, and goes through a copy.
    copied = copy.deepcopy(one.state_dict())
    again = DiodeMix([dict(group) for group in together.values()], lr=1e-2, rounding="nearest")
    again.load_state_dict(copied)
    for group in together.values():
        p = group["params"][0]
        for key, value in one.state[p].items():
            kept = again.state[p][key]
            assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else value == kept, key
