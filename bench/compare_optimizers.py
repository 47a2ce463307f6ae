#!/usr/bin/env python3
"""Times a step of subbyte.optim.PackedAdamW on a packed weight against torch.optim.AdamW(fused=True) on a dense one.

Steps alternate, so that both sides meet the same load of the machine; the figures are medians, and a ratio above 1 says that the
packed step is faster. Beside them: bytes read and written a weight, and the share of the bandwidth that an addition over large arrays
(two read, one written) reaches in the same run. The moments of a packed step are compared with torch's before anything is timed.

  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so PYTHONPATH=python bench/compare_optimizers.py --device cuda
  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so PYTHONPATH=python bench/compare_optimizers.py --sparse

--sparse: a step on a sparse gradient of 256 rows, of tables of 10^4 and of 10^6 rows, alternating; beside
torch.optim.SparseAdam on a dense table. The ratio large / small is 1 where the cost is that of the named rows.
"""

import argparse
import statistics
import time

import torch

import subbyte
from subbyte.optim import PackedAdamW

MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 256, "4bit": 0.5 + 4 / 256}


def timed(device, run):
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def check(device):
    w = torch.nn.Parameter(subbyte.PackedWeight.from_float(torch.randn(64, 512, device=device), bits=8))
    d = w.detach().dequantize().requires_grad_()
    w.grad = torch.randn(64, 512, device=device)
    d.grad = w.grad.clone()
    ours, theirs = PackedAdamW([w], moments="float32"), torch.optim.AdamW([d])
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.state[w]["m"], theirs.state[d]["exp_avg"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ours.state[w]["v"], theirs.state[d]["exp_avg_sq"], rtol=1e-5, atol=1e-10)


def sparse_steps(args):
    def optimizer_of(kind, v):
        g = torch.Generator(device=args.device).manual_seed(v)
        rows = torch.randint(0, v, (256,), device=args.device, generator=g).unique()
        if kind == "torch SparseAdam":
            p = torch.nn.Parameter(torch.zeros(v, args.k, device=args.device))
            optimizer = torch.optim.SparseAdam([p])
        else:
            codes = torch.zeros(v, args.k // 2, dtype=torch.uint8, device=args.device)
            scales = torch.full((v, args.k // 64), 0.1, device=args.device)
            p = torch.nn.Parameter(subbyte.PackedWeight(codes, scales, format="uint4", in_features=args.k, group_size=64))
            optimizer = PackedAdamW([p])
        values = torch.randn(len(rows), args.k, device=args.device, generator=g)
        p.grad = torch.sparse_coo_tensor(rows[None], values, (v, args.k), is_coalesced=True, check_invariants=False)
        return optimizer

    print(f"{args.device}, {args.threads} threads, [V, {args.k}], 256 rows named, torch {torch.__version__}")
    print(f"{'sparse step':20} {'V=1e4 us':>9} {'V=1e6 us':>9} {'ratio':>6}")
    for kind in ("packed 4 bits", "torch SparseAdam"):
        optimizers = {v: optimizer_of(kind, v) for v in (10**4, 10**6)}
        times = {v: [] for v in optimizers}
        for sample in range(args.samples + 3):
            for v, optimizer in optimizers.items():
                seconds = timed(args.device, optimizer.step)
                if sample >= 3:
                    times[v].append(seconds)
        small, large = (statistics.median(times[v]) * 1e6 for v in optimizers)
        print(f"{kind:20} {small:9.1f} {large:9.1f} {large / small:6.2f}")


def main():
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--n", type=int, default=4096, help="rows of the weight")
    parser.add_argument("--k", type=int, help="columns (4096)")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--sparse", action="store_true", help="steps on sparse gradients, with --k 128 unless told")
    args = parser.parse_args()
    args.k = args.k or (128 if args.sparse else 4096)
    torch.set_num_threads(args.threads)
    if args.sparse:
        sparse_steps(args)
        return
    device, n, k = args.device, args.n, args.k
    check(device)

    a, b, c = (torch.ones(n * k * 4, device=device) for _ in range(3))
    torch.add(a, b, out=c)
    bandwidth = 12 * a.numel() / statistics.median(timed(device, lambda: torch.add(a, b, out=c)) for _ in range(args.samples))
    del a, b, c
    print(f"{device}, {args.threads} threads, [{n}, {k}], torch {torch.__version__}; addition {bandwidth / 1e9:.0f} GB/s")

    steps = {}
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        p = torch.nn.Parameter(torch.randn(n, k, device=device).to(dtype))
        p.grad = torch.randn(n, k, device=device).to(dtype)
        steps[f"torch fused {str(dtype)[6:]}"] = (torch.optim.AdamW([p], fused=True), 7 * size)
    for bits, moments in ((8, "8bit"), (8, "bfloat16"), (4, "8bit"), (4, "4bit"), (1, "8bit")):
        source = torch.randn(n, k, device=device).bfloat16()
        p = torch.nn.Parameter(subbyte.PackedWeight.from_float(source, bits=bits, group_size=64))
        p.grad = torch.randn(n, k, device=device).bfloat16()
        parts = sum(part.nbytes for name, part in p.parts.items() if name != "codes") / p.numel()
        moved = 2 * bits / 8 + parts + 2 + 4 * MOMENT_BYTES[moments]
        steps[f"packed {bits} bits, {moments} moments"] = (PackedAdamW([p], moments=moments), moved)
    times = {name: [] for name in steps}
    for sample in range(args.samples + 2):
        for name, (optimizer, _) in steps.items():
            seconds = timed(device, optimizer.step)
            if sample >= 2:
                times[name].append(seconds)
    best = {name: statistics.median(values) for name, values in times.items()}
    dense = best["torch fused bfloat16"]
    print(f"{'step':36} {'us':>9} {'ps/weight':>10} {'B/weight':>9} {'bandwidth':>10} {'x bf16':>7}")
    for name, seconds in best.items():
        moved = steps[name][1]
        print(
            f"{name:36} {seconds * 1e6:9.1f} {seconds / (n * k) * 1e12:10.1f} {moved:9.2f} "
            f"{moved * n * k / seconds / bandwidth:9.0%} {dense / seconds:7.2f}"
        )


if __name__ == "__main__":
    main()
