"""The training program on a slice of the data: every setting learns, and an interrupted run goes on with the same bits."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from examples.fashion_mnist import __main__ as program  # noqa: E402
from examples.fashion_mnist import data  # noqa: E402
from examples.fashion_mnist.settings import SETTINGS  # noqa: E402


@pytest.fixture(scope="module")
def dataset():
    return data.load()


def arguments(output, *extra):
    return program.arguments(["--output", str(output), "--device", "cpu", "--images", "3000", "--batch", "50", *extra])


def test_the_files_hold_what_is_published(dataset):
    assert [tuple(t.shape) for t in (*dataset["train"], *dataset["test"])] == [
        (60000, 1, 28, 28),
        (60000,),
        (10000, 1, 28, 28),
        (10000,),
    ]
    assert torch.bincount(dataset["train"][1]).tolist() == [6000] * 10
    assert abs(float(dataset["train"][0].mean())) < 1e-3 and abs(float(dataset["train"][0].std()) - 1) < 1e-3


def test_a_damaged_file_is_refused(tmp_path):
    import gzip

    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(ValueError, match="starts with 01020304"):
        data.read_idx("x.gz", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install"):
        data.read_idx("y.gz", tmp_path)


# Those rounded to nearest are there to show that they do not.
@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.endswith("n")])
def test_a_setting_learns(name, dataset, tmp_path):
    args = arguments(tmp_path, "--epochs", "2")
    run = program.train(args, name, 0, dataset, torch.device("cpu"), lambda n: None)
    assert run["losses"][1] < 0.85 * run["losses"][0], run
    assert run["accuracy"][-1] > 0.6, run


def test_an_interrupted_run_goes_on_with_the_same_bits(dataset, tmp_path):
    class Interrupted(Exception):
        pass

    whole = program.train(arguments(tmp_path / "a", "--epochs", "2"), "4", 0, dataset, torch.device("cpu"), lambda n: None)
    steps = 0

    def interrupt(n):
        nonlocal steps
        steps += n
        if steps == 90:  # in the second epoch
            raise Interrupted

    with pytest.raises(Interrupted):
        program.train(arguments(tmp_path / "b", "--epochs", "2"), "4", 0, dataset, torch.device("cpu"), interrupt)
    resumed = program.train(arguments(tmp_path / "b", "--epochs", "2"), "4", 0, dataset, torch.device("cpu"), lambda n: None)
    assert resumed["losses"] == whole["losses"] and resumed["accuracy"] == whole["accuracy"]


def test_the_program_writes_curves_table_and_results(tmp_path, capsys):
    program.main(
        ["--settings", "fp32", "4", "--seeds", "2", "--epochs", "1", "--images", "2000", "--output", str(tmp_path), "--device", "cpu"]
    )
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs) == ["fp32", "4"] and len(runs["4"]) == 2
    assert "4 bits, packed" in (tmp_path / "table.md").read_text()


def test_an_impossible_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.arguments(["--epochs", "0"])
    assert "--epochs is 0, expected at least 1" in capsys.readouterr().err
