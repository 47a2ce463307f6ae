"""Optimizer moments in 32, 16 or 8 bits, as tensors of an optimizer's state.

16 bits: bfloat16. 8 bits: codes and the largest magnitude of every 256 elements; signed moments on an even grid, moments that
are never negative on the grid of fourth powers, which is dense near 0, and never stored as 0 unless they are. Both are rounded
stochastically: a slow average takes steps far below one unit, which nearest rounding would lose.
"""

import torch

from ..packed_weight import _draw_seed

BLOCK = 256


def uniform_like(t):
    """float32 uniforms in [0, 1) of t's shape and device, from the seeds that stochastic rounding draws."""
    generator = torch.Generator(device=t.device).manual_seed(_draw_seed())
    return torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float32)


def rounded_to_bfloat16(t):
    """float32 to bfloat16, up or down in proportion to the distance: the mean is t."""
    bits = t.float().contiguous().view(torch.int32)
    cut = (bits + (uniform_like(t) * 65536).to(torch.int32)) & -65536
    # Infinities and NaN keep their bits.
    return torch.where(t.isfinite(), cut, bits).view(torch.float32).to(torch.bfloat16)


def _blocks(t):
    flat = t.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def store(state, name, value, bits, signed=True):
    """Keeps `value` in state[name] (and state[name + "_absmax"])."""
    if bits == 32:
        state[name] = value
    elif bits == 16:
        state[name] = rounded_to_bfloat16(value)
    else:
        blocks = _blocks(value.float())
        top = blocks.abs().amax(1, keepdim=True)
        unit = blocks / torch.where(top > 0, top, torch.ones_like(top))
        if signed:
            codes = torch.floor(unit * 127 + uniform_like(unit)).clamp_(-127, 127).to(torch.int8)
        else:
            # Rounded in value between the two grid points around it.
            low = torch.floor(unit.sqrt().sqrt() * 255).clamp_(max=254)
            below, above = (low / 255) ** 4, ((low + 1) / 255) ** 4
            up = uniform_like(unit) * (above - below) < unit - below
            codes = torch.where(unit > 0, (low + up).clamp_(min=1), low).to(torch.uint8)
        state[name] = codes.flatten()[: value.numel()].view(value.shape)
        state[name + "_absmax"] = top.squeeze(1)


def load(state, name, bits, dtype, signed=True):
    """The value kept by store, as `dtype`. With 32 bits the tensor itself."""
    kept = state[name]
    if bits != 8:
        return kept.to(dtype)
    codes = _blocks(kept.float())
    unit = codes / 127 if signed else (codes / 255) ** 4
    return (unit * state[name + "_absmax"][:, None]).flatten()[: kept.numel()].view(kept.shape).to(dtype)
