"""Two processes on gloo: packed models start alike, stay bit-identical, and resume so."""

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
from subbyte.distributed import DistributedDataParallel, broadcast_, share_rounding


def model(seed, bits=4, overrides=None):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Embedding(16, 32), torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    subbyte.quantize_(net, bits=bits, group_size=32, progress=False, overrides=overrides)
    return net


def bits_of(net):
    out = {}
    for name, p in net.named_parameters():
        for part, t in p.parts.items() if isinstance(p, PackedWeight) else [("", p.detach())]:
            out[f"{name.removeprefix('module.')}.{part}"] = t.clone()
    return out


def same_on_all_ranks(net):
    for name, t in bits_of(net).items():
        gathered = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, t)
        assert all(torch.equal(g, gathered[0]) for g in gathered), name


def train(net, optimizer, steps, first=0):
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, first + steps):
        data = torch.Generator().manual_seed(1000 * step)
        ids = torch.randint(0, 16, (32,), generator=data)
        mine = ids.chunk(world)[rank]
        loss = F.cross_entropy(net(mine), mine % 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def ranks_stay_bit_identical(rank, folder):
    net = DistributedDataParallel(model(seed=rank))
    same_on_all_ranks(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    first = train(net, optimizer, 1)
    last = train(net, optimizer, 25, 1)
    assert last < 0.7 * first
    same_on_all_ranks(net)


def a_checkpoint_resumes_with_the_same_bits(rank, folder):
    net = DistributedDataParallel(model(seed=rank))
    generator = share_rounding()
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
    state = torch.load(path, weights_only=True)
    fresh = model(seed=7)
    fresh.load_state_dict(state["model"])
    again = DistributedDataParallel(fresh)
    share_rounding().set_state(state["rounding"])
    optimizer = torch.optim.AdamW(again.parameters(), lr=2e-2)
    optimizer.load_state_dict(state["optimizer"])
    train(again, optimizer, 5, 5)
    for name, t in bits_of(again).items():
        assert torch.equal(t, whole[name]), name


def broadcast_copies_every_part(rank, folder):
    net = model(seed=rank, overrides={"1": {"bits": 3, "sym": True}})
    net.register_buffer("columns", torch.full((3, 4), float(rank)).t())
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
    broadcast_copies_every_part,
    residuals_are_broadcast_and_stay_the_same,
    other_formats_are_refused_on_every_rank,
    ranks_that_round_for_themselves_drift_apart,
]


def run(rank, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # A rank that fails leaves the other waiting in a collective: for a minute, not for half an hour.
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
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
def verdicts(tmp_path_factory):
    """What two processes say of every scenario; they are started once, which is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, args=(str(folder), port), nprocs=2)
    return folder


@pytest.mark.parametrize("scenario", [f.__name__ for f in SCENARIOS])
def test_two_processes(scenario, verdicts):
    for rank in (0, 1):
        path = verdicts / f"{scenario}.{rank}"
        assert path.exists() and path.read_text() == "holds", path.read_text()
