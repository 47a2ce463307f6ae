#!/usr/bin/env python3
"""Times the binary operations on the CPU against PyTorch's float32 ones of the same shape.

  binary_linear (float weight, packed codes)   against torch.nn.functional.linear
  binary_matmul                                against x @ z.transpose
  binary_conv2d (float weight, packed codes)   against torch.nn.functional.conv2d

Calls alternate, so that both sides meet the same load of the machine; a figure is the ratio of the two medians, and above 1 subbyte
is faster. Every case is compared with PyTorch's result on the signs before it is timed, and a wrong result ends the run.

  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so bench/compare_binary.py --threads 1
"""

import argparse
import os
import statistics
import sys
import time

import torch

SCALE = torch.tensor(0.5)


def sign(v):
    return torch.where(v >= 0, 1.0, -1.0)


def linear_cases():
    for m, n, k in ((1, 4096, 4096), (64, 4096, 4096), (512, 1024, 1024), (64, 1000, 2048)):
        x, w = torch.randn(m, k), torch.randn(n, k)
        codes = torch.ops.subbyte.pack((w >= 0).to(torch.uint8), "sign")
        theirs = lambda x=x, w=w: torch.nn.functional.linear(x, w)  # noqa: E731
        expected = lambda x=x, w=w: sign(x) @ sign(w).T * 0.25  # noqa: E731
        for name, arguments in (("float weight", (w, None)), ("packed", (None, codes))):
            ours = lambda x=x, a=arguments: torch.ops.subbyte.binary_linear(x, *a, None, SCALE, SCALE)  # noqa: E731
            yield f"binary_linear, {name}", f"M {m}, N {n}, K {k}", ours, theirs, expected


def matmul_cases():
    for batch, m, n, k in ((96, 128, 128, 64), (16, 512, 512, 128)):
        x, z = torch.randn(batch, m, k), torch.randn(batch, n, k)
        yield (
            "binary_matmul",
            f"{batch} times M {m}, N {n}, K {k}",
            lambda x=x, z=z: torch.ops.subbyte.binary_matmul(x, z, SCALE, SCALE),
            lambda x=x, z=z: x @ z.transpose(-2, -1),
            lambda x=x, z=z: sign(x) @ sign(z).transpose(-2, -1) * 0.25,
        )


def conv_cases():
    for batch, c, o, size, kernel, stride in ((1, 64, 64, 56, 3, 1), (8, 128, 128, 28, 3, 1), (8, 256, 512, 14, 1, 1),
                                              (8, 256, 256, 28, 3, 2)):  # fmt: skip
        x, w = torch.randn(batch, c, size, size), torch.randn(o, c, kernel, kernel)
        codes = torch.ops.subbyte.pack((w.flatten(1) >= 0).to(torch.uint8), "sign")
        rest = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
        theirs = lambda x=x, w=w, r=rest: torch.nn.functional.conv2d(x, w, None, r[1], r[2])  # noqa: E731
        expected = lambda x=x, w=w, r=rest: torch.nn.functional.conv2d(sign(x), sign(w), None, r[1], r[2]) * 0.25  # noqa: E731
        for name, arguments in (("float weight", (w, None)), ("packed", (None, codes))):
            ours = lambda x=x, a=arguments, r=rest: torch.ops.subbyte.binary_conv2d(  # noqa: E731
                x, *a, None, SCALE, SCALE, None, *r
            )
            yield f"binary_conv2d, {name}", f"B {batch}, C {c}, O {o}, {size}x{size}, {kernel}x{kernel}/{stride}", ours, theirs, expected


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(ours, theirs, seconds, samples):
    pairs, end = [], time.perf_counter() + seconds
    ours(), theirs()
    while len(pairs) < samples or time.perf_counter() < end:
        pairs.append((timed(ours), timed(theirs)))
    return tuple(statistics.median(side) for side in zip(*pairs))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default=os.environ.get("SUBBYTE_TORCH_LIB"), help="default: $SUBBYTE_TORCH_LIB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one case")
    parser.add_argument("--samples", type=int, default=5, help="timings of each side at least")
    args = parser.parse_args(argv)
    if not args.library or not os.path.isfile(args.library):
        parser.error(f"--library {args.library} is no file; build it with 'make torch', or set SUBBYTE_TORCH_LIB")
    torch.ops.load_library(args.library)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {args.threads} threads\n")
    print("| operation | shape | ours, ms | float32, ms | float32 / ours |\n|---|---|---|---|---|")
    for cases in (linear_cases, matmul_cases, conv_cases):
        for name, shape, ours, theirs, expected in cases():
            if not torch.equal(ours(), expected()):
                sys.exit(f"{name} {shape}: the result is wrong")
            a, b = measure(ours, theirs, args.seconds, args.samples)
            print(f"| {name} | {shape} | {a * 1e3:.3f} | {b * 1e3:.3f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
