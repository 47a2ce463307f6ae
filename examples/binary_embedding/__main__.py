"""Tells from which book of the Bible a verse is, by a table of one bit a weight that is trained as it is.

python -m examples.binary_embedding                every setting, three seeds: minutes on a CPU

A verse is its words and pairs of neighbouring words, hashed into the rows of a table; the mean of the rows goes through a float head.
The binary table's gradient is one sign bit a weight of the rows that the batch named, and a step reads and moves those rows only.
Every tenth verse is held out. Writes curves.png, results.json and table.md into the output folder; a run that was interrupted goes on
at its last epoch.
"""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

import subbyte
from subbyte.functional.embedding import RowMomentum

from .. import texts, training

SCORE = training.Score("accuracy", "right book of 66, %", 100, 2)
LONGEST = 128  # words and pairs kept of a verse


class Classifier(nn.Module):
    def __init__(self, table, dim, classes):
        super().__init__()
        self.table, self.norm, self.head = table, nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, tokens):
        """Logits [B, classes] of verses int64 [B, L]; 0 is no token."""
        count = (tokens != 0).sum(1, keepdim=True).clamp_min(1)
        return self.head(self.norm(self.table(tokens).sum(1) / count))


class SignUpdates:
    """BinaryEmbedding.update_ as an optimizer: its state, the averages of touched rows, belongs into a checkpoint."""

    def __init__(self, table, beta):
        self.table, self.beta = table, beta

    def step(self):
        self.table.update_("momentum", beta=self.beta)

    def zero_grad(self, set_to_none=True):
        self.table.zero_grad()

    def state_dict(self):
        return {} if self.table.momentum is None else self.table.momentum.state_dict()

    def load_state_dict(self, state):
        if state:
            self.table.momentum = RowMomentum(state["embedding_dim"], state["momentum"].dtype, state["start"])
            self.table.momentum.load_state_dict(state)


class Together:
    """Several optimizers, or several schedules, as one."""

    def __init__(self, *parts):
        self.parts = parts

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, kept in zip(self.parts, state["parts"]):
            part.load_state_dict(kept)


@dataclass(frozen=True)
class Setting:
    label: str
    table: Callable  # (rows, dim) -> module
    optimizer: Callable  # table -> what steps it, or None


def binary(gradient):
    return lambda rows, dim: subbyte.nn.BinaryEmbedding(rows, dim, padding_idx=0, gradient=gradient)


def frozen(rows, dim):
    table = binary("sparse")(rows, dim)
    table.weight.requires_grad_(False)
    return table


SETTINGS = {
    "float": Setting(
        "float32 table, SparseAdam",
        lambda rows, dim: nn.Embedding(rows, dim, padding_idx=0, sparse=True),
        lambda table: torch.optim.SparseAdam(table.parameters(), lr=3e-2),
    ),
    "signs": Setting(
        "1-bit table, packed sign gradients, int8 averages", binary("packed"), lambda table: SignUpdates(table, beta=0.9)
    ),
    "diode": Setting(
        "1-bit table, sparse gradients, DiodeMix",
        binary("sparse"),
        lambda table: subbyte.optim.DiodeMix(table.parameters(), lr=1.0, betas=(0.9, 0.9)),
    ),
    "frozen": Setting("1-bit table, as it was drawn", frozen, lambda table: None),
}
LABELS = {name: setting.label for name, setting in SETTINGS.items()}


def arguments(argv=None):
    parser = training.parser("binary_embedding", __doc__, SETTINGS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64, help="verses a step (64)")
    parser.add_argument("--rows", type=int, default=1 << 16, help="of the table (65536)")
    parser.add_argument("--dim", type=int, default=128, help="columns of the table (128)")
    parser.add_argument("--verses", type=int, default=10**9, help="used, spread over all books (all 31102)")
    parser.add_argument("--data", type=Path, help="folder with kjv.txt, see examples/texts.py; else the program `bible` is asked")
    return training.parse(parser, argv, ("epochs", "batch", "rows", "dim", "verses"))


def tokens_of(text, rows):
    """Row numbers of the words and pairs of a text, the same in every process."""
    words = re.findall(r"[a-z']+", text.lower())
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:])]
    return [1 + zlib.crc32(token.encode()) % (rows - 1) for token in (words + pairs)[:LONGEST]]


def load(args, device):
    """(training tokens [n, L], books [n]), (the same of every tenth verse), number of books."""
    found = texts.verses(folder=args.data)
    found = found[:: max(1, len(found) // args.verses)]
    books = {book: i for i, book in enumerate(dict.fromkeys(verse.book for verse in found))}
    tokens = torch.zeros(len(found), LONGEST, dtype=torch.int64)
    for row, verse in zip(tokens, found):
        own = tokens_of(verse.text, args.rows)
        row[: len(own)] = torch.tensor(own)
    labels = torch.tensor([books[verse.book] for verse in found])
    held_out = torch.arange(len(found)) % 10 == 9
    learn, test = ((tokens[part].to(device), labels[part].to(device)) for part in (~held_out, held_out))
    return learn, test, len(books)


def accuracy(model, tokens, labels):
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(tokens.split(512), labels.split(512)))
    return hits / len(labels)


def train(args, name, seed, dataset, device, advance):
    """One run, see training.train."""
    setting = SETTINGS[name]
    (tokens, labels), test, classes = dataset
    torch.manual_seed(seed)
    model = Classifier(setting.table(args.rows, args.dim), args.dim, classes).to(device)
    head = torch.optim.AdamW([*model.norm.parameters(), *model.head.parameters()], lr=3e-3)
    table = setting.optimizer(model.table)
    optimizers = [head] if table is None else [head, table]
    steps = -(-len(labels) // args.batch)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
        for optimizer in optimizers
        if isinstance(optimizer, (torch.optim.AdamW, torch.optim.SparseAdam))  # averages of signs have no rate to lower
    ]
    job = training.Job(
        model=model,
        optimizer=Together(*optimizers),
        schedule=Together(*schedules),
        batches=lambda: torch.randperm(len(labels)).to(device).split(args.batch),
        loss=lambda batch: F.cross_entropy(model(tokens[batch]), labels[batch]),
        score=lambda: accuracy(model, *test),
    )
    path = training.checkpoint_path(args, name, seed, args.epochs, args.batch, len(labels), args.rows, args.dim)
    return training.train(job, path, SCORE, args.epochs, device, advance)


def main(argv=None):
    args = arguments(argv)
    device = training.device_of(args)
    dataset = load(args, device)
    steps = -(-len(dataset[0][1]) // args.batch) * args.epochs
    title = f"Books of verses, table [{args.rows}, {args.dim}], {args.epochs} epochs, {args.seeds} seeds"
    training.compare(
        args, device, title, LABELS, SCORE, "epoch", steps,
        lambda name, seed, advance: train(args, name, seed, dataset, device, advance),
    )  # fmt: skip


if __name__ == "__main__":
    main()
