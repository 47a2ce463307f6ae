"""BitLinear and MultiTernaryLinear: linear layers of ternary weights that train, pack and run."""

import copy
import math

import torch
import torch.nn.functional as F

from .. import functional
from .._library import load
from ..functional.ternary import _terms
from ..packed_weight import PackedWeight
from .packed import _PackedState

_ops = load()
_STATES = ("latent", "packed", "frozen")


class _TernaryLinear(_PackedState, torch.nn.Module):
    """y = sum_i (x T_i^T) * gamma_i + bias with T_i in {-1, 0, 1}. What BitLinear and MultiTernaryLinear have in common."""

    def __init__(
        self, in_features, out_features, terms, bias, device, dtype, state, method, per_channel, threshold, activation_bits
    ):
        super().__init__()
        name = type(self).__name__
        if in_features < 0 or out_features < 0:
            raise ValueError(f"{name}: the weight is [{out_features}, {in_features}], expected no negative size")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"{name}: dtype is {dtype}, expected a floating point type")
        if method not in ("absmean", "threshold"):
            raise ValueError(f"{name}: method is {method!r}, expected absmean or threshold")
        if not threshold >= 0:
            raise ValueError(f"{name}: threshold is {threshold}, expected at least 0")
        if activation_bits is not None and not (isinstance(activation_bits, int) and 2 <= activation_bits <= 24):
            raise ValueError(f"{name}: activation_bits is {activation_bits!r}, expected None or 2 to 24")
        self.in_features, self.out_features, self.terms = in_features, out_features, _terms(name, terms)
        self.method, self.per_channel, self.threshold = method, per_channel, threshold
        self.activation_bits = activation_bits
        self.state = "latent"
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        self._enter(state)

    def reset_parameters(self):
        """The initial values of torch.nn.Linear."""
        if self.weight.numel():
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
            torch.nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def _from_linear(cls, linear, state, **options):
        out_features, in_features = linear.weight.shape
        options["bias"] = linear.bias is not None
        with torch.device("meta"):
            layer = cls(in_features, out_features, state="latent", **options)
        dense = linear.weight.dequantize() if isinstance(linear.weight, PackedWeight) else linear.weight.detach().clone()
        layer.weight = torch.nn.Parameter(dense, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = torch.nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer._enter(state).train(linear.training)

    # ---- states

    def _enter(self, state):
        if state not in _STATES:
            raise ValueError(f"{type(self).__name__}: state is {state!r}, expected one of {', '.join(_STATES)}")
        if state != "latent" and self.activation_bits not in (None, 8):
            raise ValueError(
                f"{type(self).__name__}: activation_bits is {self.activation_bits!r}, packed weights expect None or 8"
            )
        if state == "latent":
            if self.state != "latent":
                terms = self.weight.dequantize().unflatten(0, (self.terms, self.out_features))
                self.weight = torch.nn.Parameter(terms.sum(0))
        else:
            weight = self.weight.detach()
            if self.state == "latent":
                trits, gamma = self._decomposed()
                weight = functional.pack_ternary(trits, gamma, dtype=self.weight.dtype, check=False)
            self.weight = torch.nn.Parameter(weight, requires_grad=state == "packed")
        self.state = state
        return self

    def pack_(self):
        """To packed training: the weight becomes a PackedWeight that any optimizer trains; the latent weight is given up.

        The parameter is another object from here on: make the optimizer anew.
        """
        return self._enter("packed")

    def freeze_(self):
        """To inference: packed, without gradient for the weight (x and bias keep theirs)."""
        return self._enter("frozen")

    def to_latent_(self):
        """Back to a latent float weight, which starts at the packed values."""
        return self._enter("latent")

    def _decomposed(self):
        return _ops.ternary_decompose(
            self.weight.detach(), self.terms, self.method, self.per_channel, float(self.threshold)
        )

    def _ternary_parts(self):
        """(T [terms, N, K], gamma [terms, N]) in the weight's dtype."""
        if self.state == "latent":
            trits, gamma = self._decomposed()
        else:
            trits = _ops.unpack(self.weight.codes, "ternary", self.in_features).to(torch.int8) - 1
            trits = trits.unflatten(0, (self.terms, self.out_features))
            # A row without columns has no scale.
            gamma = self.weight.scales[:, 0] if self.in_features else self.weight.scales.new_zeros(self.weight.shape[0])
            gamma = gamma.unflatten(0, (self.terms, self.out_features))
        return trits.to(self.weight.dtype), gamma.to(self.weight.dtype)

    # ---- use

    def forward(self, x):
        if self.state == "latent":
            if self.activation_bits is not None:
                x = functional.activation_quant(x, self.activation_bits)
            weight = functional.ternarize(
                self.weight, self.terms, method=self.method, per_channel=self.per_channel, threshold=self.threshold
            )
            return F.linear(x, weight, self.bias)
        return functional.multi_ternary_linear(
            x, self.weight, bias=self.bias, terms=self.terms, activation_bits=self.activation_bits
        )

    def extra_repr(self):
        rule = self.method + (f", threshold={self.threshold}" if self.method == "threshold" else "")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            + (f"k={self.terms}, " if isinstance(self, MultiTernaryLinear) else "")
            + f"bias={self.bias is not None}, state={self.state}, method={rule}, per_channel={self.per_channel}, "
            + f"activation_bits={self.activation_bits}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Checkpoints of the library BitLinear hold the ternary values themselves.
        given = {name: state_dict.get(prefix + name) for name in ("W_ternary", "gamma", "gammas")}
        gamma = given["gamma"] if given["gamma"] is not None else given["gammas"]
        if given["W_ternary"] is not None and gamma is not None:
            state_dict = {k: v for k, v in state_dict.items() if k not in [prefix + name for name in given]}
            trits = given["W_ternary"].reshape(-1, self.out_features, given["W_ternary"].shape[-1])
            packed = functional.pack_ternary(trits, gamma.reshape(-1) if gamma.dim() else gamma)
            if self.state == "latent":
                state_dict[prefix + "weight"] = packed.dequantize().unflatten(0, (-1, self.out_features)).sum(0)
            else:
                state_dict[prefix + "weight.codes"] = packed.codes
                state_dict[prefix + "weight.scales"] = packed.scales.to(self.weight.scales.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


_STATES_TEXT = """

    Three states, changed by pack_(), freeze_() and to_latent_():

    latent   `weight` is a float parameter [N, K]; every forward pass makes it ternary and rounds x (activation_quant), both with
             straight-through gradients: quantization aware training as in BitNet b1.58.
    packed   `weight` is a PackedWeight of 2-bit codes and a scale a row that trains as it is, rounded stochastically by the
             optimizer's step.
    frozen   the same without gradient: inference. With activation_bits = 8 in both packed states x is rounded to int8 a token
             and products are summed as integers (linear_a8), which equals the latent state's rounding up to ties and for tokens
             below 1e-5.

    Attributes: weight (above), bias [N] or None, and in every state the read-only W_ternary and gamma. A state_dict holds
    `weight` or `weight.codes` and `weight.scales`, and `bias`; `W_ternary` and `gamma` of the library BitLinear load too."""


class BitLinear(_TernaryLinear):
    __doc__ = (
        """torch.nn.Linear with ternary weights: y = (x T^T) * gamma + bias."""
        + _STATES_TEXT
        + """

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        state: "latent", "packed" or "frozen".
        method, per_channel, threshold: the rule that makes weights ternary, functional.weight_to_ternary.
        activation_bits: bits of x, 2 to 24 (8 in the packed states); None keeps x as it is.
    """
    )

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        state="latent",
        method="absmean",
        per_channel=False,
        threshold=0.7,
        activation_bits=8,
    ):
        super().__init__(
            in_features, out_features, 1, bias, device, dtype, state, method, per_channel, threshold, activation_bits
        )

    @classmethod
    def from_linear(cls, linear, *, state="latent", **options):
        """A ternary copy of a torch.nn.Linear. options: method, per_channel, threshold, activation_bits."""
        return cls._from_linear(linear, state, **options)

    @property
    def W_ternary(self):
        """[N, K] in {-1, 0, 1}, in the weight's dtype."""
        return self._ternary_parts()[0][0]

    @property
    def gamma(self):
        """[N]."""
        return self._ternary_parts()[1][0]


class MultiTernaryLinear(_TernaryLinear):
    __doc__ = (
        """torch.nn.Linear whose weight is a sum of k ternary terms: y = sum_i (x T_i^T) * gamma_i + bias, one pass over x."""
        + _STATES_TEXT
        + """

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        k: number of terms, found greedily. The packed weight is [k N, K].
        state, method, per_channel, threshold, activation_bits: as in BitLinear.
    """
    )

    def __init__(
        self,
        in_features,
        out_features,
        k=3,
        bias=True,
        device=None,
        dtype=None,
        *,
        state="latent",
        method="threshold",
        per_channel=True,
        threshold=0.7,
        activation_bits=8,
    ):
        super().__init__(
            in_features, out_features, k, bias, device, dtype, state, method, per_channel, threshold, activation_bits
        )

    @classmethod
    def from_linear(cls, linear, k=3, *, state="latent", **options):
        """A copy of a torch.nn.Linear in k ternary terms. options: method, per_channel, threshold, activation_bits."""
        return cls._from_linear(linear, state, k=k, **options)

    @property
    def W_ternary(self):
        """[k, N, K] in {-1, 0, 1}, in the weight's dtype."""
        return self._ternary_parts()[0]

    @property
    def gamma(self):
        """[k, N]."""
        return self._ternary_parts()[1]


def convert_linear_to_bitlinear(module, inplace=False, *, skip=(), **options):
    """Replaces every torch.nn.Linear in `module` (itself included) by BitLinear.from_linear(linear, **options).

    inplace: change `module`; otherwise a deep copy. skip: full names of layers to leave. Returns the module. Only layers whose
    class is torch.nn.Linear itself are replaced; a layer used in two places stays one layer.
    """
    if not inplace:
        module = copy.deepcopy(module)
    if type(module) is torch.nn.Linear:
        return BitLinear.from_linear(module, **options)
    made = {}
    for name, parent in list(module.named_modules(remove_duplicate=False)):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            if type(child) is torch.nn.Linear and full not in skip:
                if id(child) not in made:
                    made[id(child)] = (child, BitLinear.from_linear(child, **options))
                setattr(parent, child_name, made[id(child)][1])
    return module
