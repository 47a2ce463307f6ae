"""Trains a small network on Fashion-MNIST with low-bit weights, one run a setting and seed, and compares them.

python -m examples.fashion_mnist                               the MLP, every setting, three seeds
python -m examples.fashion_mnist --model cnn --settings fp32 4  the CNN, two settings

Writes curves.png, results.json and table.md into the output folder. Every epoch ends in a checkpoint: a run that was
interrupted goes on where it stood.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import data
from .settings import MODELS, SETTINGS

ROOT = Path(__file__).resolve().parent.parent.parent


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m examples.fashion_mnist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (3)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=60000, help="training images used (all 60000)")
    parser.add_argument("--output", type=Path, default=ROOT / "fashion_mnist_output")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    for name in ("seeds", "epochs", "batch", "images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    return args


def accuracy(model, images, labels):
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000)))
    model.train()
    return hits / len(labels)


def save_atomically(state, path):
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(args, name, seed, dataset, device, advance):
    """One run: {"losses": [one an epoch], "accuracy": [...], "seconds": ...}. Goes on from its checkpoint when there is one."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    model = setting.convert(MODELS[args.model]()).to(device).train()
    optimizer = setting.optimizer(model.parameters(), setting.lr)
    images, labels = (t[: args.images] for t in dataset["train"])
    steps = -(-len(labels) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    run = {"losses": [], "accuracy": [], "seconds": 0.0}
    path = args.output / "checkpoints" / f"{args.model}-{name}-{seed}-{args.epochs}x{args.batch}x{len(labels)}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"].cpu())
        run = state["run"]
        advance(steps * len(run["losses"]))
    for _ in range(len(run["losses"]), args.epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        order = torch.randperm(len(labels)).to(device)
        for batch in order.split(args.batch):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            advance(1)
        run["losses"].append(float(total) / steps)
        run["seconds"] += time.perf_counter() - began
        run["accuracy"].append(accuracy(model, *dataset["test"]))
        save_atomically(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "rng": torch.get_rng_state(),
                "run": run,
            },
            path,
        )
    return run


def table(results):
    lines = ["| weights | test accuracy, mean | spread | last loss | seconds an epoch |", "|---|---:|---:|---:|---:|"]
    for name, runs in results.items():
        final = [100 * run["accuracy"][-1] for run in runs]
        lines.append(
            f"| {SETTINGS[name].label} | {statistics.mean(final):.1f} % | {max(final) - min(final):.1f} | "
            f"{statistics.mean(run['losses'][-1] for run in runs):.3f} | "
            f"{statistics.mean(run['seconds'] / len(run['losses']) for run in runs):.1f} |"
        )
    return "\n".join(lines)


def plot(results, path, title):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name, runs in results.items():
        epochs = range(1, len(runs[0]["losses"]) + 1)
        mean = [statistics.mean(run["losses"][e - 1] for run in runs) for e in epochs]
        best = [100 * statistics.mean(run["accuracy"][e - 1] for run in runs) for e in epochs]
        left.plot(epochs, mean, marker="o", markersize=3, label=SETTINGS[name].label)
        right.plot(epochs, best, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="training loss, nats", title=title)
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv=None):
    args = arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.output.mkdir(parents=True, exist_ok=True)
    dataset = data.load(device)
    steps = -(-min(args.images, 60000) // args.batch) * args.epochs
    console, results = Console(), {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name in args.settings:
            bar = progress.add_task(SETTINGS[name].label, total=steps * args.seeds)
            results[name] = [
                train(args, name, seed, dataset, device, lambda n, bar=bar: progress.advance(bar, n))
                for seed in range(args.seeds)
            ]
    text = table(results)
    console.print(text, markup=False)
    (args.output / "table.md").write_text(text + "\n")
    (args.output / "results.json").write_text(json.dumps({"model": args.model, "device": str(device), "runs": results}, indent=1))
    plot(results, args.output / "curves.png", f"Fashion-MNIST, {args.model}, mean of {args.seeds} seeds")
    console.print(f"curves: {args.output / 'curves.png'}", markup=False)


if __name__ == "__main__":
    main()
