"""What the program compares: for each setting, how the float model becomes a low-bit one and what trains it."""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn

import subbyte


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


MODELS = {"mlp": mlp, "cnn": cnn}


@dataclass(frozen=True)
class Setting:
    label: str
    convert: Callable  # float model -> model that is trained
    optimizer: Callable  # (parameters, lr) -> torch.optim.Optimizer
    lr: float = 1e-3


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


def packed(**options):
    def convert(model):
        subbyte.quantize_(model, progress=False, **options)
        return model

    return convert


SETTINGS = {
    "fp32": Setting("float32", lambda model: model, adamw),
    "8": Setting("8 bits, packed", packed(bits=8, sym=True), adamw),
    "4": Setting("4 bits, packed", packed(bits=4, sym=True), adamw),
    "2": Setting("2 bits, packed", packed(bits=2, sym=True), adamw, 3e-3),
    "ternary": Setting("ternary, packed", packed(format="ternary"), adamw, 3e-3),
    "1": Setting("1 bit, packed", packed(bits=1), adamw, 3e-3),
}
