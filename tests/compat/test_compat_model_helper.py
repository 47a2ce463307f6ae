"""bitorch_engine.utils.model_helper and convert, the part that concerns shapes and plain tensors."""

import importlib

import pytest
import torch


def helper():
    import bitorch_engine.utils.model_helper as module

    return module


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 0, 5)])
def test_flatten_and_unflatten_are_inverse(shape):
    x = torch.randn(shape)
    flat, leading = helper().flatten_x(x)
    assert flat.dim() == 2 and flat.shape[-1] == 5 and leading == list(shape[:-1])
    assert torch.equal(helper().unflatten_x(flat, leading), x)


def test_X9_flatten_takes_any_strides():
    x = torch.randn(4, 3, 5).transpose(0, 1)
    flat, leading = helper().flatten_x(x)
    assert leading == [3, 4] and torch.equal(flat, x.reshape(12, 5))


def test_pad_embedding_dim_pads_with_minus_one_and_keeps_the_dtype():
    w = torch.randn(3, 10).half()
    padded = helper().pad_embedding_dim(w)
    assert padded.shape == (3, 16) and padded.dtype == torch.half
    assert torch.equal(padded[:, :10], w) and (padded[:, 10:] == -1).all()
    assert helper().pad_embedding_dim(padded) is padded
    assert helper().pad_embedding_dim(torch.zeros(2, 3, 10)).shape == (2, 3, 16)
    packed = torch.randint(0, 256, (2, 16, 4), dtype=torch.uint8)
    assert helper().pad_embedding_dim(packed) is packed


@pytest.mark.parametrize("m, k", [(128, 256), (1, 1), (130, 127)])
def test_pad_last_2_dims(m, k):
    x = torch.randn(2, m, k)
    padded, rows = helper().pad_last_2_dims_to_multiple_of_128(x)
    assert padded.shape[-2] % 128 == padded.shape[-1] % 128 == 0 and rows == -m % 128
    assert torch.equal(padded[:, :m, :k], x) and padded.count_nonzero() == x.count_nonzero()


def test_B6_binary_matmul_post_processing_uses_the_unpadded_k():
    x, y = torch.randn(3, 5, 20), torch.randn(3, 7, 20)
    a, x_pad = helper().pad_last_2_dims_to_multiple_of_128(torch.where(x >= 0, 1.0, -1.0))
    b, y_pad = helper().pad_last_2_dims_to_multiple_of_128(torch.where(y >= 0, 1.0, -1.0))
    popcount = ((a.unsqueeze(-2) * b.unsqueeze(-3)) < 0).sum(-1)
    result = helper().binary_matmul_forward_post_processing(popcount, [3], x_pad, y_pad, 20)
    assert torch.equal(result.float(), torch.where(x >= 0, 1.0, -1.0) @ torch.where(y >= 0, 1.0, -1.0).mT)


def test_B3_init_weight_takes_the_largest_absolute_value():
    w = torch.tensor([[-5.0, 1.0, 2.0, 2.0]])
    parameter, scale = helper().init_weight(w)
    assert scale == w.abs().mean() and parameter.dtype == torch.int8
    assert parameter.tolist() == [[-127, 25, 51, 51]]


def test_init_weight_has_no_zero():
    parameter, scale = helper().init_weight(torch.tensor([[1.0, -1.0, 0.0, 1e-4, -1e-4]]))
    assert parameter.tolist() == [[127, -127, 1, 1, -1]]
    zeros, scale = helper().init_weight(torch.zeros(2, 3))
    assert torch.equal(zeros, torch.ones(2, 3, dtype=torch.int8)) and scale == 0


def test_collect_and_replace_layers():
    from bitorch_engine.utils.convert import collect_layers, replace_layers

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 4)))
    found = collect_layers(model)
    assert list(found) == ["0", "1.1"] and found["1.1"] is model[1][1]
    assert list(collect_layers(model, [torch.nn.ReLU])) == ["1.0"]
    replaced = replace_layers(
        model, found, torch.nn.Bilinear, lambda linear: torch.nn.Bilinear(3, 3, linear.out_features + 1), parent_name=""
    )
    assert replaced == [model[0], model[1][1]] and [layer.out_features for layer in replaced] == [4, 5]
    assert replace_layers(model, found, torch.nn.Bilinear, lambda layer: layer) == []
    assert replace_layers(
        model, names_to_replace=["x.1.0"], class_=torch.nn.Tanh, replace_fn=lambda _: torch.nn.Tanh(), parent_name="x"
    )
    assert isinstance(model[1][0], torch.nn.Tanh)
    with pytest.raises(ValueError, match="made a ReLU of 1.0, expected a Linear"):
        replace_layers(model, ["1.0"], torch.nn.Linear, lambda _: torch.nn.ReLU())


@pytest.mark.parametrize(
    "kind, path",
    [("mpq_linear_cuda", "nbit.cuda"), ("q4_linear_cutlass", "nbit.cutlass"), ("binary_linear_cuda", "binary.cuda")],
)
def test_quantize_linear_gives_the_list_of_new_layers(kind, path):
    convert = importlib.import_module("bitorch_engine.utils.convert")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)))
    chosen = {"at." + name: layer for name, layer in convert.collect_layers(model).items()}
    layers = getattr(convert, "quantize_linear_with_" + kind)(model, names_to_replace=chosen, parent_name="at")
    assert layers == [model[0], model[1][0]]
    (name,) = {type(layer).__name__ for layer in layers}
    assert getattr(importlib.import_module("bitorch_engine.layers.qlinear." + path), name) is type(layers[0])


def test_get_mpq_config():
    from bitorch_engine.utils.convert import get_mpq_config

    expected = {"w_bit": 2, "group_size": 32, "dq_group_size": 32, "dq_mode": 2, "use_gba_quant": True, "asym": False}
    assert get_mpq_config() == expected
    assert {s: (get_mpq_config(s)["w_bit"], get_mpq_config(s)["group_size"]) for s in ("2-8-32", "4-128-256", "8-128-256")} == {
        "2-8-32": (2, 8),
        "4-128-256": (4, 128),
        "8-128-256": (8, 128),
    }
    with pytest.raises(AssertionError, match="3-1-1"):
        get_mpq_config("3-1-1")


def test_checkpoints_of_plain_models_round_trip_and_report_mismatches(tmp_path):
    for name in ("model.pt", "model.safetensors"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        helper().save_checkpoint(model, tmp_path / name)
        other = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        helper().load_checkpoint(other, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        smaller = torch.nn.Sequential(torch.nn.Linear(2, 3))
        with pytest.raises(RuntimeError, match="1.running_mean"):
            helper().load_checkpoint(smaller, tmp_path / name)
        with pytest.warns(UserWarning, match="1.running_mean"):
            result = helper().load_checkpoint(smaller, tmp_path / name, strict=False)
        assert "1.weight" in result.unexpected_keys
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]


def test_load_checkpoint_does_not_unpickle_objects(tmp_path):
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        helper().load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "evil.pt")
