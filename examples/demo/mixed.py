"""The two mixed settings: widths by matrix, and two widths within each row.

By matrix. The rise of the loss when a weight w becomes w + d is about F d^2 / 2, F the mean square of the loss's gradient at w (the diagonal of the
Fisher information). One backward pass over a little text that no evaluation uses gives F; quantizing each matrix at each width gives d.
The widths then minimize the summed rise under a budget of bits, by one price a bit for the whole model (a Lagrange multiplier).

Within a row. A few input channels carry most of the energy of x, and an error of their weights weighs accordingly. The channels are stored
in the order of their energy over the same text (the permutation `perm` of a packed weight), the first ones in 8 bits and the rest in 4.
"""

import torch
import torch.nn.functional as F
from subbyte import PackedWeight

WIDTHS = (2, 3, 4, 5, 6, 8)


def statistics(model, modules, windows, on_window=lambda: None):
    """(name -> sum over the windows of the squared gradient of their loss, name -> energy of each input channel)."""
    squares = {name: torch.zeros_like(m.weight) for name, m in modules.items()}
    energy = {name: torch.zeros_like(m.weight[0]) for name, m in modules.items()}

    def record(name):
        def hook(module, inputs):
            energy[name] += inputs[0].detach().flatten(0, -2).square().sum(0)

        return hook

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in modules.values():
        module.weight.requires_grad_(True)
    for window in windows:
        window = window.to(next(model.parameters()).device)
        logits = model(window[None]).logits[0]
        F.cross_entropy(logits[:-1].float(), window[1:], reduction="sum").backward()
        for name, module in modules.items():
            squares[name] += module.weight.grad.square()
            module.weight.grad = None
        on_window()
    for module in modules.values():
        module.weight.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    return squares, energy


@torch.no_grad()
def predicted_rise(modules, squares, on_matrix=lambda: None, **packing):
    """Name -> {width: predicted rise of the loss, up to one factor for all}."""
    rise = {}
    for name, module in modules.items():
        rise[name] = {}
        for bits in WIDTHS:
            error = PackedWeight.from_float(module.weight, bits=bits, **packing).dequantize(torch.float32) - module.weight
            rise[name][bits] = (error.square() * squares[name]).sum().item()
        on_matrix()
    return rise


def choose_widths(rise, sizes, mean_bits):
    """Name -> width with the least total rise whose mean over all weights is at most mean_bits."""
    total = sum(sizes.values())

    def widths_at(price):
        return {name: min(WIDTHS, key=lambda b: costs[b] + price * b * sizes[name]) for name, costs in rise.items()}

    low, high = -60.0, 60.0  # powers of two; at 2^60 a bit everything takes the fewest
    for _ in range(100):
        middle = (low + high) / 2
        widths = widths_at(2.0**middle)
        if sum(widths[n] * sizes[n] for n in sizes) > mean_bits * total:
            low = middle
        else:
            high = middle
    return widths_at(2.0**high)


def histogram(widths):
    """Kind of matrix -> {width as text: how many}."""
    counts = {}
    for name, bits in widths.items():
        kind = counts.setdefault(name.rsplit(".", 1)[-1], {})
        kind[str(bits)] = kind.get(str(bits), 0) + 1
    return counts


def row_layout(in_features, group_size):
    """One ninth of the columns, in whole groups, in 8 bits, the rest in 4."""
    wide = max(1, in_features // (9 * group_size)) * group_size
    return f"uint8*{wide}+uint4*{in_features - wide}"
