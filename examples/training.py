"""What the training programs share: their command line, one run with its checkpoint, the table, the curves.

A program compares settings. A setting is trained once a seed; a run is cut into rounds (epochs, or a number of steps), and each round
ends with a score and a checkpoint, written beside the old one and renamed, so that a run killed at any moment goes on from its last
round, with the same bits that it would have had.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import subbyte

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Score:
    """What a round ends with."""

    key: str  # in results.json
    label: str  # in the table, with its unit
    factor: float = 1.0  # from the kept number to the shown one
    digits: int = 3


@dataclass
class Job:
    """A run that is ready to start: a model, what trains it, where its data come from."""

    model: torch.nn.Module
    optimizer: Any  # step, zero_grad, state_dict, load_state_dict
    schedule: Any
    batches: Callable  # () -> the batches of a round; draws from PyTorch's default CPU generator alone
    loss: Callable  # batch -> scalar tensor
    score: Callable  # () -> number
    score_before: bool = False  # also before the first step, as "before"


def parser(program, doc, settings, *, seeds=3, chosen=None):
    """The arguments that every program has."""
    made = argparse.ArgumentParser(
        prog=f"python -m examples.{program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--settings", nargs="+", choices=settings, default=list(chosen or settings), metavar="NAME", help=", ".join(settings)
    )
    made.add_argument("--seeds", type=int, default=seeds, help=f"runs of each setting ({seeds})")
    made.add_argument("--output", type=Path, default=ROOT / f"{program}_output", help="folder of tables, curves, checkpoints")
    made.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, else cpu")
    return made


def parse(made, argv, positive=()):
    """The parsed arguments; the named ones have to be at least 1."""
    args = made.parse_args(argv)
    for name in ("seeds", *positive):
        if getattr(args, name) < 1:
            made.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    return args


def device_of(args):
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() and subbyte.info()["has_cuda"] else "cpu"))


def save_atomically(state, path):
    with subbyte.replacing(path) as temporary:
        torch.save(state, temporary)


def tensor_bytes(tree):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, (list, tuple)):
        return sum(map(tensor_bytes, tree))
    return sum(map(tensor_bytes, tree.values())) if isinstance(tree, dict) else 0


def score_of(job):
    job.model.eval()
    with torch.inference_mode():
        score = float(job.score())
    job.model.train()
    return score


def checkpoint_path(args, *names):
    """One file a run: whatever changes its course belongs into the names."""
    return args.output / "checkpoints" / ("-".join(str(name).replace("/", "of") for name in names) + ".pt")


def train(job, path, score, rounds, device, advance):
    """One run: {"losses": [one a round], score.key: [...], "seconds": ..., ...}. Goes on from its checkpoint where there is one.

    advance(n) is called with the number of steps done; a run that goes on reports those of its checkpoint first.
    """
    run = {"losses": [], score.key: [], "seconds": 0.0, "steps": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        job.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"].cpu())
        run = state["run"]
        advance(run["steps"])
    elif job.score_before:
        run["before"] = score_of(job)
    job.model.train()
    for _ in range(len(run["losses"]), rounds):
        began, total, steps = time.perf_counter(), torch.zeros((), device=device), 0
        for batch in job.batches():
            loss = job.loss(batch)
            job.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            job.optimizer.step()
            job.schedule.step()
            total += loss.detach()
            steps += 1
            advance(1)
        run["losses"].append(float(total) / steps)
        run["seconds"] += time.perf_counter() - began
        run["steps"] += steps
        run[score.key].append(score_of(job))
        weights = sum(p.numel() for p in job.model.parameters())
        run["bytes_per_weight"] = (
            sum(p.nbytes for p in job.model.parameters()) + tensor_bytes(job.optimizer.state_dict())
        ) / weights
        save_atomically(
            {
                "model": job.model.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "schedule": job.schedule.state_dict(),
                "rng": torch.get_rng_state(),
                "run": run,
            },
            path,
        )
    return run


def machine(device):
    """Where and with what, as the heading of a table says it."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor += f", {torch.get_num_threads()} threads"
    return f"{processor}, {datetime.date.today().isoformat()}, PyTorch {torch.__version__}"


def mean_and_spread(runs, score):
    """Of the last rounds, as shown: (mean, largest minus smallest)."""
    final = [score.factor * run[score.key][-1] for run in runs]
    return statistics.mean(final), max(final) - min(final)


def table(title, results, labels, score, device, further=()):
    """Markdown: a line a setting. further: (heading, runs -> text) of more columns."""
    columns = [
        (f"{score.label}, mean", lambda runs: f"{mean_and_spread(runs, score)[0]:.{score.digits}f}"),
        ("spread", lambda runs: f"{mean_and_spread(runs, score)[1]:.{score.digits}f}"),
        ("last training loss", lambda runs: f"{statistics.mean(run['losses'][-1] for run in runs):.3f}"),
        ("bytes a weight, with optimizer state", lambda runs: f"{runs[0]['bytes_per_weight']:.2f}"),
        ("ms a step", lambda runs: f"{1e3 * statistics.mean(run['seconds'] / run['steps'] for run in runs):.1f}"),
        *further,
    ]
    lines = [
        f"{title}, {machine(device)}:",
        "",
        f"| weights | {' | '.join(heading for heading, _ in columns)} |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    lines += [f"| {labels[name]} | {' | '.join(show(runs) for _, show in columns)} |" for name, runs in results.items()]
    return "\n".join(lines)


def plot(path, title, results, labels, score, round_name):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name, runs in results.items():
        rounds = range(1, len(runs[0]["losses"]) + 1)
        left.plot(
            rounds, [statistics.mean(run["losses"][r - 1] for run in runs) for r in rounds], marker="o", markersize=3,
            label=labels[name],
        )  # fmt: skip
        kept = [[score.factor * run[score.key][r - 1] for run in runs] for r in rounds]
        drawn = right.plot(rounds, list(map(statistics.mean, kept)), marker="o", markersize=3)
        right.fill_between(rounds, list(map(min, kept)), list(map(max, kept)), color=drawn[0].get_color(), alpha=0.15, lw=0)
    left.set(xlabel=round_name, ylabel="training loss, nats", title=title)
    right.set(xlabel=round_name, ylabel=score.label)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare(args, device, title, labels, score, round_name, steps, run_one, further=()):
    """Every setting with every seed under a progress bar; then table.md, results.json and curves.png. Returns name -> runs.

    run_one(name, seed, advance) does one run of `steps` steps.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    console, results = Console(), {}
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name in args.settings:
            bar = progress.add_task(labels[name], total=steps * args.seeds)
            results[name] = [
                run_one(name, seed, lambda n, bar=bar: progress.advance(bar, n)) for seed in range(args.seeds)
            ]
            write(args, device, title, results, labels, score, round_name, further)
    console.print((args.output / "table.md").read_text(), markup=False, soft_wrap=True)
    console.print(f"curves: {args.output / 'curves.png'}", markup=False, soft_wrap=True)
    return results


def write(args, device, title, results, labels, score, round_name, further):
    text = table(title, results, labels, score, device, further)
    (args.output / "table.md").write_text(text + "\n")
    told = {"title": title, "machine": machine(device), "device": str(device), "subbyte": subbyte.info()["version"]}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    (args.output / "results.json").write_text(json.dumps({**told, "arguments": options, "runs": results}, indent=1))
    plot(args.output / "curves.png", title, results, labels, score, round_name)
