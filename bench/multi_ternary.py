#!/usr/bin/env python3
"""Times multi_ternary_linear, one pass over x for all k terms, against k calls of bitlinear and a sum.

Both sides use packed weights, calls alternate, and the figure is the ratio of the medians: above 1 the one pass is faster. Every
case is compared with float64 before it is timed, and a wrong result ends the run.

  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so PYTHONPATH=python bench/multi_ternary.py --m 1,64 --terms 2,3
"""

import argparse
import statistics
import time

import torch

from subbyte import functional as F


def parse():
    head, _, rest = __doc__.partition("\n")
    integers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x2048", help="NxK")
    parser.add_argument("--m", type=integers, default=[1, 8, 64, 256], help="rows of x")
    parser.add_argument("--terms", type=integers, default=[2, 3, 4], help="terms of the weight")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one case")
    return parser.parse_args()


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    n, k = (int(size) for size in args.shape.split("x"))
    print(f"N={n} K={k}, {args.threads} threads: time of k calls / time of one")
    print(f"{'':>16}" + "".join(f"{f'k={terms}':>10}" for terms in args.terms))
    for bits in (None, 8):
        for m in args.m:
            line = []
            for terms in args.terms:
                x = torch.randn(m, k)
                trits, gammas = torch.randint(-1, 2, (terms, n, k)), torch.rand(terms, n)
                packed = F.pack_ternary(trits, gammas)
                parts = [F.pack_ternary(trits[i], gammas[i]) for i in range(terms)]
                one = lambda: F.multi_ternary_linear(x, packed, terms=terms, activation_bits=bits)  # noqa: B023, E731
                many = lambda: sum(F.bitlinear(x, w, activation_bits=bits) for w in parts)  # noqa: B023, E731
                rounded = x if bits is None else F.activation_quant(x)
                expected = rounded.double() @ (trits * gammas[..., None]).sum(0).double().t()
                for call in (one, many):
                    if not torch.allclose(call().double(), expected, rtol=1e-4, atol=1e-3 * k**0.5):
                        raise SystemExit(f"multi_ternary: M={m} k={terms} is wrong; nothing was timed")
                taken = ([], [])
                start = time.perf_counter()
                while time.perf_counter() - start < args.seconds or len(taken[0]) < 5:
                    taken[0].append(seconds_of(one))
                    taken[1].append(seconds_of(many))
                line.append(statistics.median(taken[1]) / statistics.median(taken[0]))
            print(f"{'a8' if bits else 'float x':<8}M={m:<6}" + "".join(f"{ratio:>10.2f}" for ratio in line))


if __name__ == "__main__":
    main()
