"""Native checkpoints: what is saved is what is loaded, nothing half-written appears, and damage is named."""

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch

import subbyte
from subbyte import FormatError, PackedWeight


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(30, 48)
        self.body = torch.nn.Linear(48, 48)
        self.norm = torch.nn.BatchNorm1d(48)
        self.head = torch.nn.Linear(48, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.body(self.embed(x))))


def packed_model():
    model = Tied()
    subbyte.quantize_(model, bits=4, group_size=16, scale_dtype=torch.float16)
    return model.eval()


def test_a_model_comes_back_bit_for_bit_with_its_tied_weights(tmp_path):
    model, path = packed_model(), tmp_path / "model.safetensors"
    subbyte.save(model, path, metadata={"title": "small"})
    tensors = subbyte.load(path)
    assert tensors.metadata["title"] == "small" and tensors["head.weight"] is tensors["embed.weight"]
    assert isinstance(tensors["body.weight"], PackedWeight) and tensors["body.weight"].scales.dtype == torch.float16
    for fresh in (Tied(), packed_model()):
        subbyte.load_weights_(fresh, tensors)
        fresh.eval()
        assert fresh.embed.weight is fresh.head.weight and fresh.body.weight.dtype == torch.float32
        x = torch.randint(0, 30, (5,))
        assert torch.equal(fresh(x), model(x))


def test_the_file_is_plain_safetensors_with_the_documented_description(tmp_path):
    path = tmp_path / "m.safetensors"
    weight = PackedWeight.from_float(
        torch.randn(5, 40), bits=3, group_size=16, zero_kind="zeros", perm=torch.randperm(40).int()
    )
    subbyte.save({"w": weight, "b": torch.arange(3)}, path)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["b", "w.codes", "w.perm", "w.scales", "w.zeros"]
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["subbyte"]) == {
            "version": 1,
            "weights": {"w": {"format": "uint3", "in_features": 40, "group_size": 16}},
        }
        assert torch.equal(file.get_tensor("w.codes"), weight.codes)
    again = subbyte.load(path)["w"]
    assert torch.equal(again.dequantize(), weight.dequantize()) and torch.equal(again.perm, weight.perm)


def test_every_format_and_mixed_width_survives(tmp_path):
    tensors = {
        f: PackedWeight.from_float(torch.randn(4, 96), format=f, group_size=32)
        for f in ("sign", "ternary", *(f"uint{b}" for b in range(2, 9)), "uint8*32+uint2*64")
    }
    subbyte.save(tensors, tmp_path / "m.safetensors")
    for name, weight in subbyte.load(tmp_path / "m.safetensors").items():
        assert weight.format == name and torch.equal(weight.dequantize(), tensors[name].dequantize())


def test_a_plain_safetensors_file_shards_and_a_folder_load_too(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    subbyte.save({"b": PackedWeight.from_float(torch.randn(4, 32), bits=4)}, tmp_path / "two.safetensors")
    index = {
        "weight_map": {
            "a": "one.safetensors",
            "b.codes": "two.safetensors",
            "b.scales": "two.safetensors",
            "b.offsets": "two.safetensors",
        }
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert sorted(subbyte.load(path)) == ["a", "b"]
    assert list(subbyte.load(tmp_path / "one.safetensors")) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    subbyte.save({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        subbyte.save({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def rewrite(path, change):
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    description = json.loads(metadata["subbyte"])
    change(description, tensors)
    safetensors.torch.save_file(tensors, path, {**metadata, "subbyte": json.dumps(description)})


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d, t: d.update(version=2), "version is 2"),
        (lambda d, t: d.update(version=True), "version is not a number"),
        (lambda d, t: d.pop("version"), "has no version"),
        (lambda d, t: d["weights"]["w"].update(format="uint9"), "'w'.*uint9"),
        (lambda d, t: d["weights"]["w"].update(in_features=99), "'w.codes' at byte"),
        (lambda d, t: d["weights"]["w"].update(in_features=40.5), "'w'.*in_features"),
        (lambda d, t: d["weights"]["w"].update(in_features="40"), "'w'.*in_features"),
        (lambda d, t: d["weights"]["w"].update(in_features=10**30), "'w'.*in_features"),
        (lambda d, t: d["weights"]["w"].update(more=1), "'w'.*'more' is unknown"),
        (lambda d, t: d["weights"]["w"].pop("group_size"), "'w'.*lacks"),
        (lambda d, t: d["weights"]["w"].update(format="uint8*8+uint2*32"), "'w'.*inside a group of 16"),
        (lambda d, t: t.update({"w.codes": t["w.codes"].float()}), "'w.codes' at byte"),
        (lambda d, t: t.update({"w.zeros": t["w.offsets"].clone()}), "'w.zeros' at byte.*at most one"),
        (lambda d, t: t.update({"w.perm": torch.zeros(40, dtype=torch.int32)}), "'w.perm' at byte.*second time"),
        (lambda d, t: t.pop("w.scales"), "no tensor 'w.scales'"),
        (lambda d, t: t.update(w=torch.ones(1)), "dense and packed"),
        (lambda d, t: t.update({"w.scales": t["w.scales"][:, :1].contiguous()}), "'w.scales' at byte"),
        (lambda d, t: d.update(tied={"v": "nowhere"}), "'v'.*tied to 'nowhere'"),
        (lambda d, t: d.update(tied={"v": []}), "tied is not an object of names"),
        (lambda d, t: d.update(tied=[1]), "tied is not an object of names"),
        (lambda d, t: d.update(weights=[1]), "weights is not an object"),
        (lambda d, t: d.update(more=[[]] * 3), "array inside an array|nested"),
    ],
)
def test_a_description_that_does_not_fit_is_a_format_error(tmp_path, change, says):
    path = tmp_path / "m.safetensors"
    subbyte.save({"w": PackedWeight.from_float(torch.randn(5, 40), bits=4, group_size=16)}, path)
    rewrite(path, change)
    with pytest.raises(FormatError, match=says):
        subbyte.load(path)


def test_a_truncated_file_is_a_format_error_and_a_missing_one_is_not_found(tmp_path):
    path = tmp_path / "m.safetensors"
    subbyte.save({"w": PackedWeight.from_float(torch.randn(5, 40), bits=4)}, path)
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="m.safetensors"):
            subbyte.load(path)
    with pytest.raises(FileNotFoundError):
        subbyte.load(tmp_path / "none.safetensors")
    assert issubclass(FormatError, ValueError)


def test_load_weights_names_what_does_not_fit_before_it_changes_anything(tmp_path):
    tensors = {name: t for name, t in packed_model().named_parameters(remove_duplicate=False)}
    tensors.update(packed_model().named_buffers())
    for change, says in (
        (lambda t: t.pop("body.bias"), "not given: body.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "not in the model: extra"),
        (lambda t: t.update({"body.bias": torch.ones(3)}), r"'body.bias' is \[3\], the model's is \[48\]"),
        (lambda t: t.update({"norm.weight": t["body.weight"]}), "BatchNorm1d cannot hold"),
    ):
        given, model = dict(tensors), Tied()
        change(given)
        before = model.body.weight.clone()
        with pytest.raises(ValueError, match=says):
            subbyte.load_weights_(model, given)
        assert type(model.body) is torch.nn.Linear and torch.equal(model.body.weight, before)
    model = Tied()
    subbyte.load_weights_(model, {"body.weight": tensors["body.weight"]}, strict=False)
    assert isinstance(model.body.weight, PackedWeight) and type(model.embed) is torch.nn.Embedding


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def described(**changes):
    weight = {"format": "ternary", "in_features": 5, "group_size": 8}
    return {"__metadata__": {"subbyte": json.dumps({"version": 1, "weights": {"w": weight}, **changes})}}


@pytest.mark.parametrize(
    "header, data, length, says",
    [
        (b"{}", b"", 2**63, "at byte 0: header length 9223372036854775808"),
        (b"{}", b"", 1000, "at byte 8: header needs 1000 bytes"),
        (b"{hello", b"", None, "at byte .*not JSON"),
        (b'{"a":' + b"[" * 100000, b"", None, "'a' at byte"),
        (b'{"a\xff":1}', b"", None, r"not JSON.*\\xff"),
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry("U8", [1], 0, 1)).encode(),) * 2), b"1", None, "duplicate key 'a'"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123", None, "'b' at byte .*overlaps"),
        ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123", None, "'b' at byte .*gap"),
        ({"a": entry("U8", [1], 0, 1)}, b"123", None, "the file has"),
        ({"a": entry("F32", [4], 0, 16)}, b"123", None, "'a' at byte .*beyond the data"),
        ({"a": entry("F32", [2**62, 2**62], 0, 16)}, b"0" * 16, None, "'a' at byte .*overflows"),
        ({"a": entry("Q4", [1], 0, 1)}, b"1", None, "'a' at byte .*dtype 'Q4' is unknown"),
        ({"__metadata__": {"subbyte": "[" * 100000}}, b"", None, "metadata 'subbyte' at byte"),
        (
            {**described(), "w.codes": entry("U8", [1, 2], 0, 2), "w.scales": entry("F32", [1, 1], 2, 6)},
            b"\xff\x00" + b"0" * 4,
            None,
            "'w.codes' at byte .*code outside its format",
        ),
        (
            {**described(), "w.codes": entry("U8", [1, 2], 0, 2), "w.scales": entry("F32", [1, 1], 2, 6)},
            b"\x00\x04" + b"0" * 4,
            None,
            "'w.codes' at byte .*spare bits",
        ),
    ],
)
def test_damage_is_named_with_tensor_and_offset(tmp_path, header, data, length, says):
    with pytest.raises(FormatError, match=says):
        subbyte.load(write_safetensors(tmp_path / "m.safetensors", header, data, length))


def test_every_bit_that_is_flipped_gives_a_format_error_or_a_file(tmp_path):
    path = tmp_path / "m.safetensors"
    subbyte.save({"w": PackedWeight.from_float(torch.randn(2, 5), format="ternary"), "b": torch.ones(1)}, path)
    whole, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            subbyte.load(path)
        except FormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole)


def test_all_types_of_tensors_come_back(tmp_path):
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
            *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    tensors.update(scalar=torch.tensor(3.0), empty=torch.ones(0, 3))
    subbyte.save(tensors, tmp_path / "m.safetensors")
    loaded = subbyte.load(tmp_path / "m.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        got = loaded[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_missing_shard_and_an_index_that_lies_are_format_errors(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, says in (
        ({"a": "two.safetensors"}, "two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b'"),
        ({"a": "../one.safetensors"}, "same folder"),
        ({"a": 3}, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=says):
            subbyte.load(tmp_path)
