"""The C++ training program on a slice of Fashion-MNIST: it learns, and a killed run goes on with the same bits."""

import gzip
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(os.environ.get("SUBBYTE_TORCH_LIB", "build/torch-2.11.0/subbyte_torch/libsubbyte_torch.so"))
PROGRAM = LIBRARY.resolve().parent.parent / "examples" / "fashion_mnist"

pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="examples/fashion_mnist was not built: CLI11 or zlib is missing")


def start(folder, **options):
    options = {"images": 3000, "batch": 50, "epochs": 3, "hidden": 128, "checkpoint": folder / "run.pt", **options}
    argv = [PROGRAM, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def epochs(output):
    """[(epoch, loss, accuracy)] as printed."""
    return re.findall(r"epoch +(\d+) +loss ([\d.]+) +test accuracy ([\d.]+) %", output)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_it_learns(bits, tmp_path):
    process = start(tmp_path, bits=bits)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    done = epochs(output)
    assert [epoch for epoch, _, _ in done] == ["1", "2", "3"]
    assert float(done[2][1]) < 0.85 * float(done[0][1]) and float(done[2][2]) > 60, output
    weights, held = map(int, re.search(r"(\d+) weights in (\d+) bytes when deployed", output).groups())
    assert weights == 784 * 128 + 128 * 128 + 128 * 10
    assert 8 * held / weights < bits + 1.1, "codes, a float32 scale and a zero for 64 of them; no residual"


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole = epochs(start(tmp_path / "whole").communicate(timeout=300)[0])
    process = start(tmp_path / "killed")
    while "epoch  2" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)  # while it writes the second checkpoint, or just after
    assert process.wait() == -signal.SIGKILL
    output, errors = start(tmp_path / "killed").communicate(timeout=300)
    assert "goes on after epoch" in output, errors
    resumed = epochs(output)
    assert resumed and resumed == whole[3 - len(resumed) :]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    assert start(tmp_path, images=100, epochs=1).wait(timeout=300) == 0
    process = start(tmp_path, images=100, epochs=1, bits=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "is of another run (4 bits" in errors


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x01\x02\x03\x04", "expected an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "ends too early"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "more than 2^28"),
    ],
)
def test_a_damaged_file_is_refused(content, message, tmp_path):
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(content)
    process = start(tmp_path, data=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and message in errors


def test_missing_data_and_bad_arguments_are_named(tmp_path):
    process = start(tmp_path, data=tmp_path)
    assert "apt-get install dataset-fashion-mnist" in process.communicate(timeout=60)[1]
    process = start(tmp_path, bits=9)
    assert "--bits" in process.communicate(timeout=60)[1] and process.returncode != 0
