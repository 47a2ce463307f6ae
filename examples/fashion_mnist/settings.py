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


def packed_adamw(parameters, lr):
    return subbyte.optim.PackedAdamW(parameters, lr=lr, moments="8bit")


def nearest_adamw(parameters, lr):
    """AdamW whose steps on packed weights are rounded to nearest, for comparison: what is below half a level is lost."""
    parameters = list(parameters)
    packed_ones = [p for p in parameters if isinstance(p, subbyte.PackedWeight)]
    others = [p for p in parameters if not isinstance(p, subbyte.PackedWeight)]
    groups = [{"params": packed_ones, "rule": "nbit"}, {"params": others}]
    return subbyte.optim.DiodeMix(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, rounding="nearest")


def fresh(bits=None, format=None, residual_bits=0):
    """Packed weights that start as torch.nn.Linear's on grids that leave them room, and keep `residual_bits` more bits."""
    return packed(bits=bits, format=format, residual_bits=residual_bits, scheme="fan_in", rounding="stochastic", seed=1)


def layers(linear, conv=None):
    """Every Linear but the last, and with `conv` every Conv2d but the first, replaced by what the functions make of it.

    The first convolution sees one channel of pixels and the last layer is the classifier: both stay, as in the literature.
    """

    def convert(model):
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        for i, module in enumerate(model):
            if isinstance(module, nn.Linear) and module is not last:
                model[i] = linear(module)
            elif conv is not None and isinstance(module, nn.Conv2d) and module.in_channels > 1:
                model[i] = conv(module)
        return model

    return convert


def quantized(bits):
    return layers(
        lambda m: subbyte.nn.QuantizedLinear.from_float(m, bits=bits), lambda m: subbyte.nn.QuantizedConv2d.from_float(m, bits=bits)
    )


SETTINGS = {
    "fp32": Setting("float32", lambda model: model, adamw),
    # Packed weights, no float copy; "p" with the fused optimizer and 8-bit moments.
    "8": Setting("8 bits, packed", packed(bits=8, sym=True), adamw),
    "4": Setting("4 bits, packed", packed(bits=4, sym=True), adamw),
    "4p": Setting("4 bits, packed, PackedAdamW", packed(bits=4, sym=True), packed_adamw),
    "2": Setting("2 bits, packed", packed(bits=2, sym=True), adamw, 3e-3),
    "2p": Setting("2 bits, packed, PackedAdamW", packed(bits=2, sym=True), packed_adamw, 3e-3),
    "ternary": Setting("ternary, packed", packed(format="ternary"), adamw, 3e-3),
    "1": Setting("1 bit, packed", packed(bits=1), adamw, 3e-3),
    # Bits that training keeps / bits that the forward pass uses; where they are the same there is no residual.
    "8/8": Setting("8/8 bits", fresh(8), packed_adamw),
    "4/4": Setting("4/4 bits", fresh(4), packed_adamw),
    "2/2": Setting("2/2 bits", fresh(2), packed_adamw, 3e-3),
    "1/1": Setting("1/1 bits", fresh(1), packed_adamw, 3e-3),
    "8/4": Setting("8/4 bits", fresh(4, residual_bits=4), packed_adamw),
    "8/2": Setting("8/2 bits", fresh(2, residual_bits=6), packed_adamw),
    "8/ternary": Setting("8 bits/ternary", fresh(format="ternary", residual_bits=6), packed_adamw),
    "8/1": Setting("8/1 bits", fresh(1, residual_bits=7), packed_adamw),
    "4/2": Setting("4/2 bits", fresh(2, residual_bits=2), packed_adamw),
    "4/1": Setting("4/1 bits", fresh(1, residual_bits=3), packed_adamw),
    "8/2t": Setting("8/2 bits, torch.optim.AdamW", fresh(2, residual_bits=6), adamw),
    "8/8n": Setting("8/8 bits, rounded to nearest", fresh(8), nearest_adamw),
    "4/4n": Setting("4/4 bits, rounded to nearest", fresh(4), nearest_adamw),
    "2/2n": Setting("2/2 bits, rounded to nearest", fresh(2), nearest_adamw, 3e-3),
    "1/1n": Setting("1/1 bits, rounded to nearest", fresh(1), nearest_adamw, 3e-3),
    # Latent float weights: quantization aware training.
    "q8": Setting("8-bit weights and activations (Q8)", quantized(8), adamw),
    "q4": Setting("4-bit weights and activations (Q4)", quantized(4), adamw),
    "bitlinear": Setting(
        "BitLinear: ternary weights, 8-bit activations", layers(subbyte.nn.BitLinear.from_linear), adamw
    ),
    "multiternary": Setting("two ternary terms", layers(lambda m: subbyte.nn.MultiTernaryLinear.from_linear(m, k=2)), adamw),
    "binary": Setting(
        "1-bit weights and activations",
        layers(subbyte.nn.BinaryLinear.from_linear, subbyte.nn.BinaryConv2d.from_conv2d),
        adamw,
    ),
}
