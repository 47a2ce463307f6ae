"""Native checkpoints: what is saved is what is loaded, nothing half-written appears, and damage is named."""

import json

import pytest
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
        (lambda d, t: d.pop("version"), "damaged"),
        (lambda d, t: d["weights"]["w"].update(format="uint9"), "'w'.*uint9"),
        (lambda d, t: d["weights"]["w"].update(in_features=99), "'w'.*codes"),
        (lambda d, t: t.pop("w.scales"), "no tensor 'w.scales'"),
        (lambda d, t: t.update(w=torch.ones(1)), "dense and packed"),
        (lambda d, t: t.update({"w.scales": t["w.scales"][:, :1].contiguous()}), "'w'.*scales"),
        (lambda d, t: d.update(tied={"v": "nowhere"}), "tied"),
        (lambda d, t: d.update(weights=[1]), "damaged"),
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
