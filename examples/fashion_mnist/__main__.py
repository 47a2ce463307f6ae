"""Trains a small network on Fashion-MNIST with low-bit weights, one run a setting and seed, and compares them.

python -m examples.fashion_mnist                               the MLP, every setting, three seeds
python -m examples.fashion_mnist --model cnn --settings fp32 4  the CNN, two settings

Writes curves.png, results.json and table.md into the output folder. Every epoch ends in a checkpoint: a run that was
interrupted goes on where it stood.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from .. import training
from . import data
from .settings import MODELS, SETTINGS

SCORE = training.Score("accuracy", "test accuracy, %", 100, 2)
LABELS = {name: setting.label for name, setting in SETTINGS.items()}


def arguments(argv=None):
    parser = training.parser("fashion_mnist", __doc__, SETTINGS)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=60000, help="training images used (all 60000)")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help=f"folder with the four IDX files ({data.FOLDER})")
    return training.parse(parser, argv, ("epochs", "batch", "images"))


def accuracy(model, images, labels):
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000)))
    return hits / len(labels)


def train(args, name, seed, dataset, device, advance):
    """One run: {"losses": [one an epoch], "accuracy": [...], ...}. Goes on from its checkpoint when there is one."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    model = setting.convert(MODELS[args.model]()).to(device)
    optimizer = setting.optimizer(model.parameters(), setting.lr)
    images, labels = (t[: args.images] for t in dataset["train"])
    steps = -(-len(labels) // args.batch)
    job = training.Job(
        model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps),
        batches=lambda: torch.randperm(len(labels)).to(device).split(args.batch),
        loss=lambda batch: F.cross_entropy(model(images[batch]), labels[batch]),
        score=lambda: accuracy(model, *dataset["test"]),
    )
    path = training.checkpoint_path(args, args.model, name, seed, args.epochs, args.batch, len(labels))
    return training.train(job, path, SCORE, args.epochs, device, advance)


def main(argv=None):
    args = arguments(argv)
    device = training.device_of(args)
    dataset = data.load(device, args.data)
    steps = -(-min(args.images, 60000) // args.batch) * args.epochs
    title = f"Fashion-MNIST, {args.model}, {args.epochs} epochs, {args.seeds} seeds"
    training.compare(
        args, device, title, LABELS, SCORE, "epoch", steps,
        lambda name, seed, advance: train(args, name, seed, dataset, device, advance),
    )  # fmt: skip


if __name__ == "__main__":
    main()
