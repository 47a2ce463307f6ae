"""kill -9 while a checkpoint is written, again and again: the file under its name is always a whole one, and not an older one
than the writer had reported."""

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import subbyte
from subbyte import PackedWeight
from subbyte.compat import life_cycle
from subbyte.optim import PackedAdamW

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

KILLS = 12


def model():
    """About 4 MB, all of whose tensors hold one number after mark()."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512))
    subbyte.quantize_(net, bits=8, group_size=64, progress=False)
    net.register_buffer("more", torch.zeros(1 << 19))
    return net


def mark(net, number):
    for part in parts_of(net):
        part.fill_(number)


def parts_of(net):
    for tensor in (*net.parameters(), *net.buffers()):
        yield from tensor.parts.values() if isinstance(tensor, PackedWeight) else [tensor.detach()]


def number_in(tensors):
    """The number that all tensors hold; an assertion where they are of two writes."""
    numbers = {float(value) for t in tensors for value in (t.min(), t.max())}
    assert len(numbers) == 1, numbers
    return int(numbers.pop())


def leaves(tree):
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, PackedWeight):
        yield from tree.parts.values()
    elif isinstance(tree, torch.Tensor):
        yield tree


def save_native(net, path):
    subbyte.save(net, path)


def save_compat(net, path):
    life_cycle.save_checkpoint(net, str(path))


def save_run(net, path):
    with subbyte.replacing(path) as temporary:
        torch.save({"model": net.state_dict()}, temporary)


def save_example(net, path):
    from examples.training import save_atomically

    save_atomically({"model": net.state_dict()}, path)


WRITERS = {
    "native": (save_native, "m.safetensors", lambda p: subbyte.load(p)),
    "compat pt": (save_compat, "m.pt", lambda p: torch.load(p, weights_only=True)),
    "compat safetensors": (save_compat, "m.safetensors", lambda p: safetensors.torch.load_file(p)),
    "torch.save": (save_run, "run.pt", lambda p: torch.load(p, weights_only=True)),
    "example": (save_example, "run.pt", lambda p: torch.load(p, weights_only=True)),
}


def write_until_killed(net, save, path, first, report):
    torch.set_num_threads(1)
    for number in range(first, 250):  # codes are bytes
        mark(net, number)
        save(net, path)
        os.write(report, struct.pack("i", number))
    os._exit(0)


def reported(pipe, last):
    """The last number that the writer said it had saved."""
    data = b""
    while chunk := os.read(pipe, 4096):
        data += chunk
    numbers = [n for (n,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])]
    return numbers[-1] if numbers else last


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_a_whole_file_that_is_as_new_as_it_said(name, tmp_path):
    save, file, load = WRITERS[name]
    net, path, times = model(), tmp_path / file, random.Random(1)
    mark(net, 0)
    save(net, path)
    start = time.perf_counter()
    save(net, path)
    one = time.perf_counter() - start
    last, killed_inside, unfinished = 0, 0, 0
    for _ in range(KILLS):
        pipe, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(net, save, path, last + 1, report)
            finally:
                os._exit(1)
        os.close(report)
        time.sleep(times.uniform(0.2, 3.0) * one)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        said = reported(pipe, last)
        os.close(pipe)
        killed_inside += os.WIFSIGNALED(status)
        unfinished += len([p for p in tmp_path.iterdir() if p.name != file])
        number = number_in(leaves(load(path)))
        assert said <= number <= said + 1, (said, number)  # the next one may have got its name before the kill
        last = number
        for p in tmp_path.iterdir():
            if p.name != file:
                p.unlink()
    assert killed_inside >= KILLS - 2 and unfinished > 0  # kills did fall into writes
    mark(net, 255)
    save(net, path)
    assert number_in(leaves(load(path))) == 255 and [p.name for p in tmp_path.iterdir()] == [file]


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_bits_of_one_that_was_not_killed(tmp_path):
    """A training loop killed at random moments, resumed each time, against the same loop undisturbed."""

    def build():
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        subbyte.quantize_(net, bits=4, group_size=32, progress=False)
        return net, PackedAdamW(net.parameters(), lr=1e-2)

    def train(path, steps, pause=0.0):
        net, optimizer = build()
        first = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
        for step in range(first, steps):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            with subbyte.replacing(path) as temporary:
                torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
            time.sleep(pause)
        return net

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps, path, times, kills = 40, tmp_path / "run.pt", random.Random(2), 0
    train(tmp_path / "other.pt", 2)  # what PyTorch imports at a first step, children inherit
    start = time.perf_counter()
    whole = train(tmp_path / "other.pt", steps)
    one = (time.perf_counter() - start) / steps + 2e-3
    while True:
        child = os.fork()
        if child == 0:
            try:
                train(path, steps, pause=2e-3)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(times.uniform(3, 15) * one)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        assert kills < 100
    resumed = train(path, steps)
    torch.set_num_threads(threads)
    assert kills > 0
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
