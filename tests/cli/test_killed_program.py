"""kill -9 while `subbyte quantize` writes: what stands under the output's name is the old file or the new one, whole."""

import os
import pathlib
import random
import signal
import subprocess
import time

import numpy as np
import pytest

safetensors_numpy = pytest.importorskip("safetensors.numpy")

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("SUBBYTE_PROGRAM", str(ROOT / "build/core/subbyte/cli/subbyte"))


def quantize(source, target):
    return [PROGRAM, "quantize", str(source), str(target), "--bits", "4"]


def test_a_killed_program_leaves_the_old_file_or_the_new_one(tmp_path):
    rng, times = np.random.default_rng(1), random.Random(1)
    sources, wanted = [], []
    for i in range(2):
        tensors = {f"layers.{n}.weight": rng.standard_normal((1024, 1024)).astype(np.float16) for n in range(8)}
        sources.append(tmp_path / f"in{i}.safetensors")
        safetensors_numpy.save_file(tensors, sources[-1])
        subprocess.run(quantize(sources[-1], tmp_path / "whole.safetensors"), check=True, capture_output=True)
        wanted.append((tmp_path / "whole.safetensors").read_bytes())
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "model.safetensors"
    start = time.perf_counter()
    subprocess.run(quantize(sources[0], target), check=True, capture_output=True)
    one = time.perf_counter() - start
    holds, killed, unfinished = 0, 0, 0
    for attempt in range(25):
        child = subprocess.Popen(quantize(sources[1 - holds], target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(times.uniform(0.05, 1.1) * one)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        assert target.read_bytes() in wanted, attempt
        # A program that was done in time has replaced the file; one that was killed may have got as far as the new name.
        if child.returncode == 0:
            assert target.read_bytes() == wanted[1 - holds]
        holds = wanted.index(target.read_bytes())
        rest = [p for p in folder.iterdir() if p != target]
        unfinished += len(rest)
        for p in rest:
            p.unlink()
    assert killed >= 5 and unfinished > 0  # kills did fall into writes
    subprocess.run(quantize(sources[1 - holds], target), check=True, capture_output=True)
    assert target.read_bytes() == wanted[1 - holds] and list(folder.iterdir()) == [target]
