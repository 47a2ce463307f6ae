"""bench/compare_torch.py: it runs, prints every case, and refuses to time what is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "compare_torch.py"
LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)


def module():
    spec = importlib.util.spec_from_file_location("compare_torch", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    torch.ops.load_library(LIBRARY)
    return loaded


def test_a_small_run_prints_and_stores_a_ratio_for_every_case(tmp_path):
    out = tmp_path / "ratios.json"
    argv = "--threads 1 --shapes 40x70 --m 1,9 --formats uint5,sign --seconds 0 --samples 1 --cold-mb 0".split()
    done = subprocess.run(
        [sys.executable, SCRIPT, *argv, "--json", out], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("M=9") == done.stdout.count("M=1 ") == 3  # three operations
    results = json.loads(out.read_text())["results"]
    cases = {(r["op"], r["format"], r["m"]) for r in results}
    assert len(results) == len(cases) == 12
    assert all(r["ratio"] > 0 and r["ratio"] == r["torch_seconds"] / r["seconds"] for r in results)


@pytest.mark.parametrize("op", ["linear", "linear_a8", "linear_grad_input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_that_is_off_is_not_timed(op, dtype):
    compare = module()
    weight = compare.Weight("uint4", 24, 96, 32, 0)
    compare.sides_of(op, weight, 5, dtype)[2]()  # right as it is
    weight.dense[:] += 0.2 * weight.dense.abs().max()
    with pytest.raises(SystemExit, match="nothing was timed"):
        compare.sides_of(op, weight, 5, dtype)[2]()


def test_arguments_that_make_no_sense_are_refused(capsys):
    compare = module()
    for argv in (["--formats", "uint9"], ["--shapes", "4x"], ["--shapes", "64"], ["--m", "0"], ["--library", "none.so"]):
        with pytest.raises(SystemExit) as refused:
            compare.parse(argv)
        assert refused.value.code == 2
    assert "none.so is no file" in capsys.readouterr().err
