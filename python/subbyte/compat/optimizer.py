"""The update rules of integer parameters, as their static `update` methods call them (bitorch_engine.optim, DiodeMix)."""

import math

import torch


def count(step):
    """Adds one to a step counter, a tensor of one element or None, and gives it as an int; None counts as the first step."""
    if step is None:
        return 1
    step += 1
    return int(step)


def signs_of(weight, dtype=torch.float32):
    """+1 where weight >= 0, else -1."""
    return torch.where(weight.detach() >= 0, 1.0, -1.0).to(dtype)


def sign_state(weight_signs):
    """Where the slow average of signs starts: -sign(w) delta, delta uniform in [0, 0.001)."""
    return -weight_signs * 1e-3 * torch.rand_like(weight_signs)


@torch.no_grad()
def flip_signs(weight, grad, slow, fast, step, lr, beta1, beta2, projector=None):
    """l += (1 - beta1)(g - l); s += (1 - beta2)(lr sign(l) - s); w := -w where sign(w) is not -sign(s), s = 0 meaning +1. An
    element whose gradient is NaN or infinite keeps l, and without a projector s and w."""
    count(step)
    finite = grad.isfinite()
    fast.add_(torch.where(finite, (grad.to(fast.dtype) - fast) * (1 - beta1), 0))
    direction = fast if projector is None else projector.project_back(fast)
    change = (lr * direction.to(slow.dtype).sign() - slow) * (1 - beta2)
    wanted = torch.where(slow + change <= 0, 1.0, -1.0)
    if projector is None:
        change, wanted = torch.where(finite, change, 0), torch.where(finite, wanted, signs_of(weight))
    slow.add_(change)
    values = weight.detach()
    # An exact 0 counts as +1; what becomes negative takes the least magnitude.
    flipped = torch.where(values == 0, -torch.ones_like(values), -values)
    values.copy_(torch.where(wanted != signs_of(values), flipped, values))


@torch.no_grad()
def adam_change(grad, square, mean, step, lr, beta1, beta2, eps, dtype, correct_bias, projector=None):
    """eta project_back(m / (sqrt(v) + eps)) after m and v have taken in grad; eta = lr sqrt(1 - beta2^t) / (1 - beta1^t). An
    element whose gradient is NaN or infinite keeps m and v and has no part in the step."""
    t = count(step)
    grad, finite = grad.to(mean.dtype), grad.isfinite()
    mean.copy_(torch.where(finite, beta1 * mean + (1 - beta1) * grad, mean))
    square.copy_(torch.where(finite, beta2 * square + (1 - beta2) * grad * grad, square))
    direction = torch.where(finite, mean / (square.sqrt() + eps), 0)
    if projector is not None:
        direction = projector.project_back(direction)
    eta = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) if correct_bias else lr
    return (eta * direction).to(dtype)
