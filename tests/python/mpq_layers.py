"""State of layers in the original MPQ and MBWQ layouts, built from Python integers alone, with the weights that it stands for.

Nothing here calls the library: bits are placed one field at a time into Python integers, weights are formed in exact fractions.
"""

import random
from fractions import Fraction

import torch


def _signed(word):
    return word - 2**32 if word >= 2**31 else word


def _put(words, bit, width, value):
    """`width` bits of value at bit `bit` of a list of 32-bit words; a field may straddle two."""
    words[bit // 32] |= (value << (bit % 32)) & 0xFFFFFFFF
    if bit % 32 + width > 32:
        words[bit // 32 + 1] |= value >> (32 - bit % 32)


def column_words(codes, bits):
    """codes[k][n] -> int32 [ceil(K * bits / 32), N]."""
    k, n = len(codes), len(codes[0])
    columns = [[0] * (-(-k * bits // 32)) for _ in range(n)]
    for i, row in enumerate(codes):
        for j, code in enumerate(row):
            _put(columns[j], i * bits, bits, code)
    return torch.tensor([[_signed(columns[j][w]) for j in range(n)] for w in range(len(columns[0]))], dtype=torch.int32)


def row_words(fields, bits):
    """fields[g][n] -> int32 [Gr, ceil(N * bits / 32)]."""
    rows = []
    for row in fields:
        words = [0] * (-(-len(row) * bits // 32))
        for j, field in enumerate(row):
            _put(words, j * bits, bits, field)
        rows.append([_signed(w) for w in words])
    return torch.tensor(rows, dtype=torch.int32)


class Layer:
    """raw and prepared: state dicts; weight: float64 [K, N] in the order of input features; arguments of the constructor."""

    def __init__(self, weight, raw, prepared, **arguments):
        self.weight = torch.tensor([[float(v) for v in row] for row in weight], dtype=torch.float64)
        self.raw, self.prepared, self.arguments = raw, prepared, arguments


def _floats(values, dtype):
    """Exact in dtype, or the fixture is wrong."""
    exact = torch.tensor([[float(v) for v in row] for row in values], dtype=torch.float64)
    out = exact.to(dtype)
    assert torch.equal(out.double(), exact), "a fixture value is not exact in the layer's dtype"
    return out


def _second_level(rng, groups, n, dq, mode, levels, dtype, wide):
    """(codes [Gr][N], zeros tensor, scales tensor, values [Gr][N], fractions): value = (code - zero) * scale, exact in half."""
    blocks = -(-n // dq)
    rows, columns = (1, n) if mode == 1 else (groups, blocks)
    scale = [[Fraction(rng.choice([1, 2, 3]), 128 if not wide else 2048) for _ in range(columns)] for _ in range(rows)]
    zero = [[Fraction(-rng.choice([1, 2, 3])) for _ in range(columns)] for _ in range(rows)]
    codes = [[rng.randrange(levels) for _ in range(n)] for _ in range(groups)]
    at = (lambda t, g, j: t[0][j]) if mode == 1 else (lambda t, g, j: t[g][j // dq])
    values = [[(codes[g][j] - at(zero, g, j)) * at(scale, g, j) for j in range(n)] for g in range(groups)]
    return codes, _floats(zero, dtype).unsqueeze(-1), _floats(scale, dtype).unsqueeze(-1), values


def _blocked(codes, dq, dtype=torch.uint8):
    groups, n = len(codes), len(codes[0])
    blocks = -(-n // dq)
    out = torch.zeros(groups, blocks, dq, dtype=dtype)
    for g in range(groups):
        for j in range(n):
            out[g, j // dq, j % dq] = codes[g][j]
    return out


def mpq(
    bits, *, asym, gptq=False, k=96, n=40, group_size=32, dq=8, dq_mode=2, act_order=False, bias=False, dtype=torch.half, seed=0
):
    """An MPQLinear layer: GPTQ, GBA asymmetric or GBA symmetric."""
    rng = random.Random(1000 * bits + seed)
    groups = -(-k // group_size)
    g_idx = [i // group_size for i in range(k)]
    if act_order:
        rng.shuffle(g_idx)
    codes = [[rng.randrange(2**bits) for _ in range(n)] for _ in range(k)]
    state = {"qweight": column_words(codes, bits), "g_idx": torch.tensor(g_idx, dtype=torch.int32)}
    if bias:
        state["bias"] = torch.tensor([rng.randrange(-8, 8) / 8 for _ in range(n)], dtype=dtype)
    raw, prepared = dict(state), dict(state)
    per_word = 32 // bits if 32 % bits == 0 else 1
    raw["wf"] = torch.arange(0, per_word * bits, bits, dtype=torch.int32).unsqueeze(0)
    double = not gptq and group_size < 256
    fields = [[rng.randrange(2**bits) for _ in range(n)] for _ in range(groups)]  # z - 1
    plain = [[Fraction(rng.randrange(1, 64), 512) for _ in range(n)] for _ in range(groups)]
    if gptq or asym:
        if double:
            levels = 256 if bits == 8 else 200
            scode, s_zeros, s_scales, scales = _second_level(rng, groups, n, dq, dq_mode, levels, dtype, True)
            raw["qscales"] = _blocked(scode, dq) if bits == 4 else torch.tensor(scode, dtype=torch.uint8)
            raw["qscales_zeros"], raw["qscales_scales"] = s_zeros, s_scales
            raw["scales"], raw["zeros"] = torch.ones(groups, n, dtype=dtype), torch.zeros(groups, n, dtype=dtype)
        else:
            scales = plain
            raw["scales"] = _floats(scales, dtype)
            if not gptq:
                raw["zeros"] = torch.zeros(groups, n, dtype=dtype)
        raw["qzeros"] = prepared["qzeros"] = row_words(fields, bits)
        if not gptq:
            prepared["zeros"] = prepared["qzeros"]
        prepared["scales"] = _floats(scales, dtype)
        weight = [
            [scales[g_idx[i]][j] * (codes[i][j] - (fields[g_idx[i]][j] + 1)) for j in range(n)] for i in range(k)
        ]
    else:
        if double:
            scode, s_zeros, s_scales, scales = _second_level(rng, groups, n, dq, dq_mode, 16, dtype, False)
            zcode, z_zeros, z_scales, zeros = _second_level(rng, groups, n, dq, dq_mode, 16, dtype, False)
            raw["qstatistic"] = _blocked([[s << 4 | z for s, z in zip(a, b)] for a, b in zip(scode, zcode)], dq)
            raw["qscales_zeros"], raw["qscales_scales"] = s_zeros, s_scales
            raw["qzeros_zeros"], raw["qzeros_scales"] = z_zeros, z_scales
            raw["scales"], raw["zeros"] = torch.ones(groups, n, dtype=dtype), torch.zeros(groups, n, dtype=dtype)
        else:
            scales, zeros = plain, [[Fraction(rng.randrange(-64, 64), 64) for _ in range(n)] for _ in range(groups)]
            raw["scales"], raw["zeros"] = _floats(scales, dtype), _floats(zeros, dtype)
        prepared["scales"], prepared["zeros"] = _floats(scales, dtype), _floats(zeros, dtype)
        weight = [[codes[i][j] * scales[g_idx[i]][j] - zeros[g_idx[i]][j] for j in range(n)] for i in range(k)]
    return Layer(
        weight, raw, prepared, in_features=k, out_features=n, bits=bits, group_size=group_size, asym=asym,
        layout="gptq" if gptq else "gba", dq_group_size=dq, dq_mode=dq_mode, bias=bias,
    )  # fmt: skip


def mbwq(bits, *, k=128, n=40, group_size=32, permuted=True, seed=0, dtype=torch.half):
    """An MBWQLinear layer of one width."""
    rng = random.Random(2000 * bits + seed)
    groups = -(-k // group_size)
    codes = [[rng.randrange(2**bits) for _ in range(n)] for _ in range(k)]
    perm = rng.sample(range(k), k) if permuted else list(range(k))
    scales = [[Fraction(rng.randrange(1, 64), 512) for _ in range(n)] for _ in range(groups)]
    zeros = [[Fraction(rng.randrange(-64, 64), 64) for _ in range(n)] for _ in range(groups)]
    weight = [None] * k
    for i in range(k):
        g = i // group_size
        weight[perm[i]] = [codes[i][j] * scales[g][j] - zeros[g][j] for j in range(n)]
    state = {
        "qweight": column_words(codes, bits),
        "scales": _floats(scales, dtype),
        "zeros": _floats(zeros, dtype),
        "q_perm": torch.tensor(perm if permuted else [0] * k, dtype=torch.int16),
        "channel_scale": torch.tensor([rng.choice([0.5, 1.0, 2.0]) for _ in range(k)], dtype=dtype).view(1, 1, k),
    }
    raw = dict(state, g_idx=torch.tensor([i // group_size for i in range(k)], dtype=torch.int32))
    return Layer(
        weight, raw, state, in_features=k, out_features=n, bits=bits, group_size=group_size, layout="mbwq", asym=False
    )  # fmt: skip


def exl2(runs, *, n=40, seed=0, permuted=True, dtype=torch.half):
    """An MBWQLinear layer of mixed width. runs: (bits, rows) of each group, widths descending, rows multiples of 32."""
    rng = random.Random(3000 + seed)
    k = sum(rows for _, rows in runs)
    perm = rng.sample(range(k), k) if permuted else list(range(k))
    scales = [[Fraction(rng.randrange(1, 64), 512) for _ in range(n)] for _ in runs]
    zeros = [[Fraction(rng.randrange(-64, 64), 64) for _ in range(n)] for _ in runs]
    weight, pieces, q_groups, first, row = [None] * k, [], [], 0, 0
    for g, (bits, rows) in enumerate(runs):
        codes = [[rng.randrange(2**bits) for _ in range(n)] for _ in range(rows)]
        for i in range(rows):
            weight[perm[row + i]] = [codes[i][j] * scales[g][j] - zeros[g][j] for j in range(n)]
        words = column_words(codes, bits)
        q_groups += [bits, first]
        first += words.shape[0]
        row += rows
        pieces.append(words)
    state = {
        "qweight": torch.cat(pieces),
        "q_groups": torch.tensor(q_groups, dtype=torch.int16),
        "scales": _floats(scales, dtype),
        "zeros": _floats(zeros, dtype),
        "q_perm": torch.tensor(perm if permuted else [0] * k, dtype=torch.int16),
        "channel_scale": torch.tensor([rng.choice([0.5, 1.0, 2.0]) for _ in range(k)], dtype=dtype).view(1, 1, k),
    }
    raw = dict(state, g_idx=torch.zeros(k, dtype=torch.int32))
    return Layer(weight, raw, state, in_features=k, out_features=n, bits=4, group_size=-1, layout="exl2", asym=False)
