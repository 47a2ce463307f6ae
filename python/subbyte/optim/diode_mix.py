"""DiodeMix: one optimizer for models of ordinary, binary and n-bit parameters (Guo et al., "Diode", 2024)."""

import math
import warnings

import torch

from .. import _library
from ..packed_weight import PackedWeight, _draw_seed
from . import moments
from .galore import GaLoreProjector

_ops = _library.load()
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RULES = (None, "ordinary", "binary", "nbit")
_GALORE_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")


def _sign(t):
    """+1 where t >= 0, else -1."""
    return torch.where(t >= 0, 1.0, -1.0).to(t.dtype if t.is_floating_point() else torch.float32)


class DiodeMix(torch.optim.Optimizer):
    """A rule for each kind of parameter; t counts its steps, g is its gradient.

    ordinary (any floating point tensor):
        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        eta = lr sqrt(1 - beta2^t) / (1 - beta1^t), or lr without correct_bias
        w <- w - eta m / (sqrt(v) + eps);  then w <- w - lr weight_decay w, on the updated w
        eps is added to the uncorrected sqrt(v).
    nbit (PackedWeight; integer tensors that have a gradient):
        the same step on the values, which then go back onto the weight's own grid (the fine one where it has a residual),
        rounded as `rounding` says. Nearest
        rounding loses every step below half a level. An integer tensor q stands for scale * q; the scale is kept as state (in
        the attribute `scale` of the parameter where it has one) and follows max|w|.
    binary (PackedWeight of format "sign" without zeros and residual; other tensors in a group with rule="binary"):
        l <- l + (1 - beta1)(g - l);  s <- s + (1 - beta2)(lr sign(l) - s);  where -sign(s) differs from sign(w), w <- -w. s
        starts at -sign(w) delta, delta uniform in [0, 0.001). sign(0) of a weight is +1, of -s too. eps, correct_bias unused.
    binary table (the same with a sparse gradient, as of nn.BinaryEmbedding):
        s <- s + (1 - beta2)(lr sign(g) - s) and the flips, on the rows of the gradient alone.
    a class of its own (a parameter whose class has a static `update`):
        update(parameter, exp_avg_s=, exp_avg_l=, step=, lr=, weight_decay=, beta1=, beta2=, eps=, dtype=, correct_bias=,
        projector=, grad=) changes the parameter and its state in place and counts `step`, a tensor [1]. The state starts at
        zeros of the gradient's shape, or as a static initial_state(parameter, grad, dtype) of the class says: a dict of
        exp_avg_s, exp_avg_l and whatever else it keeps; a name that it leaves out is passed as None. The gradient is the
        parameter's `privileged_grad` where it has one that is not None, else its grad.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay, correct_bias: as above. Binary parameters have no magnitude to decay: weight_decay on them
            warns.
        dtype: of computation and of 32-bit state (float32, float64, bfloat16 or float16); may differ between groups.
        rounding: "stochastic" or "nearest", of n-bit parameters.
        state_bits: 32, 16 (bfloat16) or 8 (blocks of 256) bits of each moment: for l, s, m and v of 1-bit weights 64 bits a
            weight, or 32, or 16.

    Parameters that FSDP2 shards (subbyte.distributed.fully_shard) are stepped row by row where they lie; a projector then sees
    the rows of its rank.

    Further keys of a group: rule, "ordinary", "binary" or "nbit", where the type should not decide; and rank, update_proj_gap,
    scale, proj_type, all four, for a GaLoreProjector on the gradients of matrices. Other shapes and sparse gradients are not
    projected. Moments are kept in the projected space and stay as they are when its basis is formed anew.

    A gradient element that is NaN or infinite changes nothing of a packed, integer or binary parameter: neither value nor state
    (but for the rounding of 8-bit states). Where a projector mixes elements it counts as 0. Ordinary parameters and classes
    with a rule of their own take it as it comes.

    Raises:
        ValueError: for lr, eps or weight_decay below 0, betas outside [0, 1), unknown options.
        RuntimeError: for a sparse gradient of anything but a binary table or a class with a rule of its own.

    Steps are counted on the host, and nothing waits for the device but the singular vectors of GaLore and the touched rows of a
    sparse gradient. The state_dict holds tensors, numbers and strings only.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.99, 0.9999),
        eps=1e-6,
        weight_decay=0.0,
        correct_bias=True,
        dtype=torch.float,
        *,
        rounding="stochastic",
        state_bits=32,
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            correct_bias=correct_bias,
            dtype=dtype,
            rounding=rounding,
            state_bits=state_bits,
            rule=None,
        )
        super().__init__(params, defaults)

    @property
    def dtype(self):
        """Of computation and of 32-bit state, in groups that do not say otherwise."""
        return self.defaults["dtype"]

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @staticmethod
    def _check(group):
        def check(good, name, expectation):
            if not good:
                raise ValueError(f"DiodeMix: {name} is {group[name]!r}, expected {expectation}")

        check(group["lr"] >= 0, "lr", "at least 0")
        betas = tuple(group["betas"])
        check(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", "two numbers in [0, 1)")
        check(group["eps"] >= 0, "eps", "at least 0")
        check(group["weight_decay"] >= 0, "weight_decay", "at least 0")
        # A name, since a state_dict holds plain values.
        group["dtype"] = str(group["dtype"]).removeprefix("torch.")
        check(group["dtype"] in _DTYPES, "dtype", "float32, float64, bfloat16 or float16")
        check(group["rounding"] in ("nearest", "stochastic"), "rounding", "nearest or stochastic")
        check(group["state_bits"] in (8, 16, 32), "state_bits", "8, 16 or 32")
        check(group["rule"] in _RULES, "rule", "None, ordinary, binary or nbit")
        if "rank" in group:
            missing = [key for key in _GALORE_KEYS if key not in group]
            if missing:
                needed, absent = ", ".join(_GALORE_KEYS), ", ".join(missing)
                raise ValueError(f"DiodeMix: a group with rank needs {needed}; {absent} is missing")
            GaLoreProjector(**{key: group[key] for key in _GALORE_KEYS})

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state_dict of before there was such an option
                group.setdefault(name, value)
            self._check(group)
        # torch.optim casts state to the type of its parameter, which codes and float32 moments must not be.
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, parameters):
            if key in state_dict["state"]:
                self.state[p] = {
                    name: value.detach().clone().to("cpu" if name == "step" else p.device)
                    if isinstance(value, torch.Tensor)
                    else value
                    for name, value in state_dict["state"][key].items()
                }

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                g = getattr(p, "privileged_grad", None)
                if g is None:
                    g = p.grad
                if g is not None:
                    # Of a parameter that FSDP2 shards, the rows of this rank: all rules work element by element.
                    own, g = (getattr(t, "_local_tensor", t) for t in (p, g))
                    self._step_one(own, g, group, self.state[p])
        return loss

    def _step_one(self, p, g, group, state):
        rule = self._rule_of(p, group)
        sparse = g.layout != torch.strided
        table = rule is _binary and sparse
        if sparse and not table and rule is not _own_class:
            raise RuntimeError("DiodeMix: sparse gradients are taken by binary tables, and classes with a rule of their own, alone")
        if "step" not in state:
            state["step"] = torch.zeros(1)
        projector = None
        if "rank" in group and g.dim() == 2 and not sparse:
            projector = GaLoreProjector(**{key: group[key] for key in _GALORE_KEYS})
            projector.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("galore_")})
            g = g.to(_DTYPES[group["dtype"]])
            g = projector.project(torch.where(g.isfinite(), g, 0) if rule in (_binary, _nbit) else g, int(state["step"]))
            state.update({f"galore_{key}": value for key, value in projector.state_dict().items()})
        if rule is _binary and group["weight_decay"] > 0:
            warnings.warn("DiodeMix: weight_decay has no effect on binary parameters", stacklevel=4)
        (_binary_table if table else rule)(p, g, state, group, projector)

    @staticmethod
    def _rule_of(p, group):
        if hasattr(type(p), "update"):
            return _own_class
        if group["rule"] is not None:
            if isinstance(p, PackedWeight) and group["rule"] == "ordinary":
                return _nbit
            return {"ordinary": _ordinary, "binary": _binary, "nbit": _nbit}[group["rule"]]
        if isinstance(p, PackedWeight):
            binary = p.format == "sign" and p.zeros is None and p.offsets is None and p.residual is None
            return _binary if binary else _nbit
        return _ordinary if p.is_floating_point() else _nbit


# ---- the rules


def _back(projector, direction):
    return direction if projector is None else projector.project_back(direction)


def _count(state):
    state["step"] += 1
    return int(state["step"])


def _adam_direction(g, state, group, projector, finite):
    """(eta, [project_back] m / (sqrt(v) + eps)) after counting the step. Moments move where `finite`, None: everywhere."""
    dtype, bits = _DTYPES[group["dtype"]], group["state_bits"]
    (beta1, beta2), t = group["betas"], _count(state)
    g = g.to(dtype)
    if "exp_avg_l" in state:
        m = moments.load(state, "exp_avg_l", bits, dtype)
        v = moments.load(state, "exp_avg_s", bits, dtype, signed=False)
    else:
        m, v = torch.zeros_like(g), torch.zeros_like(g)
    if finite is None:
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    else:
        m.copy_(torch.where(finite, m * beta1 + (1 - beta1) * g, m))
        v.copy_(torch.where(finite, v * beta2 + (1 - beta2) * g * g, v))
    moments.store(state, "exp_avg_l", m, bits)
    moments.store(state, "exp_avg_s", v, bits, signed=False)
    eta = group["lr"]
    if group["correct_bias"]:
        eta *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return eta, _back(projector, m / (v.sqrt() + group["eps"]))


def _moved(w, g, state, group, projector, finite=None):
    """The values w after a step of the ordinary rule where `finite`; w is changed."""
    eta, direction = _adam_direction(g, state, group, projector, finite)
    w.sub_(direction if finite is None else torch.where(finite, direction, 0), alpha=eta)
    if group["weight_decay"] > 0:
        w.sub_(w if finite is None else torch.where(finite, w, 0), alpha=group["lr"] * group["weight_decay"])
    return w


def _finite(g, projector):
    """Which elements of a packed parameter's gradient count; None: all, as after a projection, which has seen to it."""
    return g.isfinite() if projector is None else None


def _ordinary(p, g, state, group, projector):
    dtype = _DTYPES[group["dtype"]]
    if p.dtype == dtype:
        _moved(p, g, state, group, projector)
    else:
        p.copy_(_moved(p.to(dtype), g, state, group, projector))


def _nbit(p, g, state, group, projector):
    dtype = _DTYPES[group["dtype"]]
    if isinstance(p, PackedWeight):
        if p.transposed:
            raise ValueError("DiodeMix: the parameter is a transposed view of a PackedWeight")
        w = _moved(p.dequantize_fine(torch.float32).to(dtype), g, state, group, projector, _finite(g, projector))
        p._encode_(w, group["rounding"], _draw_seed() if group["rounding"] == "stochastic" else 0)
        return
    if p.is_floating_point():
        raise ValueError(f"DiodeMix: rule 'nbit' on a {p.dtype} tensor, expected a PackedWeight or an integer tensor")
    scale = getattr(p, "scale", None)
    if not isinstance(scale, torch.Tensor):
        scale = state.setdefault("scale", torch.ones((), dtype=torch.float32, device=p.device))
    data = p.detach()
    w = _moved(data.to(dtype) * scale.to(dtype), g, state, group, projector, _finite(g, projector))
    top = torch.iinfo(p.dtype).max
    largest = w.abs().amax() if w.numel() else w.new_zeros(())
    scale.copy_(torch.where(largest > 0, largest / top, scale.to(dtype)))
    q = w / scale.to(dtype)
    q = torch.floor(q + moments.uniform_like(q)) if group["rounding"] == "stochastic" else torch.round(q)
    data.copy_(q.clamp_(-top, top))


def _signs_and_writer(p, rows=None):
    """(sign of every weight in stored order, a function that flips those that a mask names); of all rows or of some."""
    if not isinstance(p, PackedWeight):
        data = p.detach()
        signs = _sign(data)
        # An element that is exactly 0 counts as +1 and takes the smallest step to be negative.
        small = 1 if not p.is_floating_point() else torch.finfo(p.dtype).tiny

        def flip(mask):
            data.copy_(torch.where(mask, torch.where(data == 0, -small, -data), data))

        return signs, flip
    if p.residual is not None:
        raise ValueError("DiodeMix: rule 'binary' flips whole weights and has no use for a residual: drop_residual() first")
    codes = p.codes if rows is None else p.codes.index_select(0, rows)
    scales = p.scales if rows is None else p.scales.index_select(0, rows)
    bits = _ops.unpack(codes, "sign", p.in_features)
    groups = torch.arange(p.in_features, device=p.device) // p.group_size
    signs = (2.0 * bits - 1) * torch.where(scales < 0, -1.0, 1.0)[:, groups]

    def flip(mask):
        packed = _ops.pack(bits ^ mask.to(torch.uint8), "sign")
        p.codes.copy_(packed) if rows is None else p.codes.index_copy_(0, rows, packed)

    return signs, flip


def _stored_order(p, g):
    return g.index_select(1, p.perm) if isinstance(p, PackedWeight) and p.perm is not None else g


def _slow_average(signs):
    """The start of s: a little on the side that the weight is on."""
    return -signs * (1e-3 * moments.uniform_like(signs)).to(signs.dtype)


def _binary(p, g, state, group, projector):
    dtype, bits, (beta1, beta2) = _DTYPES[group["dtype"]], group["state_bits"], group["betas"]
    _count(state)
    g = g.to(dtype)
    signs, flip = _signs_and_writer(p)
    signs = signs.to(dtype)
    if "exp_avg_s" in state:
        s, average = moments.load(state, "exp_avg_s", bits, dtype), moments.load(state, "exp_avg_l", bits, dtype)
    else:
        s, average = _slow_average(signs), torch.zeros_like(g)
    finite = g.isfinite()
    average.add_(torch.where(finite, g - average, 0), alpha=1 - beta1)
    change = group["lr"] * _stored_order(p, _back(projector, average)).sign() - s
    moves = torch.ones_like(s, dtype=torch.bool) if projector is not None else _stored_order(p, finite)
    s.add_(torch.where(moves, change, 0), alpha=1 - beta2)
    moments.store(state, "exp_avg_l", average, bits)
    moments.store(state, "exp_avg_s", s, bits)
    flip((_sign(-s) != signs) & moves)


def _binary_table(p, g, state, group, projector):
    """s is kept for the whole table, read and written on the touched rows: float types, or int8 on a grid of state["bound"]."""
    if not isinstance(p, PackedWeight) or p.transposed:
        raise RuntimeError("DiodeMix: a sparse gradient needs a binary table that is a PackedWeight of format 'sign'")
    dtype, bits, beta2 = _DTYPES[group["dtype"]], group["state_bits"], group["betas"][1]
    _count(state)
    g = g.coalesce()
    rows, values = g.indices()[0], _stored_order(p, g.values()).to(dtype)
    # |s| never exceeds the larger of its start and lr.
    unit = state.setdefault("bound", max(1e-3, float(group["lr"]))) / 127

    def stored(s):
        if bits == 32:
            return s
        if bits == 16:
            return moments.rounded_to_bfloat16(s)
        return torch.floor(s.float() / unit + moments.uniform_like(s)).clamp_(-127, 127).to(torch.int8)

    if "exp_avg_s" not in state:
        state["exp_avg_s"] = stored(_slow_average(_signs_and_writer(p)[0].to(dtype)))
    signs, flip = _signs_and_writer(p, rows)
    s = state["exp_avg_s"].index_select(0, rows).to(dtype)
    s = s * unit if bits == 8 else s
    s.add_(torch.where(values.isfinite(), group["lr"] * values.sign() - s, 0), alpha=1 - beta2)
    state["exp_avg_s"].index_copy_(0, rows, stored(s))
    flip((_sign(-s) != signs.to(dtype)) & values.isfinite())


def _own_class(p, g, state, group, projector):
    dtype = _DTYPES[group["dtype"]]
    if not any(key != "step" and not key.startswith("galore_") for key in state):
        start = getattr(type(p), "initial_state", None)
        if start is not None:
            state.update(start(p, g, dtype))
        else:
            state.update(exp_avg_s=torch.zeros_like(g, dtype=dtype), exp_avg_l=torch.zeros_like(g, dtype=dtype))
    type(p).update(
        p,
        exp_avg_s=state.get("exp_avg_s"),
        exp_avg_l=state.get("exp_avg_l"),
        step=state["step"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        dtype=dtype,
        correct_bias=group["correct_bias"],
        projector=projector,
        grad=g,
    )
