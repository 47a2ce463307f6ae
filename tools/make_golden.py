#!/usr/bin/env python3
"""Writes testdata/golden/*.txt: what packed bytes, dequantized values and rounded codes must be.

Independent of the product on purpose: Python integers and fractions only, no import of ours, no float arithmetic, no numpy.
The definitions are the ones of docs/formats.md and subbyte/ops/quantize/quantize.h, written a second time in another style
(big integers for bit streams, exact fractions rounded by hand for floats), so that a mistake has to be made twice to pass.

  make_golden.py            writes the files
  make_golden.py --check    regenerates in memory and fails when a file differs, is missing or is not ours

File format: lines of "key value ...", '#' starts a comment. A case runs from "case NAME" to "end".
  layout      row layout string            n, k, group   sizes             zero_kind  fixed, zeros or offsets
  scale_dtype, zero_dtype  float32, float16 or bfloat16                     perm       none, or K integers
  scales, zeros            N * G bit patterns in hexadecimal (zeros absent when fixed)
Cases of <format>.txt and mixed.txt:
  codes       K decimal codes, one line a row               packed   the bytes of the row in hexadecimal, one line a row
  values      K float32 bit patterns, one line a row, in input order: entry perm[k] belongs to code k
Cases of encode.txt:
  seed, offset, first_row  integers        input   K float32 bit patterns, one line a row, in input order
  nearest, stochastic      K codes in stored order, one line a row
Cases of choose.txt (scales and zeros are the result):
  scheme      minmax or absmax             input   as above
"""
import argparse
import pathlib
import sys
from fractions import Fraction

FORMATS = {"sign": (1, 2, Fraction(1, 2)), "ternary": (2, 3, Fraction(1))}
FORMATS.update({f"uint{b}": (b, 1 << b, Fraction(1 << (b - 1))) for b in range(2, 9)})

# ---- floats as (negative?, exact magnitude); bit patterns of a type with `e` exponent and `m` mantissa bits ----

TYPES = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}


class Num:
    """A finite float: a sign (kept for zero) and an exact magnitude."""

    def __init__(self, value, negative=None):
        self.value = Fraction(value)
        self.negative = (self.value < 0) if negative is None else negative

    def bits(self, dtype="float32"):
        """Nearest number of the type, ties to even, as a bit pattern."""
        e, m = TYPES[dtype]
        bias = (1 << (e - 1)) - 1
        sign = int(self.negative) << (e + m)
        a = abs(self.value)
        if a == 0:
            return sign
        exponent = a.numerator.bit_length() - a.denominator.bit_length()
        if Fraction(2) ** exponent > a:
            exponent -= 1
        exponent = max(exponent, 1 - bias)
        q = a / Fraction(2) ** (exponent - m)  # in units of the last place
        n = q.numerator // q.denominator
        rest = q - n
        if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n % 2):
            n += 1
        pattern = ((exponent + bias - 1) << m) + n  # a carry out of the mantissa moves the exponent up by itself
        assert pattern < ((1 << e) - 1) << m, "a golden value overflows"
        return sign | pattern

    def rounded(self, dtype="float32"):
        return from_bits(self.bits(dtype), dtype)


def from_bits(pattern, dtype="float32"):
    e, m = TYPES[dtype]
    bias = (1 << (e - 1)) - 1
    negative = bool(pattern >> (e + m))
    exponent, mantissa = (pattern >> m) & ((1 << e) - 1), pattern & ((1 << m) - 1)
    assert exponent != (1 << e) - 1
    a = Fraction(mantissa) if exponent == 0 else Fraction(mantissa + (1 << m))
    a *= Fraction(2) ** (max(exponent, 1) - bias - m)
    return Num(-a if negative else a, negative)


def add(x, y):
    total = x.value + y.value
    return Num(total, x.negative and y.negative if total == 0 else None).rounded()


def sub(x, y):
    return add(x, Num(-y.value, not y.negative))


def mul(x, y):
    return Num(x.value * y.value, x.negative != y.negative).rounded()


def div(x, y):
    return Num(x.value / y.value, x.negative != y.negative).rounded()


def floor(x):
    return x.numerator // x.denominator


def rint(x):
    n = floor(x)
    rest = x - n
    return n + int(rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n % 2 == 1))


def clamp(x, low, high):
    return max(low, min(high, x))


# ---- the format ----


def segments(layout, k):
    """[(format, first column, columns)]"""
    if "*" not in layout:
        return [(layout, 0, k)]
    out, begin = [], 0
    for part in layout.split("+"):
        name, count = part.split("*")
        out.append((name, begin, int(count)))
        begin += int(count)
    assert begin == k
    return out


def format_of(layout, k, column):
    for name, begin, count in segments(layout, k):
        if begin <= column < begin + count:
            return name
    raise AssertionError


def pack_row(codes, layout):
    out = b""
    for name, begin, count in segments(layout, len(codes)):
        bits = FORMATS[name][0]
        stream = sum(c << (i * bits) for i, c in enumerate(codes[begin:begin + count]))
        out += stream.to_bytes((count * bits + 7) // 8, "little")
    return out


def value_of(code, scale, zero, kind):
    q = Num(code)
    if kind == "offsets":
        return add(mul(scale, q), zero)
    return mul(scale, sub(q, zero))


class Random:
    """A 64-bit linear congruential generator: the same numbers under every Python."""

    def __init__(self, seed):
        self.state = seed * 2862933555777941757 + 3037000493

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.state >> 33) % n


def name_seed(text):
    return int.from_bytes(text.encode(), "little") % (1 << 61)


def random_scale(rng, dtype, negative_too=True):
    e, m = TYPES[dtype]
    bias = (1 << (e - 1)) - 1
    sign = rng.below(8) == 0 if negative_too else 0
    return (int(sign) << (e + m)) | ((bias - 7 + rng.below(5)) << m) | rng.below(1 << m)


def random_zero(rng, dtype, kind, levels):
    if kind == "offsets":
        return random_scale(rng, dtype)
    choice = rng.below(4)
    if choice == 0:  # trained: a fraction
        return Num(Fraction(rng.below(levels * 64), 64)).bits(dtype)
    return Num(rng.below(levels + 1)).bits(dtype)  # an integer, levels itself included (GPTQ v1 readers produce it)


def shuffled(rng, k):
    perm = list(range(k))
    for i in range(k - 1, 0, -1):
        j = rng.below(i + 1)
        perm[i], perm[j] = perm[j], perm[i]
    return perm


def hex_bits(pattern, dtype):
    return f"{pattern:0{(1 + sum(TYPES[dtype])) // 4}x}"


def header(case, layout, n, k, group, kind, scale_dtype, zero_dtype, perm):
    return [f"case {case}", f"layout {layout}", f"n {n}", f"k {k}", f"group {group}", f"zero_kind {kind}",
            f"scale_dtype {scale_dtype}", f"zero_dtype {zero_dtype}",
            "perm " + ("none" if perm is None else " ".join(map(str, perm)))]


def parameters(rng, layout, n, k, group, kind, scale_dtype, zero_dtype, negative_too=True):
    groups = (k + group - 1) // group
    scales = [[random_scale(rng, scale_dtype, negative_too) for _ in range(groups)] for _ in range(n)]
    zeros = None
    if kind != "fixed":
        zeros = [[random_zero(rng, zero_dtype, kind, FORMATS[format_of(layout, k, g * group)][1]) for g in range(groups)]
                 for _ in range(n)]
    return scales, zeros


def parameter_lines(scales, zeros, scale_dtype, zero_dtype):
    lines = ["scales " + " ".join(hex_bits(s, scale_dtype) for row in scales for s in row)]
    if zeros is not None:
        lines.append("zeros " + " ".join(hex_bits(z, zero_dtype) for row in zeros for z in row))
    return [line.rstrip() for line in lines]


def zero_at(zeros, zero_dtype, layout, k, row, column, group):
    if zeros is None:
        return Num(FORMATS[format_of(layout, k, column)][2])
    return from_bits(zeros[row][column // group], zero_dtype)


def packed_case(case, layout, n, k, group, kind, scale_dtype="float16", zero_dtype="float16", permuted=False):
    rng = Random(name_seed(case))
    perm = shuffled(rng, k) if permuted else None
    scales, zeros = parameters(rng, layout, n, k, group, kind, scale_dtype, zero_dtype)
    lines = header(case, layout, n, k, group, kind, scale_dtype, zero_dtype, perm)
    lines += parameter_lines(scales, zeros, scale_dtype, zero_dtype)
    for row in range(n):
        codes = [rng.below(FORMATS[format_of(layout, k, c)][1]) for c in range(k)]
        if row == 0:  # the largest code everywhere: carries and straddles show
            codes = [FORMATS[format_of(layout, k, c)][1] - 1 for c in range(k)]
        values = [None] * k
        for c in range(k):
            scale = from_bits(scales[row][c // group], scale_dtype)
            v = value_of(codes[c], scale, zero_at(zeros, zero_dtype, layout, k, row, c, group), kind)
            values[c if perm is None else perm[c]] = hex_bits(v.bits(), "float32")
        lines.append("codes " + " ".join(map(str, codes)))
        lines.append("packed " + pack_row(codes, layout).hex())
        lines.append("values " + " ".join(values))
    return [line.rstrip() for line in lines] + ["end"]


# ---- rounding to codes ----


def philox4x32(seed, offset, index):
    """Philox4x32-10 (Salmon et al., SC'11)."""
    mask = (1 << 32) - 1
    key = [seed & mask, seed >> 32]
    c = [index & mask, index >> 32, offset & mask, offset >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & mask, (p0 >> 32) ^ c[3] ^ key[1], p0 & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


assert philox4x32(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # published with Random123


def encode_one(v, scale, zero, kind, name, uniform):
    """Code of value v: nearest when uniform is None."""
    top = FORMATS[name][1] - 1
    if scale.value == 0:
        return 0 if kind == "offsets" else clamp(rint(zero.value), 0, top)
    t = div(sub(v, zero), scale) if kind == "offsets" else add(div(v, scale), zero)
    if uniform is not None:
        low = floor(t.value)
        # t - low in float32 (rounds only where |low| is large or t is a tiny negative number)
        rest = sub(t, Num(low))
        return clamp(low + int(uniform < rest.value), 0, top)
    if name == "sign" and kind == "fixed":
        return int(t.value >= Fraction(1, 2))
    return clamp(rint(t.value), 0, top)


def encode_case(case, layout, n, k, group, kind, scale_dtype, zero_dtype, permuted, seed, offset, first_row):
    rng = Random(name_seed(case))
    perm = shuffled(rng, k) if permuted else None
    scales, zeros = parameters(rng, layout, n, k, group, kind, scale_dtype, zero_dtype, negative_too=False)
    if len(scales) > 1 and len(scales[1]) > 1:
        scales[1][0] = 0
    lines = header(case, layout, n, k, group, kind, scale_dtype, zero_dtype, perm)
    lines += [f"seed {seed}", f"offset {offset}", f"first_row {first_row}"]
    lines += parameter_lines(scales, zeros, scale_dtype, zero_dtype)
    for row in range(n):
        inputs, nearest, stochastic = [0] * k, [], []
        for c in range(k):
            name = format_of(layout, k, c)
            levels = FORMATS[name][1]
            scale = from_bits(scales[row][c // group], scale_dtype)
            zero = zero_at(zeros, zero_dtype, layout, k, row, c, group)
            # Twice the grid wide, so that clipping happens; every third value is a tie or on a level.
            steps = Fraction(rng.below(levels * 512), 256) - Fraction(levels, 2)
            if rng.below(3) == 0:
                steps = Fraction(floor(steps * 2), 2)
            exact = zero.value + scale.value * steps if kind == "offsets" else scale.value * (steps - zero.value)
            v = Num(exact).rounded()
            inputs[c if perm is None else perm[c]] = hex_bits(v.bits(), "float32")
            nearest.append(encode_one(v, scale, zero, kind, name, None))
            element = (first_row + row) * k + c
            word = philox4x32(seed, offset, element // 4)[element % 4]
            stochastic.append(encode_one(v, scale, zero, kind, name, Fraction(word >> 8, 1 << 24)))
        lines += ["input " + " ".join(inputs), "nearest " + " ".join(map(str, nearest)),
                  "stochastic " + " ".join(map(str, stochastic))]
    return lines + ["end"]


def choose_case(case, layout, n, k, group, scheme, kind, scale_dtype, zero_dtype):
    rng = Random(name_seed(case))
    groups = (k + group - 1) // group
    rows, scales, zeros = [], [], []
    for row in range(n):
        values = [Num(Fraction(rng.below(1 << 20) - (1 << 19) + (row << 18), 1 << 21) if rng.below(16) else 0).rounded()
                  for _ in range(k)]
        if row == 1:  # one group of equal values, one of zeros
            values[:group] = [Num(Fraction(-3, 8))] * min(group, k)
            values[group:2 * group] = [Num(0)] * len(values[group:2 * group])
        rows.append(values)
        scales.append([])
        zeros.append([])
        for g in range(groups):
            part = values[g * group:(g + 1) * group]
            levels, fixed = FORMATS[format_of(layout, k, g * group)][1:]
            top = levels - 1
            lo, hi = Num(min(v.value for v in part)), Num(max(v.value for v in part))
            if scheme == "minmax":
                if kind == "zeros":
                    lo, hi = Num(min(lo.value, 0)), Num(max(hi.value, 0))
                scale = div(sub(hi, lo), Num(top))
                if kind == "offsets":
                    near = scale.rounded("float16")
                    if add(mul(near, Num(top)), lo).value == hi.value:
                        scale = near
            else:
                candidates = [div(hi, Num(top - fixed)), div(Num(-lo.value), Num(fixed))]
                scale = max(candidates, key=lambda c: c.value)
            scale = Num(scale.value)  # a zero scale is +0
            scales[row].append(scale.bits(scale_dtype))
            stored = from_bits(scales[row][-1], scale_dtype)
            if kind == "offsets":
                zeros[row].append(Num(lo.value).bits(zero_dtype))
            elif kind == "zeros":
                z = 0 if stored.value == 0 else clamp(rint(div(Num(-lo.value), stored).value), 0, top)
                zeros[row].append(Num(z).bits(zero_dtype))
    lines = header(case, layout, n, k, group, kind, scale_dtype, zero_dtype, None) + [f"scheme {scheme}"]
    lines += parameter_lines(scales, None if kind == "fixed" else zeros, scale_dtype, zero_dtype)
    lines += ["input " + " ".join(hex_bits(v.bits(), "float32") for v in row) for row in rows]
    return lines + ["end"]


def worked_examples():
    """The examples of docs/formats.md, typed in by hand and checked against the generator's own rules."""
    assert pack_row([1, 2, 3, 4, 5, 6, 7, 0], "uint3").hex() == "d1581f"
    assert pack_row([1, 0, 1, 1, 0, 0, 1, 0, 1], "sign").hex() == "4d01"
    assert pack_row([0, 1, 2, 2, 1], "ternary").hex() == "a401"
    assert pack_row([1, 2, 15], "uint4").hex() == "210f"
    assert pack_row([200, 3, 1, 2, 3], "uint8*2+uint4*3").hex() == "c8032103"
    assert value_of(11, Num(Fraction(1, 4)), Num(8), "zeros").value == Fraction(3, 4)
    assert value_of(11, Num(Fraction(1, 4)), Num(Fraction(-2)), "offsets").value == Fraction(3, 4)


def files():
    note = ["# Written by tools/make_golden.py; do not edit. The format is described there."]
    out = {}
    for name in FORMATS:
        lines = list(note)
        for k in (0, 1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 64, 67):
            kind = ("fixed", "zeros", "offsets")[k % 3]
            group = (8, 5, 32)[(k // 3) % 3]
            scale_dtype = ("float16", "float32", "bfloat16")[(k // 2) % 3]
            zero_dtype = ("float16", "bfloat16", "float32")[(k // 4) % 3]
            lines += packed_case(f"{name}_k{k}_{kind}_g{group}", name, 3, k, group, kind, scale_dtype, zero_dtype)
        for kind in ("fixed", "zeros", "offsets"):
            lines += packed_case(f"{name}_k41_{kind}_g16_perm", name, 2, 41, 16, kind, permuted=True)
        out[f"{name}.txt"] = lines
    lines = list(note)
    for layout, k, group in (("uint8*16+uint4*24", 40, 8), ("uint6*10+uint5*5+uint3*7", 22, 5), ("sign*3+uint7*3+ternary*4", 10, 3),
                             ("uint2*32+uint8*32+sign*5", 69, 32), ("uint4*1+uint3*1+uint2*1+sign*1", 4, 1)):
        for kind in ("fixed", "zeros", "offsets"):
            lines += packed_case(f"mixed_{layout.replace('*', 'x').replace('+', '_')}_{kind}", layout, 3, k, group, kind,
                                 permuted=kind == "zeros")
    out["mixed.txt"] = lines
    lines = list(note)
    index = 0
    for layout, k, group in [(name, 37, 16) for name in FORMATS] + [("uint8*16+uint4*16+sign*9", 41, 8)]:
        for kind in ("fixed", "zeros", "offsets"):
            seed, offset = [(0, 0), (1234, 1), ((1 << 64) - 1, (1 << 63) + 5)][index % 3]
            lines += encode_case(f"encode_{layout.replace('*', 'x').replace('+', '_')}_{kind}", layout, 3, k, group, kind,
                                 ("float32", "float16", "bfloat16")[index % 3], "float32", index % 2 == 1, seed, offset,
                                 (0, 5, 1 << 33)[index % 3])
            index += 1
    out["encode.txt"] = lines
    lines = list(note)
    for name in FORMATS:
        for scheme, kind in (("minmax", "zeros"), ("minmax", "offsets"), ("absmax", "fixed")):
            dtype = {"zeros": "float16", "offsets": "float32", "fixed": "bfloat16"}[kind]
            lines += choose_case(f"choose_{name}_{scheme}_{kind}", name, 3, 45, 16, scheme, kind, dtype, "float32")
    out["choose.txt"] = lines
    return {name: "\n".join(text) + "\n" for name, text in out.items()}


def main():
    parser = argparse.ArgumentParser(description="write or check testdata/golden")
    parser.add_argument("--check", action="store_true", help="fail when the files differ from what would be written")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "testdata" / "golden")
    args = parser.parse_args()
    worked_examples()
    wanted = files()
    if not args.check:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in wanted.items():
            (args.out / name).write_text(text)
        return 0
    found = {p.name: p.read_text() for p in args.out.glob("*.txt")}
    bad = [name for name in sorted(set(wanted) | set(found)) if wanted.get(name) != found.get(name)]
    for name in bad:
        state = "missing" if name not in found else "not written by this tool" if name not in wanted else "different"
        print(f"make_golden: {args.out / name}: {state}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
