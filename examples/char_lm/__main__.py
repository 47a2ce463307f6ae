"""Trains a character language model on the King James Bible with every matrix packed: tables, attention, MLP, head.

python -m examples.char_lm                             every setting, three seeds (minutes on a GPU, an hour or more on two cores)
python -m examples.char_lm --settings fp32 8/2 --seeds 1 --steps 100 --batch 16

The gospel of John is held out; the score is the mean loss on it. Writes curves.png, results.json, table.md and samples.txt into the
output folder. A run that was interrupted goes on at its last round.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from .. import texts, training
from .model import CharacterModel, sample
from .settings import SETTINGS

SCORE = training.Score("validation", "validation loss, nats a character", 1, 3)
LABELS = {name: setting.label for name, setting in SETTINGS.items()}
HELD_OUT = ("John",)
WARMUP = 20
PROMPT = "And it came to pass, "


def arguments(argv=None):
    parser = training.parser("char_lm", __doc__, SETTINGS)
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    parser.add_argument("--rounds", type=int, default=8, help="scores and checkpoints a run (8)")
    parser.add_argument("--batch", type=int, default=32, help="windows a step (32)")
    parser.add_argument("--length", type=int, default=128, help="characters a window (128)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--characters", type=int, default=10**9, help="of the training text used (all)")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="times the learning rates of the settings")
    parser.add_argument("--validation-windows", type=int, default=500)
    parser.add_argument("--data", type=Path, help="folder with kjv.txt, see examples/texts.py; else the program `bible` is asked")
    args = training.parse(
        parser, argv, ("steps", "rounds", "batch", "length", "width", "layers", "characters", "validation_windows")
    )
    if args.steps % args.rounds:
        parser.error(f"--steps is {args.steps}, expected a multiple of --rounds, {args.rounds}")
    return args


class Text:
    """The characters of the text as numbers, in one part to learn from and windows [n, length + 1] to measure on."""

    def __init__(self, args, device):
        learn, held_out = texts.without_books(texts.verses(folder=args.data), HELD_OUT)
        self.alphabet = sorted(set(learn + held_out))
        self.learn = self.encode(learn[: args.characters]).to(device)
        windows = self.encode(held_out).unfold(0, args.length + 1, args.length)
        self.validation = windows[: args.validation_windows].to(device)

    def encode(self, text):
        number = {character: i for i, character in enumerate(self.alphabet)}
        return torch.tensor([number[character] for character in text])

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)

    def draw(self, batch, length):
        """Random windows [batch, length + 1]."""
        starts = torch.randint(len(self.learn) - length, (batch,)).to(self.learn.device)
        return self.learn[starts[:, None] + torch.arange(length + 1, device=self.learn.device)]


def loss_of(model, windows):
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def mean_loss(model, windows):
    return sum(float(loss_of(model, part)) * len(part) for part in windows.split(100)) / len(windows)


def prepare(args, name, seed, text, device):
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    model = setting.convert(CharacterModel(len(text.alphabet), args.width, args.layers, length=args.length)).to(device)
    optimizer = setting.optimizer(model.parameters(), args.lr_factor * setting.lr)
    warmup = min(WARMUP, args.steps // 2)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 1 / (warmup + 1), 1, warmup),
            schedules.CosineAnnealingLR(optimizer, args.steps - warmup),
        ],
        [warmup],
    )
    return training.Job(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        batches=lambda: (text.draw(args.batch, args.length) for _ in range(args.steps // args.rounds)),
        loss=lambda windows: loss_of(model, windows),
        score=lambda: mean_loss(model, text.validation),
    )


def train(args, name, seed, text, device, advance):
    """One run, see training.train; with seed 0 the result has a "sample"."""
    job = prepare(args, name, seed, text, device)
    path = training.checkpoint_path(
        args, name, seed, args.steps, args.rounds, args.batch, args.length, args.width, args.layers, args.lr_factor
    )
    run = training.train(job, path, SCORE, args.rounds, device, advance)
    if seed == 0:
        job.model.eval()
        run["sample"] = text.decode(sample(job.model, text.encode(PROMPT).to(device), 200).tolist())
    return run


def main(argv=None):
    args = arguments(argv)
    device = training.device_of(args)
    text = Text(args, device)
    title = f"Character language model, {args.width} wide, {args.layers} blocks, {args.steps} steps, {args.seeds} seeds"
    results = training.compare(
        args, device, title, LABELS, SCORE, f"round of {args.steps // args.rounds} steps", args.steps,
        lambda name, seed, advance: train(args, name, seed, text, device, advance),
    )  # fmt: skip
    samples = "\n\n".join(f"--- {LABELS[name]}\n{runs[0]['sample']}" for name, runs in results.items())
    (args.output / "samples.txt").write_text(samples + "\n")
    print(samples)


if __name__ == "__main__":
    main()
