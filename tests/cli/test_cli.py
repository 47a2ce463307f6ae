"""The `subbyte` program as a user meets it: exit codes, messages, files left behind, memory."""

import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import time

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("SUBBYTE_PROGRAM", str(ROOT / "build/core/subbyte/cli/subbyte"))


def subbyte(*args, **more):
    return subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, **more)


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "in.safetensors"
    tensors = {f"layers.{i}.{n}.weight": rng.standard_normal((24, 64)).astype(np.float16) for i in range(2) for n in ("up", "down")}
    tensors["embed.weight"] = rng.standard_normal((50, 64)).astype(np.float32)
    tensors["norm.weight"] = np.ones(64, np.float32)
    safetensors_numpy.save_file(tensors, path)
    return path


def formats(path):
    seen = json.loads(subbyte("inspect", path, "--json").stdout)
    return {t["name"]: (t["type"], t.get("group_size")) for t in seen["tensors"]}


def test_version_and_help_exit_with_zero():
    assert re.fullmatch(r"subbyte \d+\.\d+\.\d+\n", subbyte("--version").stdout)
    for command in ([], ["inspect"], ["quantize"], ["convert"], ["bench"], ["doctor"]):
        done = subbyte(*command, "--help")
        assert done.returncode == 0 and "--help" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["inspect"],
        ["quantize", "IN", "OUT"],
        ["quantize", "IN", "OUT", "--bits", "9"],
        ["quantize", "IN", "OUT", "--format", "uint9"],
        ["quantize", "IN", "OUT", "--bits", "4", "--format", "uint4"],
        ["quantize", "IN", "OUT", "--bits", "4", "--group-size", "-3"],
        ["quantize", "IN", "OUT", "--bits", "4", "--scheme", "minmax", "--sym"],
        ["quantize", "IN", "OUT", "--bits", "4", "--scheme", "midrise", "--sym"],
        ["quantize", "IN", "OUT", "--override", "nothing"],
        ["bench", "--shape", "12"],
        ["bench", "--formats", "uint9"],
    ],
)
def test_wrong_usage_exits_with_two_and_writes_nothing(args, model, tmp_path):
    out = tmp_path / "out.safetensors"
    done = subbyte(*[{"IN": model, "OUT": out}.get(a, a) for a in args])
    assert done.returncode == 2 and done.stderr
    assert not out.exists()


def test_file_trouble_exits_with_one_and_one_line(model, tmp_path):
    bad = tmp_path / "bad\x1b.safetensors"
    bad.write_bytes(struct.pack("<Q", 2) + b"{]")
    folder = tmp_path / "none" / "out"
    for args in (["inspect", tmp_path / "missing"], ["inspect", bad], ["inspect", "/dev/null"], ["convert", model, folder], ["convert", model, tmp_path]):
        done = subbyte(*args)
        assert done.returncode == 1, args
        assert done.stdout == "" and done.stderr.count("\n") == 1 and "\x1b" not in done.stderr


def test_skip_only_and_override_choose_tensors(model, tmp_path):
    out = tmp_path / "out.safetensors"
    done = subbyte("quantize", model, out, "--bits", "4", "-g", "16", "--skip", "embed*", "--override", "*.down.weight=ternary,row", "layers.1.down*=uint6")
    assert done.returncode == 0, done.stderr
    assert formats(out) == {
        "layers.0.up.weight": ("uint4", 16),
        "layers.1.up.weight": ("uint4", 16),
        "layers.0.down.weight": ("ternary", 64),
        "layers.1.down.weight": ("uint6", 16),
        "embed.weight": ("F32", None),
        "norm.weight": ("F32", None),
    }
    assert "4 weights quantized" in done.stdout
    assert subbyte("quantize", model, out, "--bits", "1", "--only", "*.up.*", "--quiet").stdout == ""
    assert {n for n, (t, _) in formats(out).items() if t == "sign"} == {"layers.0.up.weight", "layers.1.up.weight"}


def test_packed_weights_pass_through_exactly_unless_asked(model, tmp_path):
    first, second, third = (tmp_path / n for n in ("1", "2", "3"))
    assert subbyte("quantize", model, first, "--bits", "4").returncode == 0
    assert subbyte("quantize", first, second, "--bits", "2").returncode == 0
    assert first.read_bytes() == second.read_bytes()
    assert subbyte("quantize", first, third, "--bits", "2", "--requantize").returncode == 0
    assert formats(third)["embed.weight"] == ("uint2", 64)


def test_mid_rise_grids_are_written_and_residual_planes_pass_through(model, tmp_path):
    first, second, third = (tmp_path / n for n in ("1", "2", "3"))
    assert subbyte("quantize", model, first, "--bits", "2", "--scheme", "midrise", "--override", "embed*=sign").returncode == 0
    tensors = safetensors_numpy.load_file(first)
    assert (tensors["layers.0.up.weight.zeros"] == 1.5).all() and "embed.weight.zeros" not in tensors
    # A residual as training writes it: six more bits a weight.
    seen = json.loads(safetensors_numpy_metadata(first)["subbyte"])
    seen["weights"]["layers.0.up.weight"]["residual_bits"] = 6
    tensors["layers.0.up.weight.residual"] = np.random.default_rng(3).integers(0, 256, (24, 48), np.uint8)
    safetensors_numpy.save_file(tensors, second, {"subbyte": json.dumps(seen)})
    done = subbyte("convert", second, third)
    assert done.returncode == 0, done.stderr
    again = safetensors_numpy.load_file(third)
    assert again.keys() == tensors.keys() and all(np.array_equal(again[name], t) for name, t in tensors.items())
    told = {t["name"]: t for t in json.loads(subbyte("inspect", third, "--json").stdout)["tensors"]}
    assert told["layers.0.up.weight"]["residual_bits"] == 6 and told["layers.1.up.weight"]["residual_bits"] == 0
    assert told["layers.0.up.weight"]["bits_per_weight"] == 2 + 6 + 2 * 16 / 64
    assert "uint2 (+6 bits)" in subbyte("inspect", third).stdout


def safetensors_numpy_metadata(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]


def test_the_same_call_writes_the_same_bytes_on_any_number_of_threads(model, tmp_path):
    files = []
    for threads in (1, 2):
        out = tmp_path / f"{threads}"
        assert subbyte("quantize", model, out, "--bits", "3", "--rounding", "stochastic", "--seed", "5", "-t", threads).returncode == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_a_failing_run_keeps_the_old_output_and_leaves_no_other_file(tmp_path):
    w = np.ones((4, 32), np.float32)
    w[2, 5] = np.nan
    source, out = tmp_path / "in", tmp_path / "out"
    safetensors_numpy.save_file({"w": w}, source)
    out.write_text("old")
    done = subbyte("quantize", source, out, "--bits", "4")
    assert done.returncode == 1 and "tensor 'w'" in done.stderr and "w[2, 5]" in done.stderr
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_progress_is_drawn_only_when_asked_or_on_a_terminal(model, tmp_path):
    out = tmp_path / "out"
    assert subbyte("quantize", model, out, "--bits", "4").stderr == ""
    assert "100 %" in subbyte("quantize", model, out, "--bits", "4", "--progress").stderr
    assert subbyte("quantize", model, out, "--bits", "4", "--progress", "--quiet").stderr == ""


def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    big_model(source, 48 * 1024)  # 192 MiB
    done = subbyte("quantize", source, out, "--bits", "4", "--sym")
    assert done.returncode == 0, done.stderr
    value, unit = re.search(r"peak memory ([\d.]+) (\w+)", done.stdout).groups()
    assert float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] < 64e6, done.stdout


def rewrite_description(path, **changes):
    """The same safetensors file with other entries in its metadata key "subbyte"."""
    with safetensors.safe_open(path, "numpy") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    metadata["subbyte"] = json.dumps({**json.loads(metadata["subbyte"]), **changes})
    safetensors_numpy.save_file(tensors, path, metadata)


def description(path):
    with safetensors.safe_open(path, "numpy") as f:
        return json.loads(f.metadata()["subbyte"])


def test_tied_names_pass_through_and_choose_their_tensor(model, tmp_path):
    first, second, third = (tmp_path / n for n in ("1", "2", "3"))
    assert subbyte("quantize", model, first, "--bits", "4", "--skip", "layers.0.*").returncode == 0
    tied = {"head.weight": "embed.weight", "norm2.weight": "norm.weight", "up.weight": "layers.0.up.weight"}
    rewrite_description(first, tied=tied)
    assert "head.weight is embed.weight, stored once" in subbyte("inspect", first).stdout
    assert json.loads(subbyte("inspect", first, "--json").stdout)["tied"] == tied
    assert subbyte("convert", first, second).returncode == 0
    assert description(second)["tied"] == tied
    # A pattern for the other name holds for the tensor.
    assert subbyte("quantize", first, third, "--bits", "2", "--requantize", "--skip", "head.*", "up.*").returncode == 0
    assert description(third)["tied"] == tied
    assert formats(third)["embed.weight"] == ("uint4", 64) and formats(third)["layers.0.up.weight"] == ("F16", None)
    assert formats(third)["layers.0.down.weight"] == ("uint2", 64)
    rewrite_description(first, tied={"head.weight": "nowhere"})
    done = subbyte("convert", first, second)
    assert done.returncode == 1 and "'head.weight'" in done.stderr and "does not hold" in done.stderr


def test_a_mixed_row_is_a_format_as_anywhere_else(model, tmp_path):
    out = tmp_path / "out"
    assert subbyte("quantize", model, out, "--format", "uint8*16+uint3*48", "-g", "16", "--override", "embed*=sign*32+ternary*32,32").returncode == 0
    assert formats(out)["layers.0.up.weight"] == ("uint8*16+uint3*48", 16) and formats(out)["embed.weight"] == ("sign*32+ternary*32", 32)
    for text, says in (
        ("uint8*16+uint3*40", "tensor 'embed.weight': .*56 columns, expected K = 64"),
        ("uint8*16+uint9*48", "'uint9' is unknown"),
        ("uint8*8+uint3*56", "tensor 'embed.weight'.*ends at column 8, inside a group of 16"),
    ):
        done = subbyte("quantize", model, tmp_path / "no", "--format", text, "-g", "16")
        assert done.returncode == 2 and re.search(says, done.stderr), done.stderr
        assert not (tmp_path / "no").exists()


def test_a_pattern_that_matches_nothing_is_told(model, tmp_path):
    done = subbyte("quantize", model, tmp_path / "out", "--bits", "4", "--skip", "lm_head*", "embed*")
    assert done.returncode == 0 and done.stderr == "subbyte: note: --skip 'lm_head*' matches no tensor\n"


def big_model(path, rows, columns=2048):
    """A safetensors file with one bfloat16 matrix of values from 1 to 1.5."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}}).encode()
    chunk = (np.arange(columns * 512, dtype=np.uint16) % 64 + 0x3F80).tobytes()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for _ in range(rows // 512):
            f.write(chunk)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_the_old_output_and_leaves_no_other_file(tmp_path, number):
    source, out = tmp_path / "in", tmp_path / "out"
    big_model(source, 48 * 1024)
    out.write_text("old")
    running = subprocess.Popen([PROGRAM, "quantize", source, out, "--bits", "3", "-t", "1"], stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(tmp_path.glob("out.part-*")):
        time.sleep(0.001)
    running.send_signal(number)
    stderr = running.communicate()[1]
    assert running.returncode == 1 and stderr == "subbyte: interrupted; nothing was written\n"
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_messages_are_utf8_whatever_the_file_holds(tmp_path):
    bad = tmp_path / "bad"
    header = b'{"a\xff\xc2\x9b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    bad.write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    done = subbyte("inspect", bad)  # decodes as UTF-8
    assert done.returncode == 1 and "\\xff" in done.stderr
    name = os.fsencode(tmp_path) + b"/m\xff\xc2\x9b\xc3\xa9\xe2\x82"
    done = subprocess.run([PROGRAM, b"inspect", name], capture_output=True, text=True)
    assert done.returncode == 1 and "m\\xff\\xc2\\x9b\u00e9\\xe2\\x82: cannot open" in done.stderr


def test_doctor_says_what_would_run():
    seen = json.loads(subbyte("doctor", "--json").stdout)
    assert seen["isa"]["active"] in ("scalar", "avx2", "avx512", "avx512_vnni") and seen["threads"]["used"] >= 1
    assert {k["format"] for k in seen["kernels"]} == {"sign", "ternary", *(f"uint{b}" for b in range(2, 9))}
    forced = json.loads(subbyte("doctor", "--json", env={**os.environ, "SUBBYTE_FORCE_ISA": "scalar"}).stdout)
    assert forced["isa"]["active"] == "scalar"
    assert all("avx" not in k["linear"] and "avx" not in k["linear_a8"] for k in forced["kernels"])
    assert "what runs" in subbyte("doctor").stdout
    assert subbyte("doctor", env={**os.environ, "SUBBYTE_FORCE_ISA": "mmx"}).returncode == 1


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "2x", "1000000000", "99999999999999999999"])
def test_a_number_of_threads_that_is_none_is_named(threads, model, tmp_path):
    done = subbyte("quantize", model, tmp_path / "out", "--bits", "4", env={**os.environ, "SUBBYTE_NUM_THREADS": threads})
    assert done.returncode == 1 and f"SUBBYTE_NUM_THREADS={threads} is no number of threads" in done.stderr
    assert not (tmp_path / "out").exists()
    env = {**os.environ, "SUBBYTE_NUM_THREADS": threads}
    assert subbyte("quantize", model, tmp_path / "out", "--bits", "4", "-t", "2", env=env).returncode == 0


def test_bench_measures_limits_and_ops():
    done = subbyte("bench", "--shape", "65x200", "--m", "1,3", "--formats", "sign,uint3", "--seconds", "0.001", "--group-size", "64", "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["limits"]["read_bytes_per_second"] > 1e8
    assert {(r["op"], r["format"], r["m"]) for r in seen["results"]} == {
        (op, f, m) for f in ("sign", "uint3") for op, ms in (("dequantize", [0]), ("linear", [1, 3]), ("linear_a8", [1, 3])) for m in ms
    }
    assert all(r["seconds"] > 0 and r["memory_share"] > 0 for r in seen["results"])


EXAMPLE = os.environ.get("SUBBYTE_RUN_CHECKPOINT", str(ROOT / "build/core/examples/run_checkpoint"))


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_the_example_runs_a_block_on_packed_weights(tmp_path, bits):
    rng = np.random.default_rng(2)
    shapes = {"embed_tokens": (40, 96), "layers.0.mlp.gate_proj": (130, 96), "layers.0.mlp.up_proj": (130, 96), "layers.0.mlp.down_proj": (96, 130)}
    source, out = tmp_path / "in", tmp_path / "out"
    safetensors_numpy.save_file({f"model.{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, source)
    assert subbyte(*(["convert"] if bits is None else ["quantize", "--bits", bits]), source, out).returncode == 0
    done = subprocess.run([EXAMPLE, str(out), "0", "7"], capture_output=True, text=True)
    if bits is None:  # nothing is packed in it
        assert done.returncode == 1 and "no packed weight" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"uint{bits}" in done.stdout and float(done.stdout.rsplit(" ", 1)[1]) < 1e-5
