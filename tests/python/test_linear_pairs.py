"""quantize -> linear, linear_a8, linear_grad_input, dequantize, embedding against float64 of the dequantized weights.

The grid of formats, sizes, group sizes and types is far too large to run whole. Its cases here cover every pair of two factors'
values: a case is made by a seeded random choice among the candidates that bring most pairs that no earlier case had.
"""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight, functional

ops = torch.ops.subbyte
FACTORS = {
    "format": ["sign", "ternary", *(f"uint{b}" for b in range(2, 9)), "mixed"],
    "m": [0, 1, 2, 3, 7, 8, 17, 64, 333],
    "n": [1, 5, 64, 127, 576, 1536, 4097],
    "k": [1, 5, 64, 127, 576, 1536, 4097],
    "group_size": [16, 32, 64, 100, 128, -1],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "zero_kind": ["fixed", "zeros", "offsets"],
    "scale_dtype": [torch.float32, torch.float16, torch.bfloat16],
    "perm": [False, True],
    "bias": [False, True],
}
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
# Half of the smallest subnormal: what rounding to the type may add near zero.
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float64: 0.0}


def pair_covering_cases(seed=20, candidates=30):
    """Cases as dicts; every pair (factor a has value u, factor b has value v) is in one of them."""
    chosen = random.Random(seed)
    names = list(FACTORS)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(FACTORS[a]))
        for j in range(len(FACTORS[b]))
    }
    cases = []
    while missing:
        # A pair that is missing, and random values around it.
        first = chosen.choice(sorted(missing))
        drawn = [{**{n: chosen.randrange(len(FACTORS[n])) for n in names}, **dict(first)} for _ in range(candidates)]
        gain = lambda case: sum(pair in missing for pair in itertools.combinations(case.items(), 2))  # noqa: E731
        best = max(({n: case[n] for n in names} for case in drawn), key=gain)
        missing -= set(itertools.combinations(best.items(), 2))
        cases.append({n: FACTORS[n][i] for n, i in best.items()})
    return cases


CASES = pair_covering_cases()


def levels(name):
    return {"sign": 2, "ternary": 3}.get(name) or 2 ** int(name[4:])


def fixed_zero(name):
    return {"sign": 0.5, "ternary": 1.0}.get(name) or 2.0 ** (int(name[4:]) - 1)


def column_formats(weight):
    if "*" not in weight.format:
        return [weight.format] * weight.in_features
    segments = [segment.split("*") for segment in weight.format.split("+")]
    return [name for name, count in segments for _ in range(int(count))]


def mixed_format(k, group_size, seed):
    chosen, segments, left = random.Random(seed), [], k
    while left:
        count = left if len(segments) == 3 else min(left, group_size * chosen.choice([1, 2, 5]))
        segments.append(f"{chosen.choice(FACTORS['format'][:-1])}*{count}")
        left -= count
    return "+".join(segments)


class Parts:
    """Of a weight, in float64 and stored order: scale * (code - c) and the value at c, c the middle code; the stored offset."""

    def __init__(self, w):
        group = torch.arange(w.in_features) // w.group_size
        names = column_formats(w)
        codes = ops.unpack(w.codes, w.format, w.in_features).double()
        middle = torch.tensor([levels(name) // 2 for name in names], dtype=torch.float64)
        scale = w.scales.double()[:, group]
        self.offset = torch.zeros_like(scale) if w.offsets is None else w.offsets.double()[:, group]
        if w.offsets is not None:
            self.at_middle = scale * middle + self.offset
        else:
            zero = torch.tensor([fixed_zero(name) for name in names]) if w.zeros is None else w.zeros[:, group]
            self.at_middle = scale * (middle - zero.double())
        self.from_middle = scale * (codes - middle)

    def magnitudes(self, w):
        """What multiplies |x| in the bound of linear.h, in feature order."""
        stored = self.from_middle.abs() + self.at_middle.abs() + self.offset.abs()
        if w.perm is None:
            return stored
        out = torch.empty_like(stored)
        out[:, w.perm.long()] = stored
        return out


def hold(name, got, exact, bound):
    over = (got.double() - exact).abs() > bound
    over |= ~got.isfinite()
    assert got.shape == exact.shape and not over.any(), (
        f"{name}: {int(over.sum())} of {over.numel()} outside the bound, the first at {over.nonzero()[0].tolist()}: "
        f"{got[over][0].item()}, expected {exact[over][0].item()} +- {bound[over][0].item()}"
    )


def linear_bound(terms, magnitude, exact, dtype):
    accumulated = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    return accumulated * (min(terms, 512) + terms / 8 + 16) * magnitude + 1.01 * EPS[dtype] * exact.abs() + TINY[dtype]


def check_linear_a8(x, w, parts, bias, x_scale):
    k, dtype = w.in_features, x.dtype
    stored = x.float() if w.perm is None else x.float()[:, w.perm.long()]
    pieces = stored.split(w.group_size, 1) if x_scale == "row_group" and k else [stored]
    largest = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in pieces], 1) if k else stored
    # 127 / a as one division: torch's `127.0 / a` is a reciprocal and a product, and ties would round elsewhere.
    rounded = torch.where(largest > 0, torch.round(stored * (torch.full_like(largest, 127.0) / largest)), 0.0)
    xq = rounded.double() * (largest / 127.0).double()
    exact = xq @ (parts.from_middle + parts.at_middle).t() + (0 if bias is None else bias.double())
    magnitude = xq.abs() @ parts.from_middle.abs().t() + (0 if bias is None else bias.double().abs())
    for begin in range(0, k, w.group_size):
        sums = xq[:, begin : begin + w.group_size].sum(1, keepdim=True).abs()
        magnitude += sums * parts.at_middle[:, begin].abs()
    bound = 2.0**-24 * (2 * w.scales.shape[1] + 16) * magnitude + EPS[dtype] * exact.abs() + TINY[dtype]
    # float64 is refused for x; values of `at_middle` are formed in float32.
    bound += 2.0**-23 * (xq.abs() @ parts.at_middle.abs().t())
    hold(f"linear_a8 {x_scale}", functional.linear_a8(x, w, bias, x_scale), exact, bound)


def check_case(case, seed):
    g = torch.Generator().manual_seed(seed)
    m, n, k, dtype = case["m"], case["n"], case["k"], case["dtype"]
    group_size = k if case["group_size"] == -1 else case["group_size"]
    name = mixed_format(k, group_size, seed) if case["format"] == "mixed" else case["format"]
    symmetric = {"sym": True} if case["zero_kind"] == "fixed" else {"sym": False, "zero_kind": case["zero_kind"]}
    perm = torch.randperm(k, generator=g).int() if case["perm"] else None
    w = PackedWeight.from_float(
        torch.randn(n, k, generator=g),
        format=name,
        group_size=case["group_size"],
        scale_dtype=case["scale_dtype"],
        perm=perm,
        **symmetric,
    )
    parts = Parts(w)
    dense, magnitudes = w.dequantize(torch.float32).double(), parts.magnitudes(w)
    in_order = slice(None) if perm is None else perm.long()
    # The values themselves: two roundings of float32 away from the affine rule.
    exact = parts.from_middle + parts.at_middle
    hold("dequantize", dense[:, in_order], exact, 2.0**-22 * magnitudes[:, in_order])
    assert torch.equal(ops.pack(ops.unpack(w.codes, name, k), name), w.codes)

    x = torch.randn(m, k, generator=g).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype) if case["bias"] else None
    exact = x.double() @ dense.t() + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ magnitudes.t()
    if dtype == torch.float64 and bias is not None:
        magnitude += bias.double().abs()
    y = F.linear(x, w, bias)
    hold("linear", y, exact, linear_bound(k, magnitude, exact, dtype))
    layer = subbyte.nn.Linear.from_packed(w, bias)
    assert torch.equal(layer(x), y) and torch.equal(ops.linear(x, None, *w.packed_args, bias), y)

    gy = torch.randn(m, n, generator=g).to(dtype)
    exact = gy.double() @ dense
    hold(
        "linear_grad_input",
        ops.linear_grad_input(gy, *w.packed_args),
        exact,
        linear_bound(n, gy.double().abs() @ magnitudes, exact, dtype),
    )
    if dtype != torch.float64:
        for x_scale in ("row", "row_group"):
            check_linear_a8(x, w, parts, bias, x_scale)
    rows = torch.randint(0, n, (m,), generator=g)
    assert torch.equal(F.embedding(rows, w), w.dequantize()[rows])


def check_share(share, of):
    for i in range(share, len(CASES), of):
        case = dict(CASES[i])
        # Sizes that would take seconds in the reference: fewer rows, with the same kernels.
        if os.environ.get("SUBBYTE_FORCE_ISA") == "scalar" or case["dtype"] == torch.float64:
            while case["m"] * case["n"] * case["k"] > 3e6 and case["m"] > 2:
                case["m"] = max(2, case["m"] // 8)
            while case["m"] * case["n"] * case["k"] > 3e7:
                case["n"] = max(5, case["n"] // 8)
        try:
            check_case(case, seed=i)
        except Exception as error:
            raise AssertionError(f"case {i} {case}: {error}") from error


def test_every_pair_of_values_is_in_a_case():
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(str(case[a]), str(case[b])) for case in CASES}
        assert len(seen) == len(FACTORS[a]) * len(FACTORS[b]), (a, b)
    assert len(CASES) < 200


@pytest.mark.parametrize("share", range(4))
def test_every_pair_of_sizes_formats_and_types_keeps_the_stated_bounds(share):
    check_share(share, 4)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_pair_keeps_the_bounds_on_a_forced_instruction_set(isa):
    done = subprocess.run(
        [sys.executable, __file__, isa], capture_output=True, text=True, env={**os.environ, "SUBBYTE_FORCE_ISA": isa}
    )
    if f"SUBBYTE_FORCE_ISA={isa} is not available on this machine" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_share(0, 3)
