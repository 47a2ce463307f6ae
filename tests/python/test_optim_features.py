"""subbyte.optim with what surrounds an optimizer in PyTorch: schedulers, clipping, scaling, accumulation, CUDA graphs."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import subbyte
from subbyte import PackedWeight
from subbyte.optim import DiodeMix, PackedAdamW, PackedLion, PackedSGD

FUSED = {
    "adamw": lambda p, **o: PackedAdamW(p, **{"lr": 1e-2, **o}),
    "sgd": lambda p, **o: PackedSGD(p, **{"lr": 1e-2, "momentum": 0.9, **o}),
    "lion": lambda p, **o: PackedLion(p, **{"lr": 1e-2, **o}),
}
ALL = {**FUSED, "diode": lambda p, **o: DiodeMix(p, lr=1e-2, betas=(0.9, 0.99))}


def build(device="cpu", bits=4, seed=3):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(16, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4))
    subbyte.quantize_(net, bits=bits, group_size=16)
    return net.to(device)


def batch(device, step=0, n=32):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 16, generator=g)
    return x.to(device), torch.tanh(x[:, :4] * 2).to(device)


def loss_of(net, step=0, n=32):
    x, y = batch(next(net.parameters()).device, step, n)
    return F.mse_loss(net(x), y)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 2e-2, total_steps=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def test_every_scheduler_of_pytorch_is_tried():
    have = {n for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)}
    have = {n for n in have if n[0] != "_" and n not in ("LRScheduler",)}
    assert have <= set(SCHEDULERS) | {"ReduceLROnPlateau"}, have - set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rates_and_betas_of_a_scheduler_reach_packed_and_ordinary_parameters(optimizer, name, monkeypatch):
    """Beside torch's own optimizer under the same scheduler: same options and ordinary parameters; packed ones get the rate."""
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(5, 3))
    theirs_plain = torch.nn.Parameter(plain.detach().clone())
    w = torch.nn.Parameter(PackedWeight.from_float(torch.randn(4, 32), bits=8))
    if optimizer == "adamw":
        ours, theirs = PackedAdamW([plain, w], lr=1e-2), torch.optim.AdamW([theirs_plain], lr=1e-2)
    else:
        ours = PackedSGD([plain, w], lr=1e-2, momentum=0.9)
        theirs = torch.optim.SGD([theirs_plain], lr=1e-2, momentum=0.9)
    kind, rates, step = type(ours), [], type(ours)._packed_step

    def spy(self, group, rows, grad, state, offset, tail):
        rates.append(group["lr"])
        step(self, group, rows, grad, state, offset, tail)

    monkeypatch.setattr(kind, "_packed_step", spy)
    a, b = SCHEDULERS[name](ours), SCHEDULERS[name](theirs)
    expected = []
    for t in range(8):
        plain.grad = torch.randn(5, 3)
        theirs_plain.grad, w.grad = plain.grad.clone(), torch.randn(4, 32)
        expected.append(theirs.param_groups[0]["lr"])
        ours.step()
        theirs.step()
        for scheduler in (a, b):
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for key in ("lr", "betas", "momentum"):
            assert ours.param_groups[0].get(key) == theirs.param_groups[0].get(key), key
    assert rates == expected and len(set(rates)) > 1
    torch.testing.assert_close(plain, theirs_plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_clipping_by_value_and_by_norm(name, device):
    for clip in (
        lambda p: torch.nn.utils.clip_grad_value_(p, 1e-3),
        lambda p: torch.nn.utils.clip_grad_norm_(p, 1e-2),
        lambda p: torch.nn.utils.clip_grad_norm_(p, 1e-2, norm_type=float("inf"), foreach=False),
    ):
        net, by_hand = build(device), build(device)
        for model in (net, by_hand):
            loss_of(model).backward()
        clip(list(net.parameters()))
        dense = [torch.nn.Parameter(torch.zeros(p.shape, device=device)) for p in by_hand.parameters()]
        for d, p in zip(dense, by_hand.parameters()):
            d.grad = p.grad.clone()
        clip(dense)
        for d, p in zip(dense, by_hand.parameters()):
            p.grad = d.grad
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), by_hand.parameters()))
        for model in (net, by_hand):
            torch.manual_seed(0)
            ALL[name](model.parameters()).step()
        assert same(net, by_hand)


@pytest.mark.parametrize("name", FUSED)
def test_a_factor_in_memory_clips_and_unscales_without_a_pass_over_the_gradients(name, device):
    """What GradScaler and clip_grad_norm_ do, in the optimizer's one pass: the factor is a tensor nobody looks at."""
    scaled, plain = build(device), build(device)
    a, b = FUSED[name](scaled.parameters()), FUSED[name](plain.parameters())
    for step in range(3):
        for model, optimizer in ((scaled, a), (plain, b)):
            optimizer.zero_grad()
        (loss_of(scaled, step) * 1024).backward()
        loss_of(plain, step).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in scaled.parameters()]) / 1024
        clip = (0.01 / norm).clamp(max=1)
        # A power of two keeps all bits of the comparison.
        factor = torch.exp2(torch.floor(torch.log2(clip)))
        for p in plain.parameters():
            p.grad *= factor
        a.step(grad_factor=(factor / 1024).reshape(1))
        b.step()
    assert same(scaled, plain)


@pytest.mark.parametrize("name", ALL)
def test_grad_scaler_unscales_skips_and_lowers_its_scale(name, device):
    net, plain = build(device), build(device)
    a, b = ALL[name](net.parameters()), ALL[name](plain.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        a.zero_grad()
        b.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        if step == 2:
            net[0].weight.grad[1, 1] = float("inf")
        scaler.unscale_(a)
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.5)
        torch.manual_seed(step)
        scaler.step(a)
        scaler.update()
        if step != 2:
            loss_of(plain, step).backward()
            torch.manual_seed(step)
            b.step()
        assert same(net, plain), step
    assert scaler.get_scale() == 2.0**10  # grown once, halved once
    for p, q in zip(net.parameters(), plain.parameters()):
        assert int(a.state[p]["step"] if "step" in a.state[p] else 3) == int(b.state[q].get("step", 3))


@pytest.mark.parametrize("name", ALL)
def test_accumulated_gradients_are_one_gradient(name, device):
    net, whole = build(device), build(device)
    for model, sizes in ((net, [0, 1, 2]), (whole, [0])):
        for step in sizes:
            loss_of(model, step).backward()
    with torch.no_grad():
        for step in (1, 2):
            grads = torch.autograd.grad(torch.enable_grad()(loss_of)(whole, step), list(whole.parameters()))
            for p, g in zip(whole.parameters(), grads):
                p.grad += g
    for model in (net, whole):
        torch.manual_seed(0)
        ALL[name](model.parameters()).step()
    assert same(net, whole)


@pytest.mark.parametrize("name", FUSED)
def test_maximize_is_the_step_of_the_negated_gradient(name, device):
    up, down = build(device), build(device)
    a, b = FUSED[name](up.parameters(), maximize=True), FUSED[name](down.parameters())
    for step in range(3):
        for i, (p, q) in enumerate(zip(up.parameters(), down.parameters())):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 10 * step)).to(device)
            p.grad, q.grad = gradient, -gradient
        a.step()
        b.step()
    assert same(up, down)


@pytest.mark.parametrize("name", ALL)
def test_closures_groups_and_states_of_one_optimizer(name, tmp_path, device):
    """Groups of packed and ordinary parameters, added late too; a closure; a file that loads with weights_only."""

    def run(net, optimizer, first, steps):
        for step in range(first, first + steps):

            def closure():
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            torch.manual_seed(step)
            assert optimizer.step(closure) > 0

    def make(net):
        optimizer = ALL[name]([{"params": [net[0].weight], "lr": 3e-3, "weight_decay": 0.1}])
        optimizer.add_param_group({"params": [net[0].bias, net[2].weight, net[2].bias], "lr": 1e-2})
        return optimizer

    net, other = build(device), build(device, seed=9)
    optimizer, second = make(net), make(other)
    run(net, optimizer, 0, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    run(net, optimizer, 3, 3)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    second.load_state_dict(saved["optimizer"])
    assert [g["lr"] for g in second.param_groups] == [3e-3, 1e-2]
    run(other, second, 3, 3)
    assert same(net, other)
    for p, q in zip(net.parameters(), other.parameters()):
        for key, value in optimizer.state[p].items():
            kept = second.state[q][key]
            assert torch.equal(value, kept) and value.dtype == kept.dtype if isinstance(value, torch.Tensor) else value == kept


def test_what_is_not_offered_is_refused_by_name():
    for option in ("foreach", "fused", "differentiable", "amsgrad"):
        with pytest.raises(TypeError, match=option):
            PackedAdamW(build().parameters(), **{option: True})
    with pytest.raises(ValueError, match="dampening is 0.1 with capturable"):
        PackedSGD(build().parameters(), momentum=0.9, dampening=0.1, capturable=True)
    with pytest.raises(ValueError, match="capturable"):
        PackedAdamW(build().parameters(), scales="reestimated", capturable=True)


def test_lion_without_a_moment_steps_by_the_sign_of_the_gradient(device):
    w = torch.nn.Parameter(PackedWeight.from_float(torch.randn(4, 64, device=device), bits=8, group_size=64, sym=True))
    plain = torch.nn.Parameter(torch.zeros(3, device=device))
    before, codes = w.detach().dequantize(), torch.ops.subbyte.unpack(w.codes, "uint8", 64)
    optimizer = PackedLion([w, plain], lr=float(w.scales[0, 0]) * 3, moments=None)
    w.grad = torch.randn(4, 64, device=device)
    plain.grad = torch.tensor([-2.0, 0.0, 1.0], device=device)
    optimizer.step()
    steps = (torch.ops.subbyte.unpack(w.codes, "uint8", 64).float() - codes.float())[0]
    inside = (codes[0] > 3) & (codes[0] < 252)
    assert torch.equal(steps[inside], -3 * w.grad[0].sign()[inside]) and before.shape == w.shape
    assert optimizer.state_bytes() == 4 and torch.equal(plain.detach().sign(), torch.tensor([1.0, 0, -1], device=device))


@pytest.mark.parametrize("name", FUSED)
def test_capturable_steps_on_the_cpu_have_the_bits_of_the_others(name):
    net, plain = build(), build()
    packed = [[p for p in model.parameters() if isinstance(p, PackedWeight)] for model in (net, plain)]
    a, b = FUSED[name](packed[0], capturable=True), FUSED[name](packed[1])
    for step in range(4):
        for model, optimizer in ((net, a), (plain, b)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert same(net, plain)


@pytest.mark.parametrize("scales", ["fixed", "trained"])
@pytest.mark.parametrize("name", FUSED)
def test_forward_backward_and_step_replay_from_a_cuda_graph_with_the_bits_of_eager_steps(name, scales):
    if not torch.cuda.is_available() or not subbyte.info()["has_cuda"]:
        pytest.skip("no CUDA device, or a library without CUDA kernels")
    captured, eager = build("cuda"), build("cuda")
    # Both rates in float32: as a Python number it would be another one, and with it the rates that are formed from it.
    rate, eager_rate = (torch.tensor(1e-2, device="cuda") if name != "sgd" else 1e-2 for _ in range(2))
    a = FUSED[name](captured.parameters(), lr=rate, capturable=True, scales=scales)
    b = FUSED[name](eager.parameters(), lr=eager_rate, capturable=True, scales=scales)
    x, y = batch("cuda")
    x, y = x.clone(), y.clone()

    def step(net, optimizer):
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for net in (captured, eager):
        for p in net.parameters():
            p.grad = torch.zeros(p.shape, device="cuda", dtype=p.dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured, a)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, a)
    for t in range(7):
        if t >= 3:
            new_x, new_y = batch("cuda", t)
            x.copy_(new_x)
            y.copy_(new_y)
            if t == 5 and name != "sgd":  # a scheduler writes into the captured rate
                rate.fill_(5e-3)
                eager_rate.fill_(5e-3)
            graph.replay()
        step_data = (x.clone(), y.clone())
        loss = F.mse_loss(eager(step_data[0]), step_data[1])
        loss.backward()
        b.step()
        b.zero_grad(set_to_none=False)
    for p, q in zip(captured.parameters(), eager.parameters()):
        if isinstance(p, PackedWeight):
            assert all(torch.equal(s, t) for s, t in zip(p.parts.values(), q.parts.values()))
        else:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_copies_of_model_and_optimizer_go_on_alike():
    net = build()
    for name, make in FUSED.items():
        optimizer = make(net.parameters())
        loss_of(net).backward()
        optimizer.step()
        twin, twin_optimizer = copy.deepcopy((net, optimizer))
        for model, o in ((net, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            loss_of(model, 1).backward()
            o.step()
        assert same(net, twin), name
        optimizer.zero_grad()
