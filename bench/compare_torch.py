#!/usr/bin/env python3
"""Times subbyte's CPU operations against PyTorch's float32 product on the dense weight.

  linear, linear_a8     against torch.nn.functional.linear(x, W)
  linear_grad_input     against gy @ W

Calls alternate, so that both sides meet the same load of the machine; each figure is the ratio of the two medians, and above 1
subbyte is faster. Every case is compared with float64 before it is timed, and a wrong result ends the run. The weights of both
sides rotate over copies, so that with few rows neither finds them in a cache.

  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so bench/compare_torch.py --threads 1,2 --m 64,512 --formats uint4
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

OPERATIONS = ("linear", "linear_a8", "linear_grad_input")
FORMATS = ("uint8", "uint4", "uint3", "uint2", "sign")
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def parse(argv):
    def integers(text):
        return [int(part) for part in text.split(",")]

    def names(known):
        def convert(text):
            chosen = text.split(",")
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name} is unknown, expected some of {','.join(known)}")
            return chosen

        return convert

    def shapes(text):
        pairs = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
        if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
            raise argparse.ArgumentTypeError(f"{text} is no list of NxK")
        return pairs

    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    every_format = ("sign", "ternary", *(f"uint{bits}" for bits in range(2, 9)))
    parser.add_argument("--library", default=os.environ.get("SUBBYTE_TORCH_LIB"), help="default: $SUBBYTE_TORCH_LIB")
    parser.add_argument("--threads", type=integers, default=[torch.get_num_threads()], help="numbers of threads, in this order")
    parser.add_argument("--shapes", type=shapes, default=[(4096, 4096), (576, 1536), (1536, 576)], help="NxK,NxK ...")
    parser.add_argument("--m", type=integers, default=[1, 8, 64, 512], help="rows of x")
    parser.add_argument("--formats", type=names(every_format), default=list(FORMATS), help=",".join(every_format))
    parser.add_argument("--ops", type=names(OPERATIONS), default=list(OPERATIONS), help=",".join(OPERATIONS))
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a scale")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of subbyte's x and gy")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one case, checks apart")
    parser.add_argument("--samples", type=int, default=5, help="timings of each side at least")
    parser.add_argument("--cold-mb", type=float, default=96, help="megabytes that the copies of a weight take at least")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    if not args.library or not Path(args.library).is_file():
        parser.error(f"--library {args.library} is no file; build it with 'make torch', or set SUBBYTE_TORCH_LIB")
    if args.samples < 1 or args.group_size < 1 or min(args.m) < 1 or min(args.threads) < 1:
        parser.error("--samples, --group-size, --m and --threads are at least 1")
    return args


class Weight:
    """A packed [N, K] matrix, its dense float32 values, and enough copies of both to be cold."""

    def __init__(self, fmt, n, k, group_size, cold_bytes):
        subbyte = torch.ops.subbyte
        source = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 31 + k)) / k**0.5
        codes, scales, _ = subbyte.quantize(source, fmt, group_size, "absmax", "fixed", None, None)
        self.rest = (None, None, None, fmt, k, group_size)
        self.dense = subbyte.dequantize(codes, scales, *self.rest, torch.float32)
        self.packed = self._rotation((codes, scales), cold_bytes)
        self.dense_copies = self._rotation((self.dense,), cold_bytes)

    @staticmethod
    def _rotation(tensors, cold_bytes):
        size = sum(t.numel() * t.element_size() for t in tensors)
        count = min(64, max(1, round(cold_bytes / size)))
        return itertools.cycle([tensors] + [tuple(t.clone() for t in tensors) for _ in range(count - 1)])

    def args(self):
        return (*next(self.packed), *self.rest)


def sides_of(op, weight, m, dtype):
    """The two calls of a case, and a function that raises when subbyte's result is off."""
    subbyte = torch.ops.subbyte
    n, k = weight.dense.shape
    length = n if op == "linear_grad_input" else k
    x = torch.randn(m, length, generator=torch.Generator().manual_seed(m)).to(dtype)
    x_float = x.float()
    if op == "linear":
        ours = lambda: subbyte.linear(x, None, *weight.args(), None)  # noqa: E731
    elif op == "linear_a8":
        ours = lambda: subbyte.linear_a8(x, None, *weight.args(), None)  # noqa: E731
    else:
        ours = lambda: subbyte.linear_grad_input(x, *weight.args())  # noqa: E731
    if op == "linear_grad_input":
        theirs = lambda: x_float @ next(weight.dense_copies)[0]  # noqa: E731
    else:
        theirs = lambda: torch.nn.functional.linear(x_float, next(weight.dense_copies)[0])  # noqa: E731

    def check():
        rows = sorted({0, 1 % m, m // 2, m - 1})
        got = ours()[rows].double()
        a = x[rows].double()
        w = weight.dense.double() if op == "linear_grad_input" else weight.dense.double().t()
        expected = a @ w
        # A symmetric matrix whose middle code is its zero is bounded by its values; 1 bit has its zero half a step away.
        magnitude = (a.abs() @ w.abs()) * 3
        bound = EPS[torch.float32] * (min(length, 512) + length / 8 + 16) * magnitude + 1.01 * EPS[dtype] * expected.abs()
        if op == "linear_a8":  # rounding of x to int8, half a step of the largest of its row
            bound += a.abs().amax(1, keepdim=True) / 254 * 1.01 * w.abs().sum(0)
        wrong = ~((got - expected).abs() <= bound)  # NaN is wrong
        if wrong.any():
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise SystemExit(
                f"compare_torch: {op} {weight.rest[3]} {n}x{k} M={m}: element [{rows[row]}, {column}] is {got[row, column]:.6g}, "
                f"expected {expected[row, column]:.6g} +- {bound[row, column]:.2g}; nothing was timed"
            )

    return ours, theirs, check


def seconds_of(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(ours, theirs, budget, samples):
    """Median seconds of a call of each, calls in alternation."""
    for call in (ours, theirs):
        call()
    # Short calls are timed in runs of about two milliseconds.
    repeats = [max(1, min(1000, int(0.002 / max(seconds_of(call, 1), 1e-7)))) for call in (ours, theirs)]
    taken = ([], [])
    start = time.perf_counter()
    while len(taken[0]) < samples or time.perf_counter() - start < budget:
        for times, call, count in zip(taken, (ours, theirs), repeats):
            times.append(seconds_of(call, count))
    return statistics.median(taken[0]), statistics.median(taken[1])


class Progress:
    """A bar where rich is installed and somebody watches, else nothing."""

    def __init__(self, total):
        self.bar = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=total)

    def step(self, text):
        if self.bar is not None:
            self.bar.update(self.task, description=text, advance=1)

    def stop(self):
        if self.bar is not None:
            self.bar.stop()


def measure(args):
    results = []
    dtype = getattr(torch, args.dtype)
    cases = list(itertools.product(args.shapes, args.formats, args.ops, args.m))
    progress = Progress(len(cases) * len(args.threads))
    try:
        for (n, k), fmt in itertools.product(args.shapes, args.formats):
            weight = Weight(fmt, n, k, args.group_size, args.cold_mb * 1e6)
            for op, m, threads in itertools.product(args.ops, args.m, args.threads):
                progress.step(f"{op} {fmt} {n}x{k} M={m}")
                torch.set_num_threads(threads)
                ours, theirs, check = sides_of(op, weight, m, dtype)
                check()
                ours_s, theirs_s = compare(ours, theirs, args.seconds, args.samples)
                results.append(
                    dict(op=op, format=fmt, n=n, k=k, m=m, threads=threads, seconds=ours_s, torch_seconds=theirs_s,
                         ratio=theirs_s / ours_s, gflops=2e-9 * m * n * k / ours_s)
                )  # fmt: skip
    finally:
        progress.stop()
    return results


def cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(args, results):
    """One line an operation, shape and M; one column a format, ratios of all numbers of threads in it."""
    threads = " / ".join(str(t) for t in args.threads)
    lines = [
        f"{cpu_name()}, PyTorch {torch.__version__}, {args.dtype} x, groups of {args.group_size}, threads {threads}",
        "time of PyTorch's float32 product on the dense weight / time of subbyte; in brackets Gflop/s of subbyte",
        "",
    ]
    by_case = {(r["op"], r["n"], r["k"], r["m"], r["format"], r["threads"]): r for r in results}
    width = 6 + 11 * len(args.threads)
    lines.append(f"{'':<34}" + "".join(f"{fmt:>{width}}" for fmt in args.formats))
    for op, (n, k), m in itertools.product(args.ops, args.shapes, args.m):
        cells = []
        for fmt in args.formats:
            of_threads = [by_case[op, n, k, m, fmt, t] for t in args.threads]
            ratios = " / ".join(f"{r['ratio']:.2f}" for r in of_threads)
            cells.append(f"{ratios} ({' / '.join(format(r['gflops'], '.0f') for r in of_threads)})")
        lines.append(f"{op:<18}{n:>5} x{k:>5} M={m:<4}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def main(argv=None):
    args = parse(argv)
    torch.ops.load_library(args.library)
    results = measure(args)
    print(table(args, results))
    if args.json:
        about = dict(cpu=cpu_name(), torch=torch.__version__, dtype=args.dtype, group_size=args.group_size)
        Path(args.json).write_text(json.dumps(dict(about, results=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
