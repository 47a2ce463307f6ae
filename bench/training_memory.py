#!/usr/bin/env python3
"""Measures the memory of training, in bytes a weight: weights, optimizer states and gradients at the peak of a step.

Each case trains a stack of equal linear layers without bias in a process of its own, for a few steps on a few rows, so that
activations hardly count. Nothing is computed from sizes: on a GPU the figures are those of PyTorch's allocator
(torch.cuda.max_memory_allocated), on a CPU the resident set and its high-water mark as the kernel keeps them (/proc/self), both less
what the process held before the model existed.

  SUBBYTE_TORCH_LIB=.../libsubbyte_torch.so PYTHONPATH=python bench/training_memory.py --device cuda --width 8192
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import subbyte

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.memory import Memory  # noqa: E402

# name -> (how a layer is packed, or its dtype; what steps it; is it stepped in the backward pass)
CASES = {
    "float32, torch.optim.AdamW": (torch.float32, None, False),
    "bfloat16, torch.optim.AdamW": (torch.bfloat16, None, False),
    "8 bits, 8-bit moments": ({"bits": 8}, "8bit", False),
    "8 bits, 8-bit moments, update in backward": ({"bits": 8}, "8bit", True),
    "8/2 bits (residual), 8-bit moments, update in backward": ({"bits": 2, "residual_bits": 6}, "8bit", True),
    "4 bits, 8-bit moments, update in backward": ({"bits": 4}, "8bit", True),
    "4 bits, 4-bit moments, update in backward": ({"bits": 4}, "4bit", True),
    "1 bit, 4-bit moments, update in backward": ({"bits": 1}, "4bit", True),
}
STEPS = 3
ROWS = 8


def build(packing, moments, in_backward, width, layers, device):
    """Layer by layer, so that at most one exists as float on its way to being packed."""
    model = torch.nn.Sequential()
    for _ in range(layers):
        layer = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False, device=device))
        if isinstance(packing, dict):
            subbyte.quantize_(layer, scheme="fan_in", group_size=64, scale_dtype=torch.float16, progress=False, **packing)
        else:
            layer.to(packing)
        model.extend(layer)
    if moments is None:
        return model, torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = subbyte.optim.PackedAdamW(model.parameters(), moments=moments)
    if in_backward:
        optimizer.update_in_backward()
    return model, optimizer


def step(model, optimizer, width, device):
    x = torch.randn(ROWS, width, device=device, dtype=next(model.parameters()).dtype)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(name, width, layers, device):
    """Bytes: of the model, of model and states between two steps, at the peak of a step."""
    step(*build(*CASES[name], 64, 2, device), 64, device)  # libraries, thread pools, workspaces are there now
    memory = Memory(device)
    model, optimizer = build(*CASES[name], width, layers, device)
    weights = memory.now()
    memory.forget_peak()
    for _ in range(STEPS):
        step(model, optimizer, width, device)
    size = next(model.parameters()).dtype.itemsize
    return {"weights": weights, "resting": memory.now(), "peak": memory.peak(), "gradient_of_a_layer": size * width * width}


def run_in_its_own_process(name, args):
    # Freed blocks go back to the system at once, or the resident set would tell of the past.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    argv = [sys.executable, __file__, "--device", args.device, "--width", str(args.width), "--layers", str(args.layers)]
    done = subprocess.run([*argv, "--case", name], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout)


def table(results, args, where):
    weights = args.width**2 * args.layers
    lines = [
        f"{args.layers} layers [{args.width}, {args.width}], {where}, PyTorch {torch.__version__}; bytes a weight:",
        "",
        "| weights, optimizer | weights | with states | peak of a step | one layer's gradient | peak without it |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, told in results.items():
        cells = [told["weights"], told["resting"], told["peak"], told["gradient_of_a_layer"]]
        cells.append(told["peak"] - told["gradient_of_a_layer"])
        lines.append(f"| {name} | " + " | ".join(f"{cell / weights:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=2048, help="rows and columns of a layer (2048)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--case", choices=CASES, metavar="NAME", help="measures one case in this process and prints JSON")
    parser.add_argument("--json", type=Path, help="file for the figures in bytes")
    args = parser.parse_args(argv)
    if args.case is not None:
        print(json.dumps(measure(args.case, args.width, args.layers, args.device)))
        return
    results = {name: run_in_its_own_process(name, args) for name in tqdm(CASES, desc="cases", leave=False)}
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, resident set"
    print(table(results, args, where))
    if args.json is not None:
        args.json.write_text(json.dumps({"width": args.width, "layers": args.layers, "device": where, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
