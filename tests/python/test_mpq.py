"""subbyte.mpq: the original layouts become packed weights and come back byte for byte."""

from types import SimpleNamespace

import pytest
import torch

import subbyte
from mpq_layers import column_words, exl2, mbwq, mpq, row_words
from subbyte import mpq as M

RUNS = [(8, 32), (6, 64), (5, 32), (4, 128), (4, 96), (3, 32), (2, 64)]


def parameter(layer, device="cpu"):
    """The attributes of an MPQWeightParameter for a prepared layer."""
    state, a = {k: v.to(device) for k, v in layer.prepared.items()}, layer.arguments
    p = SimpleNamespace(
        data=state["qweight"],
        scales=state["scales"],
        zeros=state["qzeros"] if a["asym"] else state["zeros"],
        g_idx=state.get("g_idx"),
        w_bit=a["bits"],
        asym=a["asym"],
        group_size=a["group_size"],
        layer_type=1 if a["layout"] in ("gptq", "gba") else 2,
        q_perm=state.get("q_perm"),
        q_group_map=None,
        rows=None,
    )
    if "q_groups" in state:
        p.q_group_map = M.make_group_map(state["q_groups"], state["qweight"].shape[0])
        weight, _ = M.exl2_import(
            state["qweight"], state["q_groups"], state["scales"], state["zeros"], in_features=a["in_features"]
        )
        p.rows = M.rows_of_format(weight.format, a["in_features"])
    return p


LAYERS = {
    **{f"gptq-{b}": (lambda b=b: mpq(b, asym=True, gptq=True)) for b in (1, 2, 3, 4, 8)},
    **{f"gptq-act-order-{b}": (lambda b=b: mpq(b, asym=True, gptq=True, act_order=True)) for b in (2, 4)},
    **{f"asym-{b}": (lambda b=b: mpq(b, asym=True)) for b in (1, 2, 4, 8)},
    **{f"sym-{b}": (lambda b=b: mpq(b, asym=False)) for b in (1, 2, 4, 8)},
    "sym-act-order": lambda: mpq(4, asym=False, act_order=True),
    "sym-odd": lambda: mpq(4, asym=False, k=93, n=37, group_size=20),
    "asym-odd": lambda: mpq(4, asym=True, k=93, n=37, group_size=20),
    **{f"mbwq-{b}": (lambda b=b: mbwq(b)) for b in (2, 4)},
    "mbwq-identity": lambda: mbwq(4, permuted=False),
    "exl2": lambda: exl2(RUNS),
    "exl2-two": lambda: exl2([(4, 64), (2, 64)], permuted=False),
}


def exact(weight):
    """float64 [K, N] of a PackedWeight whose values are exact in float32."""
    return weight.dequantize(torch.float32).double().t().cpu()


@pytest.mark.parametrize("name", LAYERS)
def test_M1_every_layer_type_unpacks_to_its_formula(name, device):
    layer = LAYERS[name]()
    p = parameter(layer, device)
    assert torch.equal(exact(M.import_parameter(p).weight), layer.weight)
    unpacked = M.unpack_qweight(p)
    assert unpacked.shape == layer.weight.shape and unpacked.dtype == p.scales.dtype and unpacked.device == p.data.device
    assert torch.equal(unpacked.cpu(), layer.weight.to(p.scales.dtype))
    weights, zeros = M.gptq_style_unpacking(p)
    assert torch.equal(weights, unpacked)
    if p.asym:
        fields = layer.prepared["qzeros"]
        wanted = [[z + 1 for z in row] for row in _fields(fields, p.w_bit, layer.weight.shape[1])]
        assert zeros.dtype == torch.int32 and zeros.tolist() == wanted
    elif p.g_idx is None and p.q_group_map is None:
        assert torch.equal(zeros.cpu(), layer.prepared["zeros"].repeat_interleave(p.group_size, 0)[: len(layer.weight)])


def _fields(words, bits, n):
    out = []
    for row in words.tolist():
        stream = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(row))
        out.append([stream >> (bits * j) & (2**bits - 1) for j in range(n)])
    return out


@pytest.mark.parametrize("name", LAYERS)
def test_packing_the_unpacked_weight_gives_the_same_words(name, device):
    p = parameter(LAYERS[name](), device)
    dense = M.import_parameter(p).weight.dequantize(torch.float32).t()
    assert torch.equal(M.pack_fp_weight(dense, p), p.data)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("gptq")])
def test_gptq_export_inverts_import(name, device):
    layer = LAYERS[name]()
    s, a = {k: v.to(device) for k, v in layer.prepared.items()}, layer.arguments
    weight, parent = M.gptq_import(
        s["qweight"].long(), s["scales"], bits=a["bits"], in_features=a["in_features"], qzeros=s["qzeros"], g_idx=s["g_idx"]
    )
    out = M.gptq_export(weight, bits=a["bits"], parent=parent)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(getattr(out, name), s[name]) and getattr(out, name).dtype == s[name].dtype, name


def test_gptq_v2_zeros_hold_z_itself():
    fields = [[0, 3, 15, 7] * 5, [1, 2, 8, 9] * 5]
    packed = row_words(fields, 4)
    assert M.unpack_zeros(packed, 4, 20, v2=True).tolist() == fields
    assert torch.equal(M.pack_zeros(torch.tensor(fields), 4, v2=True), packed)
    weight, _ = M.gptq_import(
        torch.zeros(8, 20, dtype=torch.int32), torch.ones(2, 20), bits=4, in_features=64, qzeros=packed, v2=True
    )
    assert weight.zeros.t().tolist() == fields


def test_exl2_export_inverts_import(device):
    layer = exl2(RUNS)
    s = {k: v.to(device) for k, v in layer.prepared.items()}
    weight, parent = M.exl2_import(s["qweight"], s["q_groups"], s["scales"], s["zeros"], s["q_perm"], in_features=448)
    assert weight.format == "uint8*32+uint6*64+uint5*32+uint4*224+uint3*32+uint2*64"
    assert weight.group_size == 32 and parent.tolist() == [0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 5, 6, 6]
    assert torch.equal(exact(weight), layer.weight)
    out = M.exl2_export(weight, parent=parent)
    for name in ("qweight", "q_groups", "scales", "zeros"):
        assert torch.equal(getattr(out, name), s[name]) and getattr(out, name).dtype == s[name].dtype, name
    assert torch.equal(out.q_perm, s["q_perm"].int())


def test_make_group_map_counts_down_in_every_group(device):
    q_groups = torch.tensor([8, 0, 4, 8, 3, 16], dtype=torch.int16, device=device)
    wanted = [v for g, rows in enumerate((32, 64, 32)) for left in range(rows, 0, -1) for v in (g, left)]
    found = M.make_group_map(q_groups, 19)
    assert found.dtype == torch.int16 and found.device.type == device and found.tolist() == wanted
    assert M.rows_of_format("uint8*32+uint4*64+uint3*32", 128) == [32, 32, 32, 96, 128, 128, 0b10001100]
    with pytest.raises(ValueError, match="whole number of codes"):
        M.make_group_map(torch.tensor([3, 0, 2, 1]), 4)
    with pytest.raises(ValueError, match="expected 1 to 8 bits"):
        M.make_group_map(torch.tensor([0, 0, 0, 0]), 4)


def test_an_irregular_g_idx_is_cut_into_pieces_that_share_a_scale(device):
    # Groups of 5, 11 and 4 rows in any order, and group 1 without any: no common length but 1.
    g_idx = torch.tensor([0] * 5 + [2] * 11 + [3] * 4)[torch.randperm(20)].to(device)
    codes = torch.randint(0, 16, (20, 6))
    qweight, scales = column_words(codes.tolist(), 4).to(device), torch.rand(4, 6).to(device) + 0.5
    zeros = torch.randint(1, 17, (4, 6)).to(device)
    weight, parent = M.gptq_import(
        qweight, scales, bits=4, in_features=20, qzeros=M.pack_zeros(zeros, 4), g_idx=g_idx, group_size=8
    )
    wanted = scales[g_idx] * (codes.to(device) - zeros[g_idx])
    assert torch.equal(weight.dequantize().t(), wanted)
    assert weight.group_size == 1 and parent.numel() == 20
    out = M.gptq_export(weight, bits=4, parent=parent, groups=4)
    assert torch.equal(out.qweight, qweight) and torch.equal(out.g_idx, g_idx.int())
    assert torch.equal(out.scales[[0, 2, 3]], scales[[0, 2, 3]]) and torch.equal(out.scales[1], torch.ones(6, device=device))
    assert torch.equal(M.unpack_zeros(out.qzeros, 4, 6)[[0, 2, 3]], zeros[[0, 2, 3]].int())


def test_M9_a_permutation_beyond_int16_is_read_back_from_its_overflow():
    k = 40000
    perm = torch.randperm(k)
    codes = torch.randint(0, 4, (k, 2))
    words = torch.zeros(k // 16, 2, dtype=torch.int64)
    for i in range(16):
        words |= codes[i::16] << (2 * i)
    weight, _ = M.gptq_import(
        words, torch.ones(k // 32, 2), bits=2, in_features=k, zeros=torch.zeros(k // 32, 2), q_perm=perm.to(torch.int16),
        group_size=32,
    )  # fmt: skip
    assert weight.perm.dtype == torch.int32 and torch.equal(weight.perm.long(), perm)
    dense = torch.empty(k, 2)
    dense[perm] = codes.float()
    assert torch.equal(weight.dequantize().t(), dense)


def test_M3_zeros_are_rounded_not_truncated():
    zeros = torch.tensor([[7.9999, 8.5, 1.2, 16.0]])
    assert M.unpack_zeros(M.pack_zeros(zeros, 4), 4, 4).tolist() == [[8, 8, 1, 16]]
    with pytest.raises(ValueError, match="say \\[1, 16\\]"):
        M.pack_zeros(torch.tensor([[0.0]]), 4)
    assert M.unpack_zeros(M.pack_zeros(torch.tensor([[0.0]]), 4, wrap=True), 4, 1).tolist() == [[16]]
    with pytest.raises(ValueError, match="NaN"):
        M.pack_zeros(torch.tensor([[float("nan")]]), 4)


def test_M7_zeros_of_any_number_of_columns_are_packed_whole():
    for n in (1, 7, 31, 33, 45):
        for bits in (1, 2, 3, 4, 8):
            fields = [[(5 * i + g) % 2**bits for i in range(n)] for g in range(3)]
            packed = row_words(fields, bits)
            assert M.unpack_zeros(packed, bits, n).tolist() == [[f + 1 for f in row] for row in fields]
            assert torch.equal(M.pack_zeros(torch.tensor(fields) + 1, bits), packed)


def test_pack_fp_weight_takes_other_zeros_and_clamps():
    layer = mpq(4, asym=True, gptq=True)
    p = parameter(layer)
    weight, zeros = M.gptq_style_unpacking(p)
    moved = zeros + 1
    g = p.g_idx.long()
    wanted = (layer.weight / p.scales.double()[g] + moved.double()[g]).round().clamp(0, 15).long()
    assert torch.equal(M.pack_fp_weight(weight.float(), p, moved), column_words(wanted.tolist(), 4))
    far = M.pack_fp_weight(torch.full((96, 40), 1e6), p)
    assert torch.equal(far, torch.full_like(far, -1))
    layer = mpq(4, asym=False)
    p = parameter(layer)
    zeros = p.zeros + 0.5
    wanted = ((layer.weight + zeros.double()[p.g_idx.long()]) / p.scales.double()[p.g_idx.long()]).float().round().clamp(0, 15)
    assert torch.equal(M.pack_fp_weight(layer.weight.float(), p, zeros), column_words(wanted.long().tolist(), 4))


# ---- second level


@pytest.mark.parametrize("dq,n", [(8, 40), (16, 40), (40, 40), (1, 12), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32])
def test_second_level_is_expanded_by_its_formula_and_written_back(dq, n, dtype, device):
    groups, blocks = 3, -(-n // dq)
    codes = torch.randint(0, 16, (groups, blocks, dq), dtype=torch.uint8)
    codes.view(groups, -1)[:, n:] = 0
    zeros, scales = torch.randn(groups, blocks, 1).to(dtype), torch.rand(groups, blocks, 1).to(dtype) + 0.1
    codes, zeros, scales = codes.to(device), zeros.to(device), scales.to(device)
    values = M.expand_second_level(codes, zeros, scales, n, dq)
    wanted = ((codes.to(dtype) - zeros) * scales).reshape(groups, -1)[:, :n]
    assert torch.equal(values, wanted) and values.dtype == dtype
    again = M.requantize_second_level(values, 16, dq, kept=(zeros, scales))
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, zeros, scales)))
    # One block that moved gets a range of its own; the others keep theirs.
    moved = values.clone()
    moved[1, 0] += 1
    codes2, zeros2, scales2 = M.requantize_second_level(moved, 16, dq, kept=(zeros, scales))
    assert torch.equal(codes2[0], codes[0]) and torch.equal(scales2[2], scales[2])
    error = (M.expand_second_level(codes2, zeros2, scales2, n, dq) - moved).abs().float()
    span = moved.float().max() - moved.float().min()
    assert error.max() <= 0.55 * span / 15 + 4 * torch.finfo(dtype).eps * moved.abs().max()
    assert torch.equal(M.requantize_second_level(values, 256, dq)[0].view(groups, -1)[:, n:], codes.view(groups, -1)[:, n:])


def test_second_level_by_column_and_of_equal_values():
    codes = torch.randint(0, 256, (4, 12), dtype=torch.uint8)
    zeros, scales = torch.randn(1, 12, 1), torch.rand(1, 12, 1) + 0.1
    values = M.expand_second_level(codes, zeros, scales, 12, 1)
    assert torch.equal(values, (codes.float() - zeros.view(1, 12)) * scales.view(1, 12))
    again = M.requantize_second_level(values, 256, 1, per_column=True, kept=(zeros, scales))
    assert torch.equal(again[0].view(4, 12), codes) and torch.equal(again[1], zeros) and again[2].shape == (1, 12, 1)
    for value in (0.0, -0.375, 3.0):
        same = torch.full((2, 10), value)
        assert torch.equal(M.expand_second_level(*M.requantize_second_level(same, 16, 4), 10, 4), same)


def test_statistic_bytes_hold_the_scale_code_above():
    byte = torch.arange(256, dtype=torch.uint8).view(4, 8, 8)
    scale, zero = M.unpack_statistic(byte)
    assert scale.flatten().tolist() == [v >> 4 for v in range(256)] and zero.flatten().tolist() == [v & 15 for v in range(256)]
    assert torch.equal(M.pack_statistic(scale, zero), byte)
    with pytest.raises(ValueError, match="exceeds 15"):
        M.pack_statistic(scale + 16, zero)


# ---- errors and edges


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(lr=-1.0), "lr is -1.0"),
        (dict(lr=float("nan")), "lr is nan, expected a number of at least 0"),
        (dict(lr=float("inf")), "lr is inf"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1"),
        (dict(zeros_every=-1), "zeros_every is -1"),
        (dict(step=0), "step is 0"),
    ],
)
def test_numbers_that_mean_no_step_are_refused_before_the_moments_move(options, message):
    weight = subbyte.PackedWeight.from_float(torch.randn(4, 8), bits=4, group_size=8)
    m, v, before = torch.zeros(4, 8), torch.zeros(4, 8), weight.codes.clone()
    with pytest.raises(ValueError, match=f"mpq_update_: {message}"):
        M.mpq_update_(weight, torch.ones(4, 8), m, v, **{"step": 1, **options})
    assert torch.equal(weight.codes, before) and not m.any() and not v.any()


def test_bad_input_is_refused_by_name():
    words, scales = torch.zeros(8, 4, dtype=torch.int32), torch.ones(2, 4)
    good = dict(bits=4, in_features=64)
    with pytest.raises(ValueError, match="scales has a NaN"):
        M.gptq_import(words, scales * float("nan"), **good)
    with pytest.raises(ValueError, match="zeros has a NaN"):
        M.gptq_import(words, scales, zeros=scales / 0, **good)
    with pytest.raises(ValueError, match="words is"):
        M.gptq_import(words[:7], scales, **good)
    with pytest.raises(ValueError, match="qweight is"):
        M.gptq_import(words.float(), scales, **good)
    with pytest.raises(ValueError, match="belongs to group 2"):
        M.gptq_import(words, scales, g_idx=torch.full((64,), 2), **good)
    with pytest.raises(ValueError, match="q_perm\\[1\\] is 5"):
        M.gptq_import(words, scales, zeros=scales, q_perm=torch.full((64,), 5), **good)
    with pytest.raises(ValueError, match="bits is 9"):
        M.gptq_import(words, scales, bits=9, in_features=64)
    with pytest.raises(ValueError, match="qzeros is"):
        M.gptq_import(words, scales, qzeros=torch.zeros(2, 2, dtype=torch.int32), **good)
    with pytest.raises(ValueError, match="layer_type"):
        M.unpack_qweight(SimpleNamespace(data=words, scales=scales, zeros=scales, w_bit=4))
    with pytest.raises(NotImplementedError, match="layer_type is 3"):
        M.unpack_qweight(SimpleNamespace(data=words, scales=scales, zeros=scales, w_bit=4, layer_type=3))
    with pytest.raises(ValueError, match="fractions"):
        M.gptq_export(subbyte.PackedWeight.from_float(torch.randn(4, 64), bits=1), bits=1)
    with pytest.raises(ValueError, match="offsets"):
        M.gptq_export(subbyte.PackedWeight.from_float(torch.randn(4, 64), bits=4), bits=4)


def test_empty_matrices_convert(device):
    for k, n in ((0, 5), (64, 0), (0, 0)):
        words = torch.zeros(k // 8, n, dtype=torch.int32, device=device)
        weight, parent = M.gptq_import(words, torch.ones(k // 32, n, device=device), bits=4, in_features=k, group_size=32)
        assert list(weight.shape) == [n, k]
        assert M.export(weight, asym=True, parent=parent, groups=k // 32).qweight.shape == words.shape
