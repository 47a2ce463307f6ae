"""The C++ program that trains, packs, saves and loads one layer of each kind: its exit status and what it prints."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = Path(os.environ.get("SUBBYTE_TORCH_LIB", ROOT / "build/torch-2.11.0/subbyte_torch/libsubbyte_torch.so"))
PROGRAM = LIBRARY.resolve().parent.parent / "examples" / "five_systems"

pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="examples/five_systems was not built: CLI11 is missing")


def run(*arguments):
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_the_loss_falls_and_the_loaded_model_computes_the_same_bits():
    done = run(ROOT / "LICENSE", "--steps", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = map(float, re.search(r"first ([0-9.]+), last ([0-9.]+)", done.stdout).groups())
    assert first > 4.0 and last < 3.3, done.stdout  # ln 128 = 4.85 knows nothing; the letters' own entropy is 3.0
    codes, bits = map(float, re.search(r"moved: ([0-9.]+) %.*, ([0-9.]+) %", done.stdout).groups())
    assert codes > 5 and bits > 5, done.stdout
    assert "the same bits" in done.stdout


def test_a_training_that_teaches_nothing_is_a_failure(tmp_path):
    (tmp_path / "noise").write_bytes(os.urandom(1 << 16))  # 128 equally likely characters
    done = run(tmp_path / "noise", "--steps", "20")
    assert done.returncode == 1 and "the same bits" in done.stdout, done.stdout + done.stderr


def test_help_and_wrong_usage(tmp_path):
    done = run("--help")
    assert done.returncode == 0 and "--steps" in done.stdout and "Exit codes" in done.stdout
    (tmp_path / "short").write_text("short")
    for arguments, status, message in (
        ([], 2, "TEXT is required"),
        (["/no/such/file"], 2, "does not exist"),
        ([ROOT / "LICENSE", "--steps", "1"], 2, "--steps"),
        ([ROOT / "LICENSE", "--nonsense"], 2, "nonsense"),
        ([tmp_path / "short"], 1, "has 5 bytes, expected at least 256"),
    ):
        done = run(*arguments)
        assert done.returncode == status and message in done.stderr, (arguments, done)
