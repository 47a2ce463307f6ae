"""Fused optimizers: one pass over codes, gradient and moments of a packed weight (torch.ops.subbyte.packed_*_).

Against torch.optim on a PackedWeight, which dequantizes, steps and encodes: no dense copy of the weight and no dense float32 state
exist, and a weight's moments take 0.5 to 4 bytes each. Parameters that are not packed get torch.optim's own step.
"""

import math

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .. import _library
from ..packed_weight import PackedWeight

_ops = _library.load()

MOMENTS = ("float32", "bfloat16", "8bit", "4bit")
_BLOCK = 256  # columns that share an absmax
_STEPS = 40  # bits of the Philox offset that count steps; those above number the parameters


def _moment(kind, weight):
    """(values, absmax or None), zeros. Shapes: subbyte/ops/packed_update/packed_update.h."""
    n, k, device = weight.shape[0], weight.in_features, weight.device
    if kind in ("float32", "bfloat16"):
        return torch.zeros(n, k, dtype=getattr(torch, kind), device=device), None
    columns = k if kind == "8bit" or k < 2 else (k + 1) // 2
    absmax = torch.zeros(n, (k + _BLOCK - 1) // _BLOCK, device=device)
    return torch.zeros(n, columns, dtype=torch.uint8, device=device), absmax


def _check(name, value, low, high=math.inf):
    if isinstance(value, torch.Tensor):
        return
    if not low <= value < high:
        raise ValueError(f"{name} is {value}, expected {low} <= {name}" + (f" < {high}" if high < math.inf else ""))


def _check_moments(names):
    for name in names:
        if name not in MOMENTS:
            raise ValueError(f"moments is {name!r}, expected one of {', '.join(MOMENTS)}")


class _PackedOptimizer(torch.optim.Optimizer):
    """What the three have in common: which parameter is stepped how, random offsets, state files, update in backward.

    Random bits are a function of (seed, position of the parameter among all, its step, element): a run is repeatable and resumable
    without any generator, and ranks that see the same gradients keep the same bits.
    """

    def __init__(self, params, defaults):
        self._in_backward = None
        super().__init__(params, defaults)

    def _packed_step(self, group, p, grad, state, offset, tail):
        raise NotImplementedError

    def _dense_step(self, group, params, grads):
        raise NotImplementedError

    # ---- steps

    @torch.no_grad()
    def step(self, closure=None, *, grad_factor=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_factor: float32 tensor of one element on the parameters' device; gradients count times it. Clipping by a norm or
                unscaling without the host looking at the number, and without a pass over the gradients of packed weights.
        After update_in_backward the parameters have been stepped already, and there is nothing left to do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is None:
            index = 0
            for group in self.param_groups:
                ready = []
                for p in group["params"]:
                    if p.grad is not None:
                        ready.append((index, p))
                    index += 1
                self._step_params(group, ready, grad_factor)
        elif grad_factor is not None:
            raise ValueError("step: grad_factor comes too late, the parameters were updated during the backward pass")
        return loss

    def _step_params(self, group, ready, grad_factor):
        for index, p in ready:
            if not isinstance(p, PackedWeight):
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of a packed table is sparse, which this optimizer does not take. "
                    "torch.optim.SGD, SparseAdam and Adagrad do, and DiodeMix for 1-bit tables; or make the table with sparse=False"
                )
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
            tail = {"maximize": group["maximize"], "grad_factor": grad_factor, "seed": group["seed"]}
            if p.residual is not None:
                tail.update(residual=p.residual, residual_bits=p.residual_bits)
            state["step"] += 1
            if group["capturable"]:
                tail["counter"] = state["step"].long()
                offset = index << _STEPS
            else:
                offset = index << _STEPS | int(state["step"])
            self._packed_step(group, p, p.grad, state, offset, tail)
        dense = [p for _, p in ready if not isinstance(p, PackedWeight)]
        if dense:
            grads = [p.grad for p in dense]
            if grad_factor is not None:
                grads = [g * grad_factor.to(g.dtype) for g in grads]
            self._dense_step(group, dense, grads)

    def update_in_backward(self):
        """From now on a parameter is updated, and its gradient freed, as soon as the backward pass has it.

        The dense gradient of a layer is gone before that of the next exists. step() then only runs a closure; learning rate
        schedulers work as before. Accumulation over several backward passes and clipping by the norm of all gradients are not
        possible in this mode. Returns a handle whose remove() ends it.
        """
        if self._in_backward is not None:
            raise RuntimeError("update_in_backward: this optimizer does so already")
        hooks = []
        index = 0
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    hooks.append(p.register_post_accumulate_grad_hook(self._hook(at, index)))
                index += 1
        self._in_backward = _InBackward(self, hooks)
        return self._in_backward

    def _hook(self, at, index):
        @torch.no_grad()
        def update(p):
            self._step_params(self.param_groups[at], [(index, p)], None)
            p.grad = None

        return update

    def add_param_group(self, param_group):
        if getattr(self, "_in_backward", None) is not None:
            raise RuntimeError("add_param_group: end update_in_backward first")
        super().add_param_group(param_group)

    # ---- state

    def state_bytes(self):
        """Bytes of all state tensors, of packed and other parameters."""
        return sum(t.nbytes for state in self.state.values() for t in state.values() if isinstance(t, torch.Tensor))

    def __getstate__(self):
        state = super().__getstate__()
        state["_in_backward"] = None  # hooks stay with the parameters they hang on
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", None)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """As torch.optim's. The moments of packed weights keep their types: torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(saved, own):
            if isinstance(p, PackedWeight) and i in state_dict["state"]:
                for name, value in state_dict["state"][i].items():
                    if isinstance(value, torch.Tensor):
                        to = "cpu" if name == "step" and not group["capturable"] else p.device
                        self.state[p][name] = value.to(to, copy=True)
                    elif value is not None:
                        self.state[p][name] = value


class _InBackward:
    def __init__(self, optimizer, hooks):
        self._optimizer, self._hooks = optimizer, hooks

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer is not None:
            self._optimizer._in_backward = None
        self._optimizer = None


def _moments_of(state, names, kinds, weight):
    """[m, m_absmax, v, v_absmax ...] of the state, made on first use."""
    out = []
    for name, kind in zip(names, kinds):
        if name not in state:
            state[name], absmax = _moment(kind, weight)
            if absmax is not None:
                state[f"{name}_absmax"] = absmax
        out += [state[name], state.get(f"{name}_absmax")]
    return out


class PackedAdamW(_PackedOptimizer):
    """torch.optim.AdamW (Loshchilov and Hutter, 2019) on packed weights, with low-bit moments.

    The step is torch.optim.AdamW's; the result is rounded stochastically onto the weight's own grid, so that steps far below one
    level are kept on average. Gradient elements that are NaN, infinite or beyond 2^63 change nothing.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW's.
        moments: how a packed weight's two moments are kept: "float32", "bfloat16", "8bit" (1.02 bytes a weight each) or "4bit"
            (0.52); one name, or a pair for first and second. Rounded stochastically; formula in packed_update.h.
        seed: of the random bits.
        capturable: step counts live on the device, so that step() can be captured in a CUDA graph.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        moments="8bit",
        maximize=False,
        seed=0,
        capturable=False,
    ):
        _check("lr", lr, 0)
        for i, beta in enumerate(betas):
            _check(f"betas[{i}]", beta, 0, 1)
        _check("eps", eps, 0)
        _check("weight_decay", weight_decay, 0)
        kinds = (moments, moments) if isinstance(moments, str) else tuple(moments)
        if len(kinds) != 2:
            raise ValueError(f"moments is {moments!r}, expected a name or two of them")
        _check_moments(kinds)
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, moments=kinds, maximize=maximize)
        super().__init__(params, {**defaults, "seed": seed, "capturable": capturable})

    def _packed_step(self, group, p, grad, state, offset, tail):
        kinds = group["moments"]
        kinds = (kinds, kinds) if isinstance(kinds, str) else kinds
        moments = _moments_of(state, ("m", "v"), kinds, p)
        beta1, beta2 = group["betas"]
        lr, corrections = group["lr"], (1.0, 1.0)
        if group["capturable"]:
            step = state["step"].double()
            tail["numbers"] = torch.stack(
                [torch.as_tensor(lr, dtype=torch.double, device=p.device), 1 - beta1**step, 1 - beta2**step]
            ).float()
            lr = 0.0
        else:
            corrections = tuple(1 - beta ** int(state["step"]) for beta in (beta1, beta2))
        _ops.packed_adamw_(
            *p.packed_args, grad, *moments, float(lr), beta1, beta2, group["eps"], group["weight_decay"], *corrections,
            offset=offset, **tail,
        )  # fmt: skip

    def _dense_step(self, group, params, grads):
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class PackedSGD(_PackedOptimizer):
    """torch.optim.SGD on packed weights: momentum, dampening, Nesterov, weight decay added to the gradient.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD's.
        moments, seed: as PackedAdamW's; one moment, and none without momentum.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        *,
        moments="8bit",
        maximize=False,
        seed=0,
    ):
        _check("lr", lr, 0)
        _check("momentum", momentum, 0)
        _check("weight_decay", weight_decay, 0)
        _check_moments((moments,))
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, {**defaults, "moments": moments, "maximize": maximize, "seed": seed, "capturable": False})

    def _packed_step(self, group, p, grad, state, offset, tail):
        momentum = group["momentum"]
        moments = _moments_of(state, ("m",), (group["moments"],), p) if momentum != 0 else [None, None]
        dampening = 0.0 if int(state["step"]) == 1 else group["dampening"]  # the first average is the gradient
        _ops.packed_sgd_(
            *p.packed_args, grad, *moments, float(group["lr"]), momentum, dampening, group["nesterov"], group["weight_decay"],
            offset=offset, **tail,
        )  # fmt: skip

    def _dense_step(self, group, params, grads):
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=False,
        )
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer


class PackedLion(_PackedOptimizer):
    """Steps by the sign of an averaged gradient, with one moment (Lion: Chen et al., 2023).

        c = beta1 m + (1 - beta1) g;   m <- beta2 m + (1 - beta2) g;   w <- w (1 - lr weight_decay) - lr sign(c) where |c| > threshold

    With equal betas it steps by the sign of momentum. On 1-bit weights a step of one level or more (lr at least the scale, 2 s)
    flips every weight whose average exceeds the threshold and points the other way (Bop: Helwegen et al., 2019).

    Args:
        params, lr, betas, weight_decay: as above.
        threshold: averages of at most this size do not step.
        moments, maximize, seed: as PackedAdamW's.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        threshold=0.0,
        *,
        moments="8bit",
        maximize=False,
        seed=0,
    ):
        _check("lr", lr, 0)
        for i, beta in enumerate(betas):
            _check(f"betas[{i}]", beta, 0, 1)
        _check("weight_decay", weight_decay, 0)
        _check("threshold", threshold, 0)
        _check_moments((moments,))
        defaults = dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, threshold=threshold, moments=moments)
        super().__init__(params, {**defaults, "maximize": maximize, "seed": seed, "capturable": False})

    def _packed_step(self, group, p, grad, state, offset, tail):
        moments = _moments_of(state, ("m",), (group["moments"],), p)
        _ops.packed_sign_(
            *p.packed_args, grad, *moments, float(group["lr"]), *group["betas"], group["threshold"], group["weight_decay"],
            offset=offset, **tail,
        )  # fmt: skip

    def _dense_step(self, group, params, grads):
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        for p, grad in zip(params, grads):
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            grad = -grad if group["maximize"] else grad
            c = m.lerp(grad, 1 - beta1)
            m.lerp_(grad, 1 - beta2)
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(torch.where(c.abs() > group["threshold"], c.sign(), 0.0), alpha=-lr)
