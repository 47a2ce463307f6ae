"""Foreign layouts of sign and 4-bit weights (SEED_API section 3) against transcriptions of their rules on Python integers."""

import pytest
import torch

import subbyte.functional as F

SIZES = [(8, 128), (16, 256), (32, 96), (40, 64), (5, 24), (33, 40), (1, 8), (0, 8)]


def signs(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n, k), generator=g).tolist()


def bytes_of(places, size):
    """places: (byte, bit, value) of every element."""
    out = [0] * size
    for byte, bit, value in places:
        if byte < size:
            out[byte] |= value << bit
    return out


def pack8(w, n, k):
    return bytes_of([(r * -(-k // 8) + c // 8, c % 8, w[r][c]) for r in range(n) for c in range(k)], n * -(-k // 8))


def cpp_col(w, n, k):
    return bytes_of([(y * n + x, i, w[x][8 * y + i]) for y in range(k // 8) for x in range(n) for i in range(8)], n * k // 8)


def bstc(w, n, k):
    wide, words = 32 * -(-n // 32), {}
    for c in range(n):
        for r in range(k):
            at = (r // 32) * wide + c
            words[at] = words.get(at, 0) | w[c][r] << (31 - r % 32)
    out = []
    for at in range(-(-k // 32) * wide):
        out += list(words.get(at, 0).to_bytes(4, "big"))
    return out


def btc(w, n, k):
    out = [0] * (n * k // 8)
    for r in range(n):
        for c in range(k):
            tile = r // 8 * (k // 128) + c // 128
            out[(tile * 8 + r % 8) * 16 + c % 128 // 8] |= w[r][c] << (7 - c % 8)
    return out


def conv_cpp(w, n, k):
    flat = [bit for row in w for bit in row]
    return bytes_of([(i // 8, i % 8, bit) for i, bit in enumerate(flat)], -(-len(flat) // 8))


def sign_rows(w, n, k):
    return torch.tensor(pack8(w, n, k), dtype=torch.uint8).reshape(n, -(-k // 8))


ORACLES = {"pack8": pack8, "cpp_col": cpp_col, "bstc": bstc, "btc": btc, "conv_cpp": conv_cpp, "conv_cutlass": conv_cpp}


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("layout", ORACLES)
def test_binary_layout_equals_the_written_rule(layout, n, k):
    if layout == "btc" and (n % 8 or k % 128):
        with pytest.raises(ValueError, match="btc holds"):
            F.binary_layout(sign_rows(signs(n, k), n, k), "sign", "btc", n, k)
        return
    w = signs(n, k, seed=n + k)
    rows = sign_rows(w, n, k)
    there = F.binary_layout(rows, "sign", layout, n, k)
    assert there.flatten().tolist() == ORACLES[layout](w, n, k)
    back = F.binary_layout(there, layout, "sign", n, k)
    assert torch.equal(back, rows) and back.shape == rows.shape


def test_pack8_of_a_float_matrix_is_the_canonical_sign_format():
    w = torch.randn(6, 24)
    codes = torch.ops.subbyte.pack((w >= 0).to(torch.uint8), "sign")
    assert codes.flatten().tolist() == pack8((w >= 0).int().tolist(), 6, 24)


def test_B4_bstc_packs_every_weight_and_a_truncated_file_says_what_it_lacks():
    n, k = 40, 64
    w = signs(n, k, seed=4)
    rows = sign_rows(w, n, k)
    full = F.binary_layout(rows, "sign", "bstc", n, k)
    assert torch.equal(F.binary_layout(full, "bstc", "sign", n, k), rows)
    cut = torch.tensor(bstc(w, n, k)[: n * k // 8], dtype=torch.uint8)
    assert torch.equal(F.binary_layout(rows, "sign", "bstc_truncated", n, k), cut)
    with pytest.raises(ValueError, match="lacks 768 elements"):
        F.binary_layout(cut, "bstc_truncated", "sign", n, k)
    read = F.binary_layout(cut, "bstc_truncated", "sign", n, k, missing=1)
    known = torch.tensor([[r // 32 * 64 + c < 80 for r in range(k)] for c in range(n)])
    bits = torch.ops.subbyte.unpack(read, "sign", k)
    assert torch.equal(bits[known], torch.tensor(w, dtype=torch.uint8)[known]) and bits[~known].all()


@pytest.mark.parametrize("n, k", [(3, 8), (2, 5), (1, 1), (0, 4)])
def test_q4_holds_the_even_element_in_the_high_nibble(n, k):
    g = torch.Generator().manual_seed(k)
    v = torch.randint(-8, 8, (n, k), generator=g)
    canonical = torch.ops.subbyte.pack((v + 8).to(torch.uint8), "uint4")
    wanted = []
    for row in v.tolist():
        row = row + [0] * (k % 2)
        wanted += [(row[i] & 15) << 4 | row[i + 1] & 15 for i in range(0, len(row), 2)]
    q4 = F.nibble_layout(canonical, "uint4", "q4", n, k)
    assert q4.flatten().tolist() == wanted
    assert torch.equal(F.nibble_layout(q4.view(torch.int8), "q4", "uint4", n, k), canonical)
    flat = [x for row in v.tolist() for x in row]
    flat += [0] * (len(flat) % 2)
    stream = [(flat[i] & 15) << 4 | flat[i + 1] & 15 for i in range(0, len(flat), 2)]
    conv = F.nibble_layout(canonical, "uint4", "q4_conv", n, k)
    assert conv.tolist() == stream
    assert torch.equal(F.nibble_layout(conv, "q4_conv", "uint4", n, k), canonical)


def test_layouts_refuse_what_they_cannot_mean():
    rows = torch.zeros(8, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected one of"):
        F.binary_layout(rows, "sign", "q4", 8, 128)
    with pytest.raises(ValueError, match="codes has 128 bytes, expected 64"):
        F.binary_layout(rows, "sign", "btc", 8, 64)
    with pytest.raises(ValueError, match="uint8 or int8"):
        F.binary_layout(rows.float(), "sign", "btc", 8, 128)
    with pytest.raises(ValueError, match="bits an element"):
        torch.ops.subbyte.relayout(rows, "sign", "uint4", 8, 128)
    with pytest.raises(ValueError, match="missing is 3"):
        F.binary_layout(rows, "sign", "btc", 8, 128, missing=3)


def test_relayout_passes_opcheck():
    rows = sign_rows(signs(8, 128), 8, 128)
    torch.library.opcheck(torch.ops.subbyte.relayout.default, (rows, "sign", "btc", 8, 128))
