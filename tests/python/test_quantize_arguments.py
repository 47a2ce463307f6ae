"""quantize_ with arguments that are wrong: a ValueError that names argument and value, and a model that is as it was."""

import copy

import pytest
import torch

import subbyte
from subbyte import PackedWeight


def model():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.Conv1d(3, 4, 1))
    return torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 100), inner, torch.nn.Linear(64, 7))


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(), "give one of bits and format"),
        (dict(bits=4, format="uint4"), "give one of bits and format"),
        (dict(bits=9), "bits is 9"),
        (dict(bits="4"), "bits is '4'"),
        (dict(format=4), "format is 4"),
        (dict(format="int4"), "^format 'int4' is unknown, expected one of sign"),
        (dict(format="uint4*3"), "quantize_: 0: .*describes 3 columns, expected K = 64"),
        (dict(bits=4, group_size=0), "group_size is 0"),
        (dict(bits=4, group_size=2.5), "group_size is 2.5"),
        (dict(bits=4, group_size=2**63), "group_size is 9223372036854775808"),
        (dict(bits=4, sym="yes"), "sym is 'yes'"),
        (dict(bits=4, sym=1), "sym is 1"),
        (dict(bits=4, scheme="best"), "scheme 'best' is unknown"),
        (dict(bits=4, zero_kind="none"), "zero_kind 'none' is unknown"),
        (dict(bits=4, zero_kind="zeros", sym=True), "zero_kind is 'zeros' with sym=True"),
        (dict(bits=4, scale_dtype="float16"), "scale_dtype is 'float16'"),
        (dict(bits=4, scale_dtype=torch.float64), "scale_dtype is torch.float64"),
        (dict(bits=4, activation_bits=4), "activation_bits is 4"),
        (dict(bits=4, rounding="up"), "rounding is 'up'"),
        (dict(bits=4, seed="x"), "seed is 'x'"),
        (dict(bits=4, seed=2**64), "seed is 18446744073709551616"),
        (dict(bits=4, skip="1"), "skip is '1', expected a list"),
        (dict(bits=4, skip=5), "skip is 5, expected a list"),
        (dict(bits=4, skip=[3]), r"skip is \[3\], expected a list"),
        (dict(bits=4, skip=["head"]), "skip 'head' matches no layer"),
        (dict(bits=4, overrides=["1"]), r"overrides is \['1'\], expected a dict"),
        (dict(bits=4, overrides={"1": 3}), r"overrides\['1'\] is 3, expected a dict"),
        (dict(bits=4, overrides={"head": {}}), "overrides 'head' matches no layer"),
        (dict(bits=4, overrides={"1": {"bit": 3}}), "'bit' is unknown"),
        # Of a layer further on: the first ones are not packed either.
        (dict(bits=4, overrides={"3": {"group_size": 0}}), "quantize_: 3: group_size is 0"),
        (dict(bits=4, overrides={"3": {"scale_dtype": "f16"}}), "quantize_: 3: scale_dtype is 'f16'"),
        (dict(bits=4, overrides={"3": {"format": "uint8*10+uint4*10"}}), "quantize_: 3: .*describes 20 columns, expected K = 64"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_changes(options, says):
    given = model()
    before = copy.deepcopy(given)
    with pytest.raises(ValueError, match=says):
        subbyte.quantize_(given, progress=False, **options)
    assert [type(m) for m in given.modules()] == [type(m) for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), before.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(value):
    given = model()
    given[3].weight.data[2, 3] = value
    with pytest.raises(ValueError, match=rf"quantize_: 3: weight\[2, 3\] is {value}, expected finite values"):
        subbyte.quantize_(given, bits=4, progress=False)
    assert type(given[0]) is torch.nn.Embedding and type(given[1]) is torch.nn.Linear


def test_what_is_no_model_is_named():
    for given in (None, "model", torch.ones(3, 3), torch.nn.Linear):
        with pytest.raises(ValueError, match=f"model is of type {type(given).__name__}, expected a torch.nn.Module"):
            subbyte.quantize_(given, bits=4)


def test_a_layer_without_a_weight_yet_is_left_and_reported():
    given = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LazyLinear(5))
    report = subbyte.quantize_(given, bits=4, progress=False)
    assert len(report) == 1 and report.left == {"1": "its weight is not initialized yet"}
    assert given(torch.ones(2, 8)).shape == (2, 5)


def test_a_perm_that_is_no_permutation_is_refused():
    w = torch.randn(3, 8)
    perm = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="perm is no permutation of 0 .. 7"):
        PackedWeight.from_float(w, bits=4, perm=perm)
    good = PackedWeight.from_float(w, bits=4)
    with pytest.raises(ValueError, match="perm is no permutation of 0 .. 7"):
        PackedWeight(good.codes, good.scales, offsets=good.offsets, perm=perm, format="uint4", in_features=8, group_size=64)
