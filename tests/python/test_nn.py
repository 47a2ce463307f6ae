"""Packed modules: constructors, state, and quantize_ over models."""

import copy
import io
import pickle

import pytest
import torch

import subbyte
from subbyte import PackedWeight


def model():
    return torch.nn.Sequential(
        torch.nn.Embedding(30, 48), torch.nn.Linear(48, 20), torch.nn.ReLU(), torch.nn.Linear(20, 7, bias=False)
    )


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(30, 48)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(48, 48) for _ in range(2))
        self.head = torch.nn.Linear(48, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


# ---- modules


def test_constructors_take_torch_nn_arguments_and_show_the_packing():
    linear = subbyte.nn.Linear(48, 20, bits=4, group_size=16)
    assert isinstance(linear, torch.nn.Linear) and isinstance(linear.weight, PackedWeight) and linear.bias.shape == (20,)
    assert "in_features=48" in repr(linear) and "format=uint4" in repr(linear) and "group_size=16" in repr(linear)
    assert subbyte.nn.Linear(48, 20, bias=False, format="sign").bias is None
    table = subbyte.nn.Embedding(30, 48, padding_idx=3, bits=8, scale_dtype=torch.float16)
    assert "30, 48" in repr(table) and "format=uint8" in repr(table) and table(torch.tensor([1])).shape == (1, 48)
    for wrong in (
        lambda: subbyte.nn.Linear(4, 4),
        lambda: subbyte.nn.Linear(4, 4, bits=4, activation_bits=7),
        lambda: subbyte.nn.Embedding.from_float(torch.nn.Embedding(3, 4, max_norm=1.0), bits=4),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_from_float_equals_the_float_module_on_the_rounded_weight(device):
    linear = torch.nn.Linear(48, 20).to(device)
    packed = subbyte.nn.Linear.from_float(linear, bits=5, group_size=16)
    x = torch.randn(3, 48, device=device)
    torch.testing.assert_close(
        packed(x), torch.nn.functional.linear(x, packed.weight.dequantize(), linear.bias), atol=1e-5, rtol=1e-5
    )
    assert packed.bias is linear.bias


def test_activation_bits_8_rounds_the_input_and_keeps_the_gradient_of_linear(device):
    linear = torch.nn.Linear(48, 20).to(device)
    exact, rounded = (subbyte.nn.Linear.from_float(linear, bits=8, group_size=16, activation_bits=a) for a in (None, 8))
    x = torch.randn(5, 48, device=device)
    a, b = exact(x), rounded(x)
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(exact.weight.grad, rounded.weight.grad, atol=1e-5, rtol=1e-5)


def test_embedding_rows_are_exact_and_the_padding_row_gets_no_gradient(device):
    table = subbyte.nn.Embedding(30, 48, padding_idx=2, bits=4, group_size=16, scale_dtype=torch.float16).to(device)
    indices = torch.tensor([[1, 2], [29, 1]], device=device)
    y = table(indices)
    assert y.dtype == torch.float32 and torch.equal(y, table.weight.dequantize()[indices])
    y.sum().backward()
    assert table.weight.grad[1].eq(2).all() and table.weight.grad[29].eq(1).all() and table.weight.grad[2].eq(0).all()
    with (
        pytest.raises((IndexError, RuntimeError)) if device == "cpu" else pytest.raises((IndexError, RuntimeError, ValueError))
    ):
        table.cpu()(torch.tensor([30]))


# ---- state_dict


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_bags_of_any_width_equal_torchs_on_the_dequantized_table(bits, sparse, device):
    source = torch.nn.EmbeddingBag(30, 20, mode="mean", sparse=sparse, padding_idx=4).to(device)
    for mode in ("sum", "mean"):
        source.mode = mode
        bag = subbyte.nn.EmbeddingBag.from_float(source, bits=bits, group_size=10)
        options = dict(freeze=False, mode=mode, padding_idx=4, sparse=sparse)
        dense = torch.nn.EmbeddingBag.from_pretrained(bag.weight.dequantize(), **options)
        indices = torch.tensor([3, 4, 29, 3, 0, 4, 4], device=device)
        calls = [((indices, torch.tensor([0, 3, 3, 5], device=device)), None), ((indices[:6].view(2, 3),), None)]
        if mode == "sum":
            calls.append(((indices[:6].view(2, 3),), torch.rand(2, 3, device=device)))
        for arguments, weights in calls:
            y, z = bag(*arguments, per_sample_weights=weights), dense(*arguments, per_sample_weights=weights)
            torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
            g = torch.randn_like(y)
            bag.weight.grad = dense.weight.grad = None
            y.backward(g)
            z.backward(g)
            assert bag.weight.grad.is_sparse == sparse
            ours, theirs = (w.grad.to_dense() if sparse else w.grad for w in (bag.weight, dense.weight))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        # The function of torch too, whose other modes run on the dequantized table.
        f = torch.nn.functional.embedding_bag
        for options in (dict(mode=mode), dict(mode="max"), dict(mode=mode, padding_idx=-1)):
            torch.testing.assert_close(
                f(indices[:6].view(2, 3), bag.weight, **options), f(indices[:6].view(2, 3), dense.weight, **options),
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip
        with pytest.raises(IndexError, match="30"):
            bag(torch.tensor([[30]], device=device))
            subbyte.raise_device_errors()


def test_sparse_tables_of_any_width_step_the_rows_that_were_looked_up(device):
    for module in (
        subbyte.nn.Embedding(40, 16, bits=4, sparse=True, device=device),
        subbyte.nn.EmbeddingBag(40, 16, bits=4, sparse=True, mode="sum", device=device),
    ):
        before = module.weight.codes.clone()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        module(torch.tensor([[3, 7]], device=device)).sum().backward()
        assert module.weight.grad.is_sparse and module.weight.grad.coalesce().indices()[0].tolist() == [3, 7]
        optimizer.step()
        moved = (module.weight.codes != before).any(1).nonzero()[:, 0]
        assert moved.tolist() == [3, 7]
        assert copy.deepcopy(module).sparse
    assert subbyte.nn.Embedding.from_float(torch.nn.Embedding(3, 4, sparse=True), bits=4).sparse


def test_bags_go_through_checkpoints(tmp_path):
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 16, mode="sum"), torch.nn.Linear(16, 3))
    subbyte.quantize_(model, bits=4, group_size=16)
    indices = torch.tensor([[1, 49], [7, 7]])
    subbyte.save(model, tmp_path / "model.safetensors")
    dense = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 16, mode="sum"), torch.nn.Linear(16, 3))
    packed = subbyte.load_weights_(dense, subbyte.load(tmp_path / "model.safetensors"))
    assert packed is dense and type(packed[0]) is subbyte.nn.EmbeddingBag and torch.equal(packed(indices), model(indices))
    again = subbyte.load_weights_(packed, subbyte.load(tmp_path / "model.safetensors"))  # into packed modules
    assert torch.equal(again(indices), model(indices))


def test_bags_are_quantized_in_place_copied_and_loaded():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 16, mode="sum"), torch.nn.EmbeddingBag(50, 16, mode="max"))
    report = subbyte.quantize_(model, bits=4, group_size=16)
    assert type(model[0]) is subbyte.nn.EmbeddingBag and len(report) == 1 and "mode is 'max'" in report.left["1"]
    assert "mode='sum'" in repr(model[0]) and "format=uint4" in repr(model[0])
    indices = torch.tensor([[1, 49], [7, 7]])
    y = model[0](indices)
    for other in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert torch.equal(other(indices), y)
    fresh = subbyte.nn.EmbeddingBag(50, 16, mode="sum", bits=4, group_size=16)
    fresh.load_state_dict(model[0].state_dict())
    assert torch.equal(fresh(indices), y) and list(fresh.state_dict()) == ["weight.codes", "weight.scales", "weight.offsets"]
    with pytest.raises(ValueError, match="mode is 'majority', expected 'sum' or 'mean'"):
        subbyte.nn.EmbeddingBag(5, 4, bits=4, mode="majority")
    with pytest.raises(ValueError, match="EmbeddingBag: include_last_offset=True is not supported"):
        subbyte.nn.EmbeddingBag.from_float(torch.nn.EmbeddingBag(5, 4, include_last_offset=True), bits=4)


def test_state_dict_holds_plain_tensors_and_loads_back_exactly():
    a, b = model(), model()
    for m in (a, b):
        subbyte.quantize_(m, bits=4, group_size=16)
    state = a.state_dict()
    assert list(state) == [
        "0.weight.codes",
        "0.weight.scales",
        "0.weight.offsets",
        "1.weight.codes",
        "1.weight.scales",
        "1.weight.offsets",
        "1.bias",
        "3.weight.codes",
        "3.weight.scales",
        "3.weight.offsets",
    ]
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    parameters = list(b.parameters())
    result = b.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys and all(p is q for p, q in zip(parameters, b.parameters()))
    x = torch.randint(0, 30, (4, 3))
    assert torch.equal(a(x), b(x))
    c = model()
    subbyte.quantize_(c, bits=4, group_size=16)
    c.load_state_dict(state, assign=True)
    assert torch.equal(a(x), c(x)) and c[1].weight.codes.data_ptr() == a[1].weight.codes.data_ptr()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("1.weight.scales"), r"Missing.*1\.weight\.scales"),
        (lambda s: s.update({"1.weight.perm": torch.zeros(48)}), r"1\.weight\.perm"),
        (lambda s: s.update({"1.weight.codes": s["1.weight.codes"][:, :5]}), r"1\.weight: codes.*\[20, 5\].*\[20, 24\]"),
        (lambda s: s.update({"1.weight.scales": s["1.weight.scales"].half()}), r"1\.weight: scales.*float16.*float32"),
        (lambda s: s.update({"1.weight": torch.zeros(20, 48)}), r"1\.weight: the checkpoint holds a dense weight"),
        (lambda s: s.update({"1.nonsense": torch.zeros(1)}), r"Unexpected.*1\.nonsense"),
    ],
)
def test_a_state_dict_that_does_not_fit_says_what_is_wrong(change, says):
    m = subbyte_model = model()
    subbyte.quantize_(m, bits=4, group_size=16)
    state = m.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=r"(?s)" + says):
        subbyte_model.load_state_dict(state)


def test_the_same_shapes_in_another_format_are_refused():
    a, b = torch.nn.Sequential(torch.nn.Linear(32, 8)), torch.nn.Sequential(torch.nn.Linear(32, 8))
    subbyte.quantize_(a, format="ternary", group_size=16)
    subbyte.quantize_(b, bits=2, sym=True, group_size=16)
    with pytest.raises(RuntimeError, match="format is 'ternary' in the checkpoint and 'uint2' in the module"):
        b.load_state_dict(a.state_dict())


# ---- quantize_


def test_quantize_packs_every_linear_and_embedding_in_place_and_reports_it(capsys):
    m = model()
    inner, hooked = m[1], []
    m[1].register_forward_hook(lambda *_: hooked.append(1))
    reference = copy.deepcopy(m)
    report = subbyte.quantize_(m, bits=8, group_size=16)
    assert m[1] is inner and [type(x) for x in m] == [subbyte.nn.Embedding, subbyte.nn.Linear, torch.nn.ReLU, subbyte.nn.Linear]
    x = torch.randint(0, 30, (4, 3))
    torch.testing.assert_close(m(x), reference(x), atol=0.05, rtol=0.05)
    assert hooked and len(report) == 3 and report.bytes_after < report.bytes_before
    row = report.layers[1]
    assert (row.name, row.shape, row.format, row.bytes_before) == ("1", (20, 48), "uint8", 20 * 48 * 4) and 0 < row.error < 0.01
    assert "uint8" in str(report) and "total" in str(report)
    assert capsys.readouterr().err == ""  # too short for a progress bar


def test_the_progress_bar_shows_when_it_takes_long_and_only_then(capsys, monkeypatch):
    import subbyte.conversion as conversion

    monkeypatch.setattr(conversion, "_PATIENCE_S", 0.0)
    subbyte.quantize_(model(), bits=4)
    assert "3/3" in capsys.readouterr().err
    subbyte.quantize_(model(), bits=4, progress=False)
    assert capsys.readouterr().err == ""


def test_skip_and_overrides_choose_by_name_and_pattern():
    m = torch.nn.ModuleDict({"encoder": model(), "decoder": model()})
    report = subbyte.quantize_(
        m,
        bits=4,
        group_size=16,
        skip=["decoder.0", "*.3"],
        overrides={"encoder": {"bits": 2, "activation_bits": 8}, "encoder.0": {"format": "ternary"}},
    )
    assert {layer.name: layer.format for layer in report} == {
        "encoder.0": "ternary",
        "encoder.1": "uint2",
        "decoder.1": "uint4",
    }
    assert m["encoder"][1].activation_bits == 8 and m["decoder"][1].activation_bits is None
    assert type(m["decoder"][0]) is torch.nn.Embedding and report.left == {
        "decoder.0": "skip 'decoder.0'",
        "encoder.3": "skip '*.3'",
        "decoder.3": "skip '*.3'",
    }


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(bits=4, skip=["nowhere"]), "'nowhere' matches no layer"),
        (dict(bits=4, overrides={"x.*": {"bits": 2}}), "'x.\\*' matches no layer"),
        (dict(bits=4, overrides={"1": {"bit": 2}}), "'bit' is unknown"),
        (dict(), "one of bits and format"),
        (dict(bits=4, skip="1"), "expected a list"),
        (dict(bits=4, activation_bits=4), "activation_bits"),
        (dict(format="int4"), "int4"),
        (dict(bits=4, overrides={"3": {"bits": 9}}), "1 to 8"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_changes(arguments, says):
    m = model()
    with pytest.raises(ValueError, match=says):
        subbyte.quantize_(m, **arguments)
    assert not any(isinstance(p, PackedWeight) for p in m.parameters())
    with pytest.raises(TypeError):
        subbyte.quantize_(m, bits=4, groupsize=3)


def test_tied_weights_stay_tied_and_are_packed_once():
    m = Tied()
    report = subbyte.quantize_(m, bits=8, group_size=16)
    assert m.embed.weight is m.head.weight and isinstance(m.head.weight, PackedWeight) and len(list(m.parameters())) == 5
    assert [(layer.name, layer.tied) for layer in report] == [("embed", ("head",)), ("layers.0", ()), ("layers.1", ())]
    m(torch.randint(0, 30, (2, 5))).sum().backward()
    assert m.embed.weight.grad.abs().sum() > 0
    m = Tied()
    report = subbyte.quantize_(m, bits=8, skip=["head"])
    assert m.embed.weight is m.head.weight and type(m.embed) is torch.nn.Embedding and "tied" in report.left["embed"]
    with pytest.raises(ValueError, match="embed and head share their weight, but bits is 8 for one and 2 for the other"):
        subbyte.quantize_(Tied(), bits=8, overrides={"head": {"bits": 2}})


def test_a_module_under_two_names_is_packed_once():
    shared = torch.nn.Linear(16, 16)
    m = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    report = subbyte.quantize_(m, bits=4)
    assert m[0] is m[2] and isinstance(m[0].weight, PackedWeight) and len(report) == 1 and report.layers[0].tied == ("2",)


def test_transformers_conv1d_becomes_a_linear_of_the_transposed_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 48)
    m = torch.nn.Sequential(conv1d)
    reference = copy.deepcopy(m)
    subbyte.quantize_(m, bits=8, group_size=16)
    x = torch.randn(3, 48)
    assert isinstance(m[0], subbyte.nn.Linear) and m[0].weight.shape == (20, 48)
    torch.testing.assert_close(m(x), reference(x), atol=0.02, rtol=0.02)


def test_layers_with_a_forward_of_their_own_stay_and_the_report_says_why():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    m = torch.nn.Sequential(Scaled(8, 8), torch.nn.Embedding(4, 8, max_norm=1.0), torch.nn.Linear(8, 8))
    report = subbyte.quantize_(m, bits=4)
    assert len(report) == 1 and "forward of its own" in report.left["0"] and "max_norm" in report.left["1"]
    assert "already packed" not in str(report) and "left: 0" in str(report)


def test_multi_head_attention_runs_and_trains_on_packed_projections():
    m = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    reference = copy.deepcopy(m)
    subbyte.quantize_(m, bits=8, group_size=16)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(m(x), reference(x), atol=0.05, rtol=0.05)
    m(x).sum().backward()
    assert m.self_attn.out_proj.weight.grad is not None
    m.eval()
    with torch.inference_mode():
        torch.testing.assert_close(m(x), reference.eval()(x), atol=0.05, rtol=0.05)


def test_a_model_on_the_meta_device_can_be_packed_and_materialized():
    with torch.device("meta"):
        m = model()
    report = subbyte.quantize_(m, bits=4, group_size=16)
    assert m[1].weight.codes.is_meta and len(report) == 3
    full = model()
    subbyte.quantize_(full, bits=4, group_size=16)
    m.load_state_dict(full.state_dict(), assign=True)
    x = torch.randint(0, 30, (2, 2))
    assert torch.equal(m(x), full(x))


def test_a_deep_copied_model_is_independent_and_equal():
    m = Tied()
    subbyte.quantize_(m, bits=4, group_size=16)
    c = copy.deepcopy(m)
    x = torch.randint(0, 30, (2, 5))
    assert c.embed.weight is c.head.weight and torch.equal(c(x), m(x))
    with torch.no_grad():
        c.head.weight.mul_(2)
    assert not torch.equal(c(x), m(x))
