"""Two processes, on gloo and where there are two GPUs on NCCL: packed models start alike, stay bit-identical, and resume so.

On a machine with two GPUs:  python -m pytest tests/python/test_distributed.py -k nccl
"""

import datetime
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight
from subbyte.distributed import DistributedDataParallel, broadcast_, fully_shard, share_rounding
from subbyte.optim import DiodeMix, PackedAdamW, PackedLion, PackedSGD

OPTIMIZERS = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=2e-2),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "PackedAdamW": lambda p: PackedAdamW(p, lr=2e-2),
    "PackedAdamW trained": lambda p: PackedAdamW(p, lr=2e-2, scales="trained", moments="4bit"),
    "PackedAdamW reestimated": lambda p: PackedAdamW(p, lr=2e-2, scales="reestimated", reestimate_every=3),
    "PackedSGD": lambda p: PackedSGD(p, lr=0.5, momentum=0.9, moments="bfloat16"),
    "PackedLion": lambda p: PackedLion(p, lr=5e-3),
    "DiodeMix": lambda p: DiodeMix(p, lr=2e-2, betas=(0.9, 0.99), state_bits=8),
}
DEVICE = torch.device("cpu")  # of this rank, set by run()


def model(seed, bits=4, overrides=None):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Embedding(16, 32), torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    subbyte.quantize_(net, bits=bits, group_size=32, progress=False, overrides=overrides)
    return net.to(DEVICE)


def bits_of(net):
    out = {}
    for name, p in net.named_parameters():
        for part, t in p.parts.items() if isinstance(p, PackedWeight) else [("", p.detach())]:
            out[f"{name.removeprefix('module.')}.{part}"] = t.clone()
    return out


def same_on_all_ranks(net):
    for name, t in bits_of(net).items():
        t = t.contiguous()
        gathered = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, t)
        assert all(torch.equal(g, gathered[0]) for g in gathered), name


def train(net, optimizer, steps, first=0):
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, first + steps):
        data = torch.Generator().manual_seed(1000 * step)
        ids = torch.randint(0, 16, (32,), generator=data).to(DEVICE)
        mine = ids.chunk(world)[rank]
        loss = F.cross_entropy(net(mine), mine % 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def ranks_stay_bit_identical(rank, folder):
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(100 + rank)  # what ranks draw for themselves must not matter
        net = DistributedDataParallel(model(seed=rank))
        same_on_all_ranks(net)
        optimizer = make(net.parameters())
        first = train(net, optimizer, 1)
        last = train(net, optimizer, 14, 1)
        assert last < 0.9 * first, (name, first, last)
        same_on_all_ranks(net)


def every_optimizer_resumes_with_the_same_bits(rank, folder):
    for name, make in OPTIMIZERS.items():
        net = DistributedDataParallel(model(seed=rank))
        generator = share_rounding(device=DEVICE)
        optimizer = make(net.parameters())
        train(net, optimizer, 4)
        path = f"{folder}/{name}.pt"
        if rank == 0:
            state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict(), "rounding": generator.get_state()}
            with subbyte.replacing(path) as temporary:
                torch.save(state, temporary)
        dist.barrier()
        train(net, optimizer, 4, 4)
        whole = bits_of(net)
        subbyte.set_rounding_generator(None)
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        fresh = model(seed=7)
        fresh.load_state_dict(state["model"])
        again = DistributedDataParallel(fresh)
        share_rounding(device=DEVICE).set_state(state["rounding"].cpu())
        optimizer = make(again.parameters())
        optimizer.load_state_dict(state["optimizer"])
        train(again, optimizer, 4, 4)
        assert all(torch.equal(t, whole[key]) for key, t in bits_of(again).items()), name


class ExactNet(torch.nn.Module):
    """Its gradient is a sum of small whole numbers over a batch of 32: the same bits in whatever order ranks add them up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer = torch.nn.Linear(32, 16, bias=False)
        subbyte.quantize_(self, bits=4, group_size=32, progress=False)

    def forward(self, x, c):
        return (self.layer(x) * c).sum() / x.shape[0]


def train_exact(net, optimizer, steps, first, group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randint(-3, 4, (32, 32), generator=g).float().to(DEVICE)
        c = torch.randint(-3, 4, (32, 16), generator=g).float().to(DEVICE)
        optimizer.zero_grad()
        net(x.chunk(world)[rank], c.chunk(world)[rank]).backward()
        optimizer.step()


def a_checkpoint_goes_on_with_another_number_of_ranks(rank, folder):
    """Trained on two ranks, then on two and on one each: where the sums of gradients are exact, all three are the same bits."""
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    for name, make in OPTIMIZERS.items():
        subbyte.set_rounding_generator(None)
        torch.manual_seed(0)
        net = DistributedDataParallel(ExactNet().to(DEVICE))
        generator = share_rounding(device=DEVICE)
        optimizer = make(net.parameters())
        train_exact(net, optimizer, 3, 0, None)
        state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict(), "rounding": generator.get_state()}
        path = f"{folder}/exact.{rank}.pt"
        torch.save(state, path)
        train_exact(net, optimizer, 5, 3, None)
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        other = ExactNet().to(DEVICE)
        other.load_state_dict(state["model"])
        other = DistributedDataParallel(other, process_group=alone)
        generator = share_rounding(src=0, group=alone, device=DEVICE)
        generator.set_state(state["rounding"].cpu())
        optimizer = make(other.parameters())
        optimizer.load_state_dict(state["optimizer"])
        train_exact(other, optimizer, 5, 3, alone)
        expected = bits_of(net)
        assert all(torch.equal(t, expected[key]) for key, t in bits_of(other).items()), name
        same_on_all_ranks(other)


def an_update_in_backward_averages_over_the_ranks_itself(rank, folder):
    wrapped, bare = DistributedDataParallel(model(seed=rank)), broadcast_(model(seed=rank))
    a, b = PackedAdamW(wrapped.parameters(), lr=2e-2), PackedAdamW(bare.parameters(), lr=2e-2)
    with pytest.raises(RuntimeError, match="average_over"):
        a.update_in_backward()
    b.update_in_backward(average_over=dist.group.WORLD)
    first = train(bare, b, 1)
    last = train(bare, b, 15, 1)
    train(wrapped, a, 16)
    assert last < 0.8 * first and all(p.grad is None for p in bare.parameters())
    same_on_all_ranks(bare)
    # DistributedDataParallel divides before it adds up: the two differ by roundings of the gradients, here by none of two
    # ranks.
    expected = bits_of(wrapped)
    assert all(torch.equal(t, expected[key]) for key, t in bits_of(bare).items())
    # What average_over is for.
    alone = broadcast_(model(seed=0))
    optimizer = PackedAdamW(alone.parameters(), lr=2e-2)
    optimizer.update_in_backward()
    train(alone, optimizer, 3)
    with pytest.raises(AssertionError):
        same_on_all_ranks(alone)


def gradients_add_up_without_sync_and_are_averaged_once(rank, folder):
    """no_sync(): the gradients of two halves are those of the whole, and ranks stay the same."""
    net, whole = DistributedDataParallel(model(seed=rank)), DistributedDataParallel(model(seed=rank))
    a, b = PackedAdamW(net.parameters(), lr=2e-2), PackedAdamW(whole.parameters(), lr=2e-2)
    for step in range(4):
        ids = torch.randint(0, 16, (16,), generator=torch.Generator().manual_seed(step * 2 + rank)).to(DEVICE)
        with net.no_sync():
            (F.cross_entropy(net(ids[:8]), ids[:8] % 8) / 2).backward()
        (F.cross_entropy(net(ids[8:]), ids[8:] % 8) / 2).backward()
        F.cross_entropy(whole(ids), ids % 8).backward()
        for p, q in zip(net.parameters(), whole.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            same_on_all_ranks(whole)
        same_on_all_ranks(net)
        whole.module.load_state_dict(net.module.state_dict())


def sparse_gradients_of_a_table_are_summed_over_the_ranks(rank, folder):
    """The rows that any rank looked up move, the same on all ranks, and no other row does."""
    if DEVICE.type == "cuda":
        return  # NCCL sums no sparse tensors
    table = subbyte.nn.Embedding(64, 32, bits=4, group_size=32, sparse=True)
    net = DistributedDataParallel(torch.nn.Sequential(table, torch.nn.Linear(32, 4)))
    before = table.weight.codes.clone()
    optimizer = PackedAdamW(net.parameters(), lr=5e-2)
    for step in range(3):
        ids = torch.tensor([2, 5, 2, 7 + rank])
        optimizer.zero_grad()
        net(ids).square().sum().backward()
        assert table.weight.grad.layout == torch.sparse_coo
        optimizer.step()
    same_on_all_ranks(net)
    moved = (table.weight.codes != before).any(1).nonzero().flatten().tolist()
    assert set(moved) <= {2, 5, 7, 8} and {2, 5} <= set(moved)


def sharded_layers(net):
    for layer in net:
        if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)):
            fully_shard(layer, mesh=mesh())
    return fully_shard(net, mesh=mesh())


def mesh():
    return dist.device_mesh.init_device_mesh(DEVICE.type, (dist.get_world_size(),))


def sharded_weights_stay_packed_and_give_the_outputs_and_gradients_of_whole_ones(rank, folder):
    whole = model(seed=3)
    net = sharded_layers(model(seed=3))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            local = p._local_tensor
            assert isinstance(local, PackedWeight) and local.codes.dtype == torch.uint8, name
            rows = dict(whole.named_parameters())[name].block_of_rows(rank * len(local), (rank + 1) * len(local))
            assert all(torch.equal(a, b) for a, b in zip(local.parts.values(), rows.parts.values())), name
    ids = torch.arange(16, device=DEVICE)  # the same on both ranks, so that the average is the gradient
    for _ in range(2):
        a, b = net(ids), whole(ids)
        assert torch.equal(a, b)
    F.cross_entropy(a, ids % 8).backward()
    F.cross_entropy(b, ids % 8).backward()
    for p, q in zip(net.parameters(), whole.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-7)
    # Nothing of the size of a dense weight stays behind: what FSDP holds of a weight is its packed rows.
    for module in net.modules():
        for state in [module._get_fsdp_state()] if hasattr(module, "_get_fsdp_state") else []:
            for group in [state._fsdp_param_group] if state._fsdp_param_group else []:
                for param in group.fsdp_params:
                    if len(param.sharded_size) == 2:
                        assert isinstance(param._sharded_param_data, PackedWeight)


def sharded_weights_train_with_every_optimizer(rank, folder):
    for name in ("torch AdamW", "PackedAdamW trained", "PackedAdamW reestimated", "PackedLion", "DiodeMix"):
        net = sharded_layers(model(seed=3))
        optimizer = OPTIMIZERS[name](net.parameters())
        first = train(net, optimizer, 1)
        last = train(net, optimizer, 16, 1)
        assert last < 0.9 * first, (name, first, last)
        for p in net.parameters():
            if p.dim() == 2:
                assert isinstance(p._local_tensor, PackedWeight)
                if name.startswith("Packed"):
                    assert optimizer.state[p]["m"].shape[0] == p.shape[0] // dist.get_world_size()
                    assert type(optimizer.state[p]["m"]) is torch.Tensor


def a_sharded_run_resumes_and_comes_out_whole(rank, folder):
    """Each rank's file loads with weights_only and goes on bit for bit; gathered weights are a checkpoint of the whole model."""
    net = sharded_layers(model(seed=3))
    optimizer = PackedAdamW(net.parameters(), lr=2e-2)
    train(net, optimizer, 3)
    path = f"{folder}/shard.{rank}.pt"
    with subbyte.replacing(path) as temporary:
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    train(net, optimizer, 3, 3)
    state = torch.load(path, weights_only=True, map_location=DEVICE)
    other = sharded_layers(model(seed=8))
    other.load_state_dict(state["net"])
    second = PackedAdamW(other.parameters(), lr=2e-2)
    second.load_state_dict(state["optimizer"])
    train(other, second, 3, 3)
    for p, q in zip(net.parameters(), other.parameters()):
        a, b = (t._local_tensor.parts.values() if t.dim() == 2 else [t._local_tensor] for t in (p, q))
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    whole = {
        name: subbyte.distributed.gather_weight(p) if p.dim() == 2 else p.full_tensor() for name, p in net.named_parameters()
    }
    fresh = model(seed=9)
    subbyte.load_weights_(fresh, whole)
    ids = torch.arange(16, device=DEVICE)
    assert torch.equal(fresh(ids), net(ids))
    with pytest.raises(ValueError, match="gather_weight: parameter is a Parameter"):
        subbyte.distributed.gather_weight(fresh[1].bias)


def torchs_own_fully_shard_and_odd_rows_are_refused(rank, folder):
    from torch.distributed.fsdp import fully_shard as torchs

    with pytest.raises(RuntimeError, match="use subbyte.distributed.fully_shard"):
        torchs(model(seed=0)[1], mesh=mesh())
    odd = torch.nn.Sequential(torch.nn.Linear(32, 7, bias=False)).to(DEVICE)
    subbyte.quantize_(odd, bits=4, group_size=32, progress=False)
    with pytest.raises(ValueError, match="'0.weight' has 7 rows, expected a multiple of the 2 ranks"):
        fully_shard(odd, mesh=mesh())


def a_checkpoint_resumes_with_the_same_bits(rank, folder):
    net = DistributedDataParallel(model(seed=rank))
    generator = share_rounding(device=DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    train(net, optimizer, 5)
    path = f"{folder}/checkpoint.pt"
    if rank == 0:
        state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict(), "rounding": generator.get_state()}
        torch.save(state, path)
    dist.barrier()
    train(net, optimizer, 5, 5)
    whole = bits_of(net)

    subbyte.set_rounding_generator(None)
    state = torch.load(path, weights_only=True, map_location=DEVICE)
    fresh = model(seed=7)
    fresh.load_state_dict(state["model"])
    again = DistributedDataParallel(fresh)
    share_rounding(device=DEVICE).set_state(state["rounding"].cpu())
    optimizer = torch.optim.AdamW(again.parameters(), lr=2e-2)
    optimizer.load_state_dict(state["optimizer"])
    train(again, optimizer, 5, 5)
    for name, t in bits_of(again).items():
        assert torch.equal(t, whole[name]), name


def broadcast_copies_every_part(rank, folder):
    net = model(seed=rank, overrides={"1": {"bits": 3, "sym": True}})
    net.register_buffer("columns", torch.full((3, 4), float(rank), device=DEVICE).t())
    kept = net[1].weight
    broadcast_(net, src=1)
    same_on_all_ranks(net)
    assert net[1].weight is kept and float(net.columns.sum()) == 12 and not net.columns.is_contiguous()
    expected = bits_of(model(seed=1, overrides={"1": {"bits": 3, "sym": True}}))
    for name, t in bits_of(net).items():
        assert torch.equal(t, expected[name]), name


def residuals_are_broadcast_and_stay_the_same(rank, folder):
    net = DistributedDataParallel(model(seed=rank, bits=2, overrides={"*": {"residual_bits": 6}}))
    if rank == 0:
        expected = bits_of(model(seed=0, bits=2, overrides={"*": {"residual_bits": 6}}))
        assert all(torch.equal(t, bits_of(net)[name]) for name, t in expected.items())
    same_on_all_ranks(net)
    start = bits_of(net)
    train(net, subbyte.optim.PackedAdamW(net.parameters(), lr=2e-2), 3)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 3)
    same_on_all_ranks(net)
    assert not torch.equal(start["1.weight.residual"], bits_of(net)["1.weight.residual"])


def other_formats_are_refused_on_every_rank(rank, folder):
    with pytest.raises(ValueError, match="the packed weights differ between ranks"):
        broadcast_(model(seed=0, bits=4 - rank))
    with pytest.raises(ValueError, match="the packed weights differ between ranks"):
        broadcast_(model(seed=0, bits=2, overrides={"1": {"residual_bits": 5 + rank}}))


def ranks_that_round_for_themselves_drift_apart(rank, folder):
    """What share_rounding is for: without it the test above fails."""
    torch.manual_seed(rank)
    net = broadcast_(model(seed=0))
    torch.manual_seed(rank)
    subbyte.set_rounding_generator(None)
    net = torch.nn.parallel.DistributedDataParallel(net, init_sync=False)
    train(net, torch.optim.SGD(net.parameters(), lr=0.5), 3)
    with pytest.raises(AssertionError):
        same_on_all_ranks(net)


SCENARIOS = [
    ranks_stay_bit_identical,
    a_checkpoint_resumes_with_the_same_bits,
    every_optimizer_resumes_with_the_same_bits,
    a_checkpoint_goes_on_with_another_number_of_ranks,
    an_update_in_backward_averages_over_the_ranks_itself,
    gradients_add_up_without_sync_and_are_averaged_once,
    sparse_gradients_of_a_table_are_summed_over_the_ranks,
    sharded_weights_stay_packed_and_give_the_outputs_and_gradients_of_whole_ones,
    sharded_weights_train_with_every_optimizer,
    a_sharded_run_resumes_and_comes_out_whole,
    torchs_own_fully_shard_and_odd_rows_are_refused,
    broadcast_copies_every_part,
    residuals_are_broadcast_and_stay_the_same,
    other_formats_are_refused_on_every_rank,
    ranks_that_round_for_themselves_drift_apart,
]


def run(rank, folder, port, backend):
    global DEVICE
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if backend == "nccl":
        DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(DEVICE)
    # A rank that fails leaves the other waiting in a collective: for a minute, not for half an hour.
    dist.init_process_group(backend, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    for scenario in SCENARIOS:
        subbyte.set_rounding_generator(None)
        try:
            scenario(rank, folder)
            verdict = "holds"
        except BaseException:
            verdict = traceback.format_exc()
        Path(folder, f"{scenario.__name__}.{rank}").write_text(verdict)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    """What two processes say of every scenario; they are started once a backend, which is what takes the time."""
    backend = request.param
    if backend == "nccl" and not (torch.cuda.device_count() >= 2 and subbyte.info()["has_cuda"]):
        pytest.skip("needs two GPUs and a library with CUDA kernels")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, args=(str(folder), port, backend), nprocs=2)
    return folder


@pytest.mark.parametrize("verdicts", ["gloo", "nccl"], indirect=True)
@pytest.mark.parametrize("scenario", [f.__name__ for f in SCENARIOS])
def test_two_processes(scenario, verdicts):
    for rank in (0, 1):
        path = verdicts / f"{scenario}.{rank}"
        assert path.exists() and path.read_text() == "holds", path.read_text()
