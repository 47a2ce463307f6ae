"""Fused optimizers: one pass over codes, gradient and moments of a packed weight (torch.ops.subbyte.packed_*_).

Against torch.optim on a PackedWeight, which dequantizes, steps and encodes: no dense copy of the weight and no dense float32 state
exist, and a weight's moments take 0.5 to 4 bytes each. Parameters that are not packed get torch.optim's own step.
"""

import math

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .. import _library
from .._formats import default_scheme
from ..packed_weight import packed_of

_ops = _library.load()

MOMENTS = ("float32", "bfloat16", "8bit", "4bit")
SCALES = ("fixed", "trained", "reestimated")
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


def _check_scales(scales, scale_lr, reestimate_every, capturable):
    if scales not in SCALES:
        raise ValueError(f"scales is {scales!r}, expected one of {', '.join(SCALES)}")
    _check("scale_lr", scale_lr, 0)
    if isinstance(reestimate_every, bool) or not isinstance(reestimate_every, int) or reestimate_every < 1:
        raise ValueError(f"reestimate_every is {reestimate_every!r}, expected an integer of at least 1")
    if scales == "reestimated" and capturable:
        raise ValueError("scales is 'reestimated' with capturable=True: which step does so is decided on the host")


class _Rows:
    """Rows of a packed weight as ops want them: views of a block of rows, or copies of those that a sparse gradient names."""

    def __init__(self, weight, take):
        self.codes, self.scales = take(weight.codes), take(weight.scales)
        self.zeros, self.offsets = (None if part is None else take(part) for part in (weight.zeros, weight.offsets))
        self.perm, self.format = weight.perm, weight.format
        self.in_features, self.group_size = weight.in_features, weight.group_size

    @property
    def packed_args(self):
        return (self.codes, self.scales, self.zeros, self.offsets, self.perm, self.format, self.in_features, self.group_size)


_BLOCK_ELEMS = 1 << 20  # of a block of rows that is held in float32
_SEED_STEP = 0x9E3779B97F4A7C15  # seeds of blocks lie far apart


class _PackedOptimizer(torch.optim.Optimizer):
    """What the three have in common: which parameter is stepped how, random offsets, state files, update in backward.

    Random bits are a function of (seed, position of the parameter among all, its step, element): a run is repeatable and resumable
    without any generator, and ranks that see the same gradients keep the same bits.

    Sparse gradients (torch.sparse_coo, rows of an embedding table): duplicates are summed first, and then only the named rows
    are read and written, those of the codes and those of the moments (lazy, as torch.optim.SparseAdam: a row's moments and
    decay rest while it is not named; the bias corrections count the parameter's steps). The random bits count the named rows in
    order.

    Scales and zeros or offsets of packed weights, by `scales`:
        "fixed"        they stay.
        "trained"      by Adam on their own gradient, formed from the weight's, whatever rule steps the codes: formula in
                       subbyte_torch/ops/affine_update.h; rates lr * scale_lr of the shift and lr * scale_lr * 2 / (levels - 1)
                       of the scale. State: 8 bytes each a group, 12 where they have 16 bits.
        "reestimated"  every reestimate_every-th step is taken on a fine grid without ends, and scales and zeros or offsets are
                       chosen anew for the stepped values, by `scheme` ("minmax", "absmax", "absmean"; None: the one that
                       quantization uses by default). Not for weights with a residual plane, whose grid is nested in this one.
    """

    _betas_of_scales = (0.9, 0.999)

    def __init__(self, params, defaults):
        self._in_backward = None
        super().__init__(params, defaults)

    def _moment_kinds(self, group):
        """{name: kind} of the moments of a packed weight."""
        raise NotImplementedError

    def _packed_step(self, group, w, grad, state, offset, tail):
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
        for index, parameter in ready:
            p = packed_of(parameter)
            if p is None:
                continue
            if p.transposed:
                raise ValueError("step: the parameter is a transposed view of a PackedWeight")
            state, grad, seed = self.state[parameter], parameter.grad, group["seed"]
            if p is not parameter:  # the rows of this rank, whose random bits are counted from their own first one
                grad = grad._local_tensor
                seed = (seed + _SEED_STEP * parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)) % 2**63
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
            tail = {"maximize": group["maximize"], "grad_factor": grad_factor, "seed": seed}
            if p.residual is not None:
                tail.update(residual=p.residual, residual_bits=p.residual_bits)
            state["step"] += 1
            if group["capturable"]:
                tail["counter"] = state["step"].long()
                offset = index << _STEPS
            else:
                offset = index << _STEPS | int(state["step"])
            self._make_state(group, p, state)
            if grad.layout == torch.strided:
                self._step_rows(group, p, grad, state, offset, tail)
                continue
            grad = grad.coalesce()
            rows, kept = grad.indices()[0], {k: t for k, t in state.items() if k != "step" and isinstance(t, torch.Tensor)}
            named = _Rows(p, lambda part: part.index_select(0, rows))
            some = {**state, **{k: t.index_select(0, rows) for k, t in kept.items()}}
            written = [(p.codes, named.codes), *((t, some[k]) for k, t in kept.items())]
            if p.residual is not None:
                tail["residual"] = p.residual.index_select(0, rows)
                written.append((p.residual, tail["residual"]))
            self._step_rows(group, named, grad.values(), some, offset, tail)
            if group["scales"] != "fixed":
                written += [(getattr(p, name), getattr(named, name)) for name in ("scales", "zeros", "offsets")]
            for whole, part in written:
                if whole is not None:
                    whole.index_copy_(0, rows, part)
        dense = [p for _, p in ready if packed_of(p) is None]
        if dense:
            self._step_dense(group, dense, grad_factor)

    def _make_state(self, group, p, state):
        for name, kind in self._moment_kinds(group).items():
            if name not in state:
                state[name], absmax = _moment(kind, p)
                if absmax is not None:
                    state[f"{name}_absmax"] = absmax
        if group["scales"] == "trained" and "affine" not in state:
            state["affine"] = _ops.affine_state(*p.packed_args)

    def _step_rows(self, group, w, grad, state, offset, tail):
        """A step of all rows of w, codes and scales."""
        if group["scales"] == "reestimated" and int(state["step"]) % group["reestimate_every"] == 0:
            self._step_and_choose_grid(group, w, grad, state, offset, tail)
            return
        if group["scales"] == "trained":
            # Before the codes move: the gradient belongs to the codes that made the output.
            rate, corrections, numbers = self._numbers(group, state, w.codes.device, self._betas_of(group), group["scale_lr"])
            _ops.affine_adamw_(
                *w.packed_args, grad, state["affine"], rate, *self._betas_of(group), group.get("eps", 1e-8), *corrections,
                maximize=tail["maximize"], grad_factor=tail["grad_factor"], numbers=numbers,
            )  # fmt: skip
        self._packed_step(group, w, grad, state, offset, tail)

    def _betas_of(self, group):
        return self._betas_of_scales

    @staticmethod
    def _numbers(group, state, device, betas, factor=1.0):
        """(lr, bias corrections, numbers): numbers holds all three on the device of a captured graph, else is None."""
        lr = group["lr"]
        if not group["capturable"]:
            return float(lr) * factor, tuple(1 - beta ** int(state["step"]) for beta in betas), None
        step = state["step"].double()
        # Filled on the device: a captured graph may not copy from the host.
        rate = (lr.double() if isinstance(lr, torch.Tensor) else torch.full((), lr, dtype=torch.double, device=device)) * factor
        return 0.0, (1.0, 1.0), torch.stack([rate, *(1 - beta**step for beta in betas)]).float()

    def _step_and_choose_grid(self, group, w, grad, state, offset, tail):
        if "residual" in tail:
            raise ValueError("scales is 'reestimated', expected 'fixed' or 'trained' for a weight with a residual plane")
        kind = "zeros" if w.zeros is not None else "offsets" if w.offsets is not None else "fixed"
        scheme, _ = default_scheme(w.format, kind == "fixed", group["scheme"], kind)
        block = max(1, _BLOCK_ELEMS // max(1, w.in_features))
        for begin in range(0, w.codes.shape[0], block):
            part = slice(begin, begin + block)
            rows = _Rows(w, lambda t: t[part])
            some = {k: t[part] if isinstance(t, torch.Tensor) and k != "step" else t for k, t in state.items()}
            codes, residual, scales, zeros = _ops.widen(*rows.packed_args)
            wide = _Rows(rows, lambda t: t)
            wide.codes, wide.scales, wide.zeros, wide.offsets, wide.format = codes, scales, zeros, None, "uint8"
            # The bits of an element are counted from the first row of its block: each block has a seed of its own.
            seeds = [(tail["seed"] + _SEED_STEP * (2 * begin + i)) % 2**63 for i in (0, 1)]
            more = {**tail, "seed": seeds[0], "residual": residual, "residual_bits": 8}
            self._packed_step(group, wide, grad[part], some, offset, more)
            _ops.regrid_(*rows.packed_args, codes, residual, scheme, seeds[1], offset)

    def _step_dense(self, group, params, grad_factor):
        """Ordinary parameters: torch's own step, on the named rows alone where the gradient is sparse."""
        ready, grads = [], []
        for p in params:
            grad = p.grad if p.grad.layout == torch.strided else p.grad.coalesce()
            if grad_factor is not None:
                grad = grad * grad_factor.to(grad.dtype)
            if grad.layout == torch.strided:
                ready.append(p)
                grads.append(grad)
                continue
            self._make_dense_state(group, p, self.state[p])
            rows, kept = grad.indices()[0], {k: t for k, t in self.state[p].items() if k != "step"}
            named, some = p.index_select(0, rows), {k: t.index_select(0, rows) for k, t in kept.items()}
            self._dense_step(group, [named], [grad.values()], [{**self.state[p], **some}])
            for whole, part in ((p, named), *((t, some[k]) for k, t in kept.items())):
                whole.index_copy_(0, rows, part)
        if ready:
            self._dense_step(group, ready, grads, [self.state[p] for p in ready])

    def _make_dense_state(self, group, p, state):
        """All state of an ordinary parameter whose gradient is sparse."""
        raise NotImplementedError

    def _dense_step(self, group, params, grads, states):
        raise NotImplementedError

    def update_in_backward(self, average_over=None):
        """From now on a parameter is updated, and its gradient freed, as soon as the backward pass has it.

        The dense gradient of a layer is gone before that of the next exists. step() then only runs a closure; learning rate
        schedulers work as before. Every backward pass is a step: accumulation over several, clipping by the norm of all
        gradients and GradScaler are not possible in this mode, and a graph that is retained cannot be gone through again. When
        a backward pass ends with an exception, what it had reached has been stepped and the rest has not. A parameter that
        reentrant checkpointing (torch.utils.checkpoint, use_reentrant=True) meets in two segments is stepped once in each.

        Args:
            average_over: a process group (torch.distributed.group.WORLD for all ranks): each gradient is averaged over its
                ranks before it is used. This takes the place of DistributedDataParallel, which averages after such updates and
                would leave every rank with weights of its own.
        Returns a handle whose remove() ends it.
        """
        if self._in_backward is not None:
            raise RuntimeError("update_in_backward: this optimizer does so already")
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(getattr(p, "_averaged_after_backward", False) for p in parameters):
            raise RuntimeError(
                "update_in_backward: DistributedDataParallel averages these gradients after the backward pass has used them; "
                "give the process group as average_over and leave the wrapper out"
            )
        hooks = []
        index = 0
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    hooks.append(p.register_post_accumulate_grad_hook(self._hook(at, index, average_over)))
                index += 1
        self._in_backward = _InBackward(self, hooks, parameters)
        return self._in_backward

    def _hook(self, at, index, average_over):
        @torch.no_grad()
        def update(p):
            if average_over is not None:
                dist.all_reduce(p.grad, group=average_over)  # the sum: not every backend averages
                p.grad.div_(dist.get_world_size(average_over))
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
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """As torch.optim's. The moments of packed weights keep their types: torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state_dict of before there was such an option
                group.setdefault(name, value)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(saved, own):
            if packed_of(p) is not None and i in state_dict["state"]:
                for name, value in state_dict["state"][i].items():
                    if isinstance(value, torch.Tensor):
                        to = "cpu" if name == "step" and not group["capturable"] else p.device
                        self.state[p][name] = value.to(to, copy=True)
                    elif value is not None:
                        self.state[p][name] = value


class _InBackward:
    def __init__(self, optimizer, hooks, parameters):
        self._optimizer, self._hooks, self._parameters = optimizer, hooks, parameters
        for p in parameters:
            p._updated_in_backward = True  # for DistributedDataParallel to see

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        for p in self._parameters:
            p._updated_in_backward = False
        self._hooks, self._parameters = [], []
        if self._optimizer is not None:
            self._optimizer._in_backward = None
        self._optimizer = None


def _moments_of(state, *names):
    """[m, m_absmax, v, v_absmax ...] as the ops take them."""
    return [state.get(key) for name in names for key in (name, f"{name}_absmax")]


class PackedAdamW(_PackedOptimizer):
    """torch.optim.AdamW (Loshchilov and Hutter, 2019) on packed weights, with low-bit moments.

    The step is torch.optim.AdamW's; the result is rounded stochastically onto the weight's own grid, so that steps far below one
    level are kept on average. Gradient elements that are NaN, infinite or beyond 2^63 change nothing.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW's.
        moments: how a packed weight's two moments are kept: "float32", "bfloat16", "8bit" (1.02 bytes a weight each) or "4bit"
            (0.52); one name, or a pair for first and second. Rounded stochastically; formula in packed_update.h.
        seed: of the random bits.
        capturable: step counts live on the device, so that step() can be captured in a CUDA graph; lr may be a tensor there.
        scales, scale_lr, reestimate_every, scheme: whether and how scales and zeros or offsets train, see above; 8 to 24 bytes
            a group of state with "trained".
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
        scales="fixed",
        scale_lr=1.0,
        reestimate_every=20,
        scheme=None,
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
        _check_scales(scales, scale_lr, reestimate_every, capturable)
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, moments=kinds, maximize=maximize)
        affine = dict(scales=scales, scale_lr=scale_lr, reestimate_every=reestimate_every, scheme=scheme)
        super().__init__(params, {**defaults, **affine, "seed": seed, "capturable": capturable})

    def _moment_kinds(self, group):
        kinds = group["moments"]
        return dict(zip(("m", "v"), (kinds, kinds) if isinstance(kinds, str) else kinds))

    def _betas_of(self, group):
        return group["betas"]

    def _packed_step(self, group, w, grad, state, offset, tail):
        lr, corrections, numbers = self._numbers(group, state, w.codes.device, group["betas"])
        _ops.packed_adamw_(
            *w.packed_args, grad, *_moments_of(state, "m", "v"), lr, *group["betas"], group["eps"], group["weight_decay"],
            *corrections, offset=offset, numbers=numbers, **tail,
        )  # fmt: skip

    def _make_dense_state(self, group, p, state):
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _dense_step(self, group, params, grads, states):
        for p, state in zip(params, states):
            self._make_dense_state(group, p, state)
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
        capturable: as PackedAdamW's, without dampening: that the first step has none is decided on the host. A tensor as lr
            steps packed weights alone.
        scales, scale_lr, reestimate_every, scheme: as PackedAdamW's.
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
        capturable=False,
        scales="fixed",
        scale_lr=1.0,
        reestimate_every=20,
        scheme=None,
    ):
        _check("lr", lr, 0)
        _check("momentum", momentum, 0)
        _check("weight_decay", weight_decay, 0)
        _check_moments((moments,))
        _check_scales(scales, scale_lr, reestimate_every, capturable)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")
        if capturable and dampening != 0:
            raise ValueError(f"dampening is {dampening} with capturable=True, expected 0")
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        affine = dict(scales=scales, scale_lr=scale_lr, reestimate_every=reestimate_every, scheme=scheme)
        super().__init__(
            params, {**defaults, **affine, "moments": moments, "maximize": maximize, "seed": seed, "capturable": capturable}
        )

    def _moment_kinds(self, group):
        return {"m": group["moments"]} if group["momentum"] != 0 else {}

    def _packed_step(self, group, w, grad, state, offset, tail):
        # Of a first step the average is the gradient.
        dampening = group["dampening"] if group["dampening"] == 0 or int(state["step"]) > 1 else 0.0
        lr, _, numbers = self._numbers(group, state, w.codes.device, (0.0, 0.0))
        _ops.packed_sgd_(
            *w.packed_args, grad, *_moments_of(state, "m"), lr, group["momentum"], dampening, group["nesterov"],
            group["weight_decay"], offset=offset, numbers=numbers, **tail,
        )  # fmt: skip

    def _make_dense_state(self, group, p, state):
        if group["momentum"] != 0 and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)

    def _dense_step(self, group, params, grads, states):
        buffers = [state.get("momentum_buffer") for state in states]
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
            for state, buffer in zip(states, buffers):
                state["momentum_buffer"] = buffer


class PackedLion(_PackedOptimizer):
    """Steps by the sign of an averaged gradient, with one moment (Lion: Chen et al., 2023).

        c = beta1 m + (1 - beta1) g;   m <- beta2 m + (1 - beta2) g;   w <- w (1 - lr weight_decay) - lr sign(c) where |c| > threshold

    With equal betas it steps by the sign of momentum. On 1-bit weights a step of one level or more (lr at least the scale, 2 s)
    flips every weight whose average exceeds the threshold and points the other way (Bop: Helwegen et al., 2019).

    Args:
        params, lr, betas, weight_decay: as above.
        threshold: averages of at most this size do not step.
        moments: as PackedAdamW's; None: no moment, steps by the sign of the gradient itself (signSGD).
        maximize, seed, capturable: as PackedAdamW's.
        scales, scale_lr, reestimate_every, scheme: as PackedAdamW's.
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
        capturable=False,
        scales="fixed",
        scale_lr=1.0,
        reestimate_every=20,
        scheme=None,
    ):
        _check("lr", lr, 0)
        for i, beta in enumerate(betas):
            _check(f"betas[{i}]", beta, 0, 1)
        _check("weight_decay", weight_decay, 0)
        _check("threshold", threshold, 0)
        if moments is not None:
            _check_moments((moments,))
        _check_scales(scales, scale_lr, reestimate_every, capturable)
        defaults = dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, threshold=threshold, moments=moments)
        affine = dict(scales=scales, scale_lr=scale_lr, reestimate_every=reestimate_every, scheme=scheme)
        super().__init__(params, {**defaults, **affine, "maximize": maximize, "seed": seed, "capturable": capturable})

    def _moment_kinds(self, group):
        return {} if group["moments"] is None else {"m": group["moments"]}

    def _packed_step(self, group, w, grad, state, offset, tail):
        lr, _, numbers = self._numbers(group, state, w.codes.device, (0.0, 0.0))
        _ops.packed_sign_(
            *w.packed_args, grad, *_moments_of(state, "m"), lr, *group["betas"], group["threshold"], group["weight_decay"],
            offset=offset, numbers=numbers, **tail,
        )  # fmt: skip

    def _make_dense_state(self, group, p, state):
        if group["moments"] is not None and "m" not in state:
            state["m"] = torch.zeros_like(p)

    def _dense_step(self, group, params, grads, states):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p, grad, state in zip(params, grads, states):
            self._make_dense_state(group, p, state)
            grad = -grad if group["maximize"] else grad
            c = grad
            if "m" in state:
                c = state["m"].lerp(grad, 1 - beta1)
                state["m"].lerp_(grad, 1 - beta2)
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(lr * torch.where(c.abs() > group["threshold"], c.sign(), 0.0))
