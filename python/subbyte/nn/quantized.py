"""Layers whose weights and activations are integers of 2 to 8 bits on learned steps, trained from a float master weight.

Life of a layer: construct (or from_float) -> train -> generate_quantized_weight(qweight_only=True) -> save, run. The formulas
and gradients stand in subbyte.functional.quantized_linear, quantized_conv2d and quantized_matmul.
"""

import math

import torch
import torch.nn.functional as F

from .. import _library, functional
from ..packed_weight import PackedWeight

_ops = _library.load()

ACTIVATION_DIVISOR_BIE = 11.269  # sqrt(127), rounded
WEIGHT_DIVISOR_BIE = {4: 5.6345, 8: 11.269}


def _check_options(op, bits, init, eps):
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits is {bits!r}, expected 2 to 8")
    if init not in ("lsq", "bie"):
        raise ValueError(f"{op}: init is {init!r}, expected 'lsq' or 'bie'")
    if init == "bie" and bits not in WEIGHT_DIVISOR_BIE:
        raise ValueError(f"{op}: bits is {bits}, expected 4 or 8 with init='bie', which has no constant for others")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{op}: eps is {eps!r}, expected a positive number")


def _divisor(bits, init, weight):
    """d of the initial step 2 mean|v| / d: sqrt(Qp), or the constants of bitorch-engine."""
    if init == "bie":
        return WEIGHT_DIVISOR_BIE[bits] if weight else ACTIVATION_DIVISOR_BIE
    return math.sqrt(2 ** (bits - 1) - 1)


def _set_step(step, v, divisor, eps):
    with torch.no_grad():
        step.copy_((v.detach().float().abs().mean() * (2 / divisor)).clamp_min(eps))


class _StepState(torch.nn.Module):
    """activation_initialised: whether the steps of the activations have their first values. It goes into the state_dict as a
    tensor of one bool and is a plain bool here, so that no forward pass waits for a GPU to look at it."""

    def __init__(self, op, bits, init, eps):
        super().__init__()
        _check_options(op, bits, init, eps)
        self.bits, self.init, self.eps = bits, init, eps
        self.activation_initialised = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "activation_initialised"] = torch.tensor(self.activation_initialised)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        key = prefix + "activation_initialised"
        if key in state_dict:
            self.activation_initialised = bool(state_dict[key])
            state_dict = {k: v for k, v in state_dict.items() if k != key}
        elif strict:
            missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _ready(self, *pairs):
        """Gives steps their first values from the first batch of training; pairs of (step, values)."""
        if self.activation_initialised:
            return
        if not self.training:
            raise RuntimeError(
                f"{type(self).__name__}: the activation step is not initialised: run a batch in training, set it with "
                "set_activation, or load a checkpoint"
            )
        if all(v.numel() > 0 for _, v in pairs):
            self._initialise(*pairs)

    def _initialise(self, *pairs):
        for step, v in pairs:
            _set_step(step, v, _divisor(self.bits, self.init, weight=False), self.eps)
        self.activation_initialised = True


class _QuantizedLayer(_StepState):
    """What QuantizedLinear and QuantizedConv2d share: the master weight, its packed form, and the steps.

    State: weight (float, or None once dropped), qweight (uint8 codes [N, ceil(K bits / 8)], or None while not packed), scale_w,
    scale_a (float32 scalars), bias_a (shift of the input), bias, activation_initialised.
    """

    def __init__(self, op, weight_shape, shifts, bits, bias, init, eps, clip_weight_gradient, device, dtype):
        super().__init__(op, bits, init, eps)
        self.clip_weight_gradient = clip_weight_gradient
        options = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.weight_shape = torch.Size(weight_shape)
        self.weight = torch.nn.Parameter(torch.empty(self.weight_shape, **options))
        self.bias_a = torch.nn.Parameter(torch.zeros(shifts, **options))
        self.scale_a = torch.nn.Parameter(torch.ones((), device=device, dtype=torch.float32))
        self.scale_w = torch.nn.Parameter(torch.ones((), device=device, dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.empty(self.weight_shape[0], **options)) if bias else None
        self.register_buffer("qweight", None)
        self._packed_from = None
        self.reset_parameters()

    def reset_parameters(self):
        """Fresh weights, as torch.nn.Linear's and Conv2d's, and a weight step that fits them."""
        if self.weight.numel() > 0:
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = self.weight_shape[1:].numel()
            limit = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            torch.nn.init.uniform_(self.bias, -limit, limit)
        self.prepare_params()

    def prepare_params(self):
        """scale_w = max(2 mean|weight| / d, eps), d = sqrt(Qp), or the original's constant with init="bie".

        Construction, from_float and set_weight_data have done it; call it after writing to `weight` yourself.
        """
        self._need_weight("prepare_params")
        if self.weight.numel() > 0 and not self.weight.is_meta:
            _set_step(self.scale_w, self.weight, _divisor(self.bits, self.init, weight=True), self.eps)
        self._forget_packed()

    def set_weight_data(self, x):
        """Takes the values of x, of the weight's shape, and a step that fits them; the weight stays trainable."""
        self._need_weight("set_weight_data")
        if x.shape != self.weight.shape:
            raise ValueError(f"set_weight_data: x is {list(x.shape)}, expected {list(self.weight.shape)}")
        with torch.no_grad():
            self.weight.copy_(x)
        self.prepare_params()

    def set_quantized_weight_data(self, x):
        """Takes packed codes; the float weight, which would contradict them, is dropped."""
        expected = self._qweight_shape()
        if x.dtype != torch.uint8 or tuple(x.shape) != expected:
            raise ValueError(f"set_quantized_weight_data: x is {x.dtype} {list(x.shape)}, expected uint8 {list(expected)}")
        self.qweight = x.detach().clone().to(self.scale_w.device)
        self.weight = None

    @torch.no_grad()
    def generate_quantized_weight(self, qweight_only=False):
        """Packs q(weight) into `qweight`. qweight_only=True drops the float weight: the layer then runs, but trains no more."""
        if self.weight is None:
            if self.qweight is None:
                raise RuntimeError(f"{type(self).__name__}: there is neither a weight nor a qweight")
            return
        step = self.scale_w.detach().float().clamp_min(self.eps)
        middle = 2 ** (self.bits - 1)
        q = (self.weight.detach().float().flatten(1) / step).round_().clamp_(-middle, middle - 1)
        self.qweight = _ops.pack((q + middle).to(torch.uint8), f"uint{self.bits}")
        self._packed_from = self._weight_versions()
        if qweight_only:
            self.weight = None

    @property
    def opt_weight(self):
        """The float weight in training, the packed one in evaluation."""
        if self.training and self.weight is not None:
            return self.weight
        self._refresh_packed()
        return self.qweight

    def packed_weight(self):
        """The weight as a PackedWeight [N, K] with one scale a row, dequantized by subbyte.functional.dequantize and others."""
        self._refresh_packed()
        n, k = self.weight_shape[0], self.weight_shape[1:].numel()
        scales = self.scale_w.detach().float().clamp_min(self.eps).expand(n, 1 if k > 0 else 0).contiguous()
        return PackedWeight(
            self.qweight, scales, format=f"uint{self.bits}", in_features=k, group_size=max(k, 1), dtype=torch.float32
        )

    def set_activation(self, x):
        """The shifted input x + bias_a; initialises scale_a = 2 mean|x| / d from x if nothing has yet."""
        if not self.activation_initialised and x.numel() > 0:
            self._initialise((self.scale_a, x))
        return x + self._shift(x)

    def train(self, mode=True):
        self._forget_packed()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self._forget_packed()
        return result

    def _need_weight(self, what):
        if self.weight is None:
            raise RuntimeError(f"{type(self).__name__}: {what} needs the float weight, which has been dropped")

    def _qweight_shape(self):
        return (self.weight_shape[0], -(-self.weight_shape[1:].numel() * self.bits // 8))

    def _weight_versions(self):
        """What a packed weight was made from; None where PyTorch keeps no count of changes."""
        if self.weight.is_inference() or self.scale_w.is_inference():
            return None
        return (id(self.weight), self.weight._version, id(self.scale_w), self.scale_w._version)

    def _forget_packed(self):
        if self.weight is not None:
            self.qweight, self._packed_from = None, None

    def _refresh_packed(self):
        if self.weight is None:
            return
        if self.qweight is None or self._packed_from is None or self._packed_from != self._weight_versions():
            self.generate_quantized_weight()

    def _operands(self):
        """(weight, codes), one of them None. A float weight that is trained or wants a gradient is used as it is, and inside
        torch.compile too, where changes of the weight between calls cannot be counted: both give the same bits."""
        if self.weight is None:
            if self.training:
                self._need_weight("training")
            return None, self.qweight
        wanted = torch.is_grad_enabled() and (self.weight.requires_grad or self.scale_w.requires_grad)
        if self.training or wanted or torch.compiler.is_compiling():
            return self.weight, None
        self._refresh_packed()
        return None, self.qweight

    def _shift(self, x):
        return self.bias_a

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.weight is not None and self.qweight is not None:
            self._refresh_packed()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        weight, qweight = state_dict.get(prefix + "weight"), state_dict.get(prefix + "qweight")
        if qweight is not None:
            if qweight.dtype != torch.uint8 or tuple(qweight.shape) != self._qweight_shape():
                error_msgs.append(
                    f"{prefix}qweight: {qweight.dtype} {list(qweight.shape)} in the checkpoint, expected uint8 "
                    f"{list(self._qweight_shape())} for {self.bits} bits"
                )
                return
            self.qweight = torch.empty_like(qweight, device=self.scale_w.device)
            if weight is None:
                self.weight = None
        elif self.weight is not None:
            self.qweight = None
        if weight is not None and self.weight is None:
            self.weight = torch.nn.Parameter(
                torch.empty(self.weight_shape, dtype=weight.dtype, device=self.scale_w.device)
            )
            if qweight is None:
                self.qweight = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._packed_from = None  # a packed weight beside a float one is made again before it is used

    def _extra(self):
        return f"bits={self.bits}, bias={self.bias is not None}, init={self.init!r}" + (
            "" if self.weight is not None else ", packed"
        )


class QuantizedLinear(_QuantizedLayer):
    """y = scale_a scale_w q(x + bias_a) q(weight)^T + bias, [..., in_features] -> [..., out_features] of x's dtype.

    Args:
        in_features, out_features: any numbers.
        bits: 2 to 8, of weights and activations. 4 is the Q4 layer, 8 the Q8 layer.
        bias: an output bias.
        init: initial steps 2 mean|v| / d with d = sqrt(2^(bits-1) - 1) ("lsq"), or bitorch-engine's constants ("bie", for 4 and
            8 bits: 11.269 for activations, 5.6345 or 11.269 for weights). scale_a takes its value from the first
            batch in training.
        eps: the least value of a step; a step below it counts as eps.
        clip_weight_gradient: False gives weights beyond the range a gradient as well.

    Parameters: weight [N, K], bias_a [K] (shift of the input, 0 at first), scale_a, scale_w (scalars, float32), bias [N].
    Evaluation runs on packed codes (the same bits as training), made when first needed and again when the weight has changed.
    ValueError for a last dimension that is not in_features; RuntimeError in evaluation before scale_a has a value.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bits=4,
        bias=False,
        init="lsq",
        *,
        eps=1e-5,
        clip_weight_gradient=True,
        device=None,
        dtype=None,
    ):
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            "QuantizedLinear",
            (out_features, in_features),
            in_features,
            bits,
            bias,
            init,
            eps,
            clip_weight_gradient,
            device,
            dtype,
        )

    @classmethod
    def from_float(cls, linear, bits=4, init="lsq", **options):
        """A quantized copy of a torch.nn.Linear: its weight becomes the master weight, its bias the output bias."""
        weight = linear.weight
        module = cls(
            linear.in_features,
            linear.out_features,
            bits,
            linear.bias is not None,
            init,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        module.set_weight_data(weight.detach())
        if linear.bias is not None:
            with torch.no_grad():
                module.bias.copy_(linear.bias)
        return module.train(linear.training)

    from_linear = from_float

    def _check_forward(self, x):
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"QuantizedLinear: x is {list(x.shape)}, expected [..., in_features = {self.in_features}]")

    def forward(self, x):
        self._check_forward(x)
        self._ready((self.scale_a, x))
        weight, codes = self._operands()
        return functional.quantized_linear(
            x,
            weight,
            self.scale_a,
            self.scale_w,
            _like(self.bias_a, x),
            _like(self.bias, x),
            codes=codes,
            bits=self.bits,
            eps=self.eps,
            clip_weight_gradient=self.clip_weight_gradient,
        )

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, " + self._extra()


def _like(v, x):
    """A shift or bias in x's dtype, which the op asks for; under autocast the op casts both itself."""
    return v if v is None or torch.is_autocast_enabled(x.device.type) else v.to(x.dtype)


def _pair(name, v):
    pair = (v, v) if isinstance(v, int) else tuple(v)
    if len(pair) != 2:
        raise ValueError(f"QuantizedConv2d: {name} is {v!r}, expected a number or two")
    return pair


class QuantizedConv2d(_QuantizedLayer):
    """The convolution of q(x + bias_a) with q(weight), times both scales, plus bias; [N, C, H, W] or [C, H, W].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d, numbers or pairs.
            Padding is zeros around x + bias_a.
        bits, bias, init, eps, clip_weight_gradient: as in QuantizedLinear.

    Parameters: weight [O, C/groups, kh, kw], bias_a [C], scale_a, scale_w, bias [O]. The result is channels_last when x is.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bits=4,
        bias=False,
        init="lsq",
        *,
        eps=1e-5,
        clip_weight_gradient=True,
        device=None,
        dtype=None,
    ):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"QuantizedConv2d: groups is {groups}, expected a divisor of in_channels = {in_channels} and out_channels = "
                f"{out_channels}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair("kernel_size", kernel_size), _pair("stride", stride)
        self.padding, self.dilation = _pair("padding", padding), _pair("dilation", dilation)
        super().__init__(
            "QuantizedConv2d",
            (out_channels, in_channels // groups, *self.kernel_size),
            in_channels,
            bits,
            bias,
            init,
            eps,
            clip_weight_gradient,
            device,
            dtype,
        )

    @classmethod
    def from_float(cls, conv, bits=4, init="lsq", **options):
        """A quantized copy of a torch.nn.Conv2d with zero padding."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"QuantizedConv2d: padding is {conv.padding!r} of mode {conv.padding_mode!r}, expected numbers of mode 'zeros'"
            )
        weight = conv.weight
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bits,
            conv.bias is not None,
            init,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        module.set_weight_data(weight.detach())
        if conv.bias is not None:
            with torch.no_grad():
                module.bias.copy_(conv.bias)
        return module.train(conv.training)

    def _shift(self, x):
        return self.bias_a[:, None, None]

    def _check_forward(self, x):
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"QuantizedConv2d: x is {list(x.shape)}, expected [N, in_channels = {self.in_channels}, H, W]")

    def forward(self, x):
        self._check_forward(x)
        self._ready((self.scale_a, x))
        weight, codes = self._operands()
        y = functional.quantized_conv2d(
            x if x.dim() == 4 else x[None],
            weight,
            self.scale_a,
            self.scale_w,
            _like(self.bias_a, x),
            _like(self.bias, x),
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            codes=codes,
            bits=self.bits,
            eps=self.eps,
            clip_weight_gradient=self.clip_weight_gradient,
        )
        return y if x.dim() == 4 else y[0]

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, " + self._extra()
        )


class QuantizedMatmul(_StepState):
    """x [..., M, K] times z [..., N, K] transposed, both on learned steps scale_x and scale_z (scalars, float32).

    The steps take their values 2 mean|.| / d from the first operands in training, each from its own.

    Args:
        bits: 2 to 8; 4 is the Q4 matmul.
        init, eps: as in QuantizedLinear.
    """

    def __init__(self, bits=4, init="lsq", *, eps=1e-5, device=None):
        super().__init__("QuantizedMatmul", bits, init, eps)
        self.scale_x = torch.nn.Parameter(torch.ones((), device=device, dtype=torch.float32))
        self.scale_z = torch.nn.Parameter(torch.ones((), device=device, dtype=torch.float32))

    def set_activation_scale(self, x, z):
        """Initialises both steps from x and z if nothing has yet."""
        if not self.activation_initialised and x.numel() > 0 and z.numel() > 0:
            self._initialise((self.scale_x, x), (self.scale_z, z))

    def forward(self, x, z):
        self._ready((self.scale_x, x), (self.scale_z, z))
        return functional.quantized_matmul(x, z, self.scale_x, self.scale_z, self.bits, self.eps)

    def extra_repr(self):
        return f"bits={self.bits}, init={self.init!r}"


class QuantizedAttention(torch.nn.Module):
    """Multi-head attention in integers: projections are QuantizedLinear, scores and context QuantizedMatmul.

    scores = Q K^T / sqrt(head_dim), context = softmax(scores) V, softmax in the input's dtype; [batch, seq, embed_dim] to the
    same.

    Args:
        embed_dim, num_heads: embed_dim is a multiple of num_heads, else ValueError.
        bits, bias, init: as in QuantizedLinear, for projections and products.
        dropout: of the attention probabilities, in training.
    """

    def __init__(self, embed_dim, num_heads, bits=4, bias=True, init="lsq", *, dropout=0.0, device=None, dtype=None):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"QuantizedAttention: num_heads is {num_heads}, expected a divisor of embed_dim = {embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = embed_dim, num_heads, embed_dim // num_heads, dropout
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, QuantizedLinear(embed_dim, embed_dim, bits, bias, init, device=device, dtype=dtype))
        self.scores = QuantizedMatmul(bits, init, device=device)
        self.context = QuantizedMatmul(bits, init, device=device)

    def forward(self, query, key=None, value=None, mask=None, is_causal=False):
        """key and value default to query and key. mask broadcasts to [batch, heads, queries, keys]: bool, where True may be
        attended to, or numbers added to the scores; a mask of key positions is [batch, 1, 1, keys]. A query that may attend to
        nothing gives NaN."""
        key = query if key is None else key
        value = key if value is None else value

        def heads(x):
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

        q, k, v = heads(self.q_proj(query)), heads(self.k_proj(key)), heads(self.v_proj(value))
        scores = self.scores(q, k) / math.sqrt(self.head_dim)
        if is_causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        probabilities = F.dropout(scores.softmax(-1), self.dropout, self.training)
        context = self.context(probabilities, v.transpose(-2, -1))
        return self.out_proj(context.transpose(-3, -2).flatten(-2))

    def extra_repr(self):
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"
