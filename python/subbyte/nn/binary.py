"""Layers whose weights and activations are signs. Training keeps a float weight; deployment keeps one bit a weight."""

import math

import torch

from .. import functional as F


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _first_scale(x, symmetric):
    """2 mean|x| (4 mean|x| when not symmetric), at least 1e-5: the starting value of an activation scale."""
    return ((2.0 if symmetric else 4.0) * x.detach().float().abs().mean()).clamp_min(1e-5)


class _Flags:
    """Flags that travel in the state_dict as boolean buffers, with a copy on the host, so that forward never waits for a device."""

    _flag_names = ()

    def _register_flags(self, *names, device=None):
        self._flag_names = names
        for name in names:
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=device))
        self._flags = dict.fromkeys(names, False)

    def _set_flag(self, name, value=True):
        getattr(self, name).fill_(value)
        self._flags = {**self._flags, name: value}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._flag_names:
            if prefix + name in state_dict and not state_dict[prefix + name].is_meta:
                self._flags = {**self._flags, name: bool(state_dict[prefix + name])}


class _BinaryWeight(_Flags, torch.nn.Module):
    """What BinaryLinear and BinaryConv2d share: the latent weight, its packed signs, scales and shift.

    State: weight (float parameter, None once only the signs are kept), bias_a (shift of the input), scale_a (parameter),
    scale_w (buffer), bias (parameter or None), qweight (uint8 buffer [N, ceil(K/8)], canonical "sign" rows, None until packed),
    and the flags prepared and scale_initialized. The state_dict holds weight, or qweight where there is no weight; either loads.
    """

    def _init_binary(self, weight_shape, shift_size, bias, symmetric, device, dtype):
        options = {"device": device, "dtype": dtype}
        self.symmetric = symmetric
        self._weight_shape = tuple(weight_shape)
        self.weight = torch.nn.Parameter(torch.empty(weight_shape, **options))
        self.bias_a = torch.nn.Parameter(torch.zeros(shift_size, **options))
        self.scale_a = torch.nn.Parameter(torch.ones((), **options))
        self.register_buffer("scale_w", torch.ones((), **options))
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(weight_shape[0], **options)) if bias else None)
        self.register_buffer("qweight", None)
        self._register_flags("prepared", "scale_initialized", device=device)
        self._packed_from = None
        self.reset_parameters()

    def reset_parameters(self):
        """Fresh weights, kaiming_uniform(a=sqrt(5)), scale_w = mean|W|; scale_a and flags as at construction."""
        if self.weight is None:
            raise ValueError(f"{type(self).__name__}: there is no float weight to reset, only its packed signs are kept")
        with torch.no_grad():
            if self.weight.numel() > 0:
                torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            self.bias_a.zero_()
            self.scale_a.fill_(1.0)
            self._set_weight_scale()
            if self.bias is not None:
                self.bias.zero_()
        self._set_flag("prepared", False)
        self._set_flag("scale_initialized", False)

    def prepare_params(self):
        """Once, before training, after the weight has been written to: scale_w = mean|W|, then W - mean(W). Fresh weights have
        their scale_w from the start. Later calls, and calls without a float weight, do nothing."""
        if self.weight is None or self._flags["prepared"]:
            return
        with torch.no_grad():
            self._set_weight_scale()
            if self.weight.numel() > 0:
                self.weight.sub_(self.weight.mean())
        self._set_flag("prepared")

    def _set_weight_scale(self):
        self.scale_w.copy_(self.weight.float().abs().mean().clamp_min(1e-12) if self.weight.numel() > 0 else torch.ones(()))

    def initialize_scale(self, x):
        """scale_a = 2 mean|x| (4 mean|x| when not symmetric). forward does it with the first batch in training; call it
        yourself, before wrapping the model, where the ranks of a distributed run must start alike."""
        if x.numel() > 0:
            with torch.no_grad():
                self.scale_a.copy_(_first_scale(x, self.symmetric))
            self._set_flag("scale_initialized")

    def set_weight_data(self, data):
        """Replaces the values of the float weight; it goes on being trained if it was."""
        if self.weight is None:
            raise ValueError(f"{type(self).__name__}: only packed signs are kept, there is no float weight to set")
        with torch.no_grad():
            self.weight.copy_(data)

    def generate_quantized_weight(self, qweight_only=False):
        """Packs the signs into qweight. With qweight_only the float weight goes: one bit a weight is left, for inference."""
        if self.weight is None:
            return
        self._pack()
        if qweight_only:
            self.register_parameter("weight", None)
            self._packed_from = None

    def _weight_version(self):
        return 0 if self.weight.is_inference() else self.weight._version

    def _pack(self):
        self.qweight = F.pack_signs(self.weight)
        # The alias keeps the storage alive, so that its address cannot be that of another weight.
        self._packed_from = (self.weight.detach(), self._weight_version())

    def _operands(self):
        """(weight, codes) for the op. Packed signs are used in eval, and made anew when the weight has changed since."""
        if self.weight is None:
            return None, self.qweight
        # While compiling the float weight stands in: the same values, and no question about versions in the graph.
        if self.training or torch.compiler.is_compiling():
            return self.weight, None
        source = self._packed_from
        if (
            self.qweight is None
            or source is None
            or source[0].data_ptr() != self.weight.data_ptr()
            or source[1] != self._weight_version()
        ):
            self._pack()
        return self.weight, self.qweight

    def _start(self, x):
        if self.training and not self._flags["scale_initialized"]:
            self.initialize_scale(x)

    def train(self, mode=True):
        super().train(mode)
        if mode and self.weight is not None:
            self.qweight, self._packed_from = None, None
        return self

    def __getstate__(self):
        return {**self.__dict__, "_packed_from": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is not None:
            destination.pop(prefix + "qweight", None)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        has_weight, has_codes = prefix + "weight" in state_dict, prefix + "qweight" in state_dict
        if has_codes and not has_weight:
            row_bytes = -(-math.prod(self._weight_shape[1:]) // 8)
            self.register_parameter("weight", None)
            self.qweight = torch.empty(self._weight_shape[0], row_bytes, dtype=torch.uint8, device=self.scale_w.device)
        elif has_weight:
            if self.weight is None:
                self.weight = torch.nn.Parameter(torch.empty(self._weight_shape).to(self.scale_w))
            self.qweight = None
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "qweight"}
        self._packed_from = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _copy_float(self, layer):
        with torch.no_grad():
            self.weight.copy_(layer.weight)
            if layer.bias is not None:
                self.bias.copy_(layer.bias)
        self.weight.requires_grad_(layer.weight.requires_grad)
        self.prepare_params()
        return self.train(layer.training)

    def _binary_repr(self):
        return (", bias=True" if self.bias is not None else "") + (", packed" if self.weight is None else "")


class BinaryLinear(_BinaryWeight):
    """y = scale_a * scale_w * (sign(x + bias_a) @ sign(weight).T) + bias, x [..., in_features] of any leading shape.

    Args:
        in_features, out_features: any sizes.
        bias: adds a trained bias [out_features] to the output.
        device, dtype: of the parameters.
        symmetric: False starts scale_a at 4 mean|x| instead of 2 mean|x| (activations of one sign).

    Gradients: subbyte.functional.binary_linear. Integers are exact until the scale, in every dtype.
    """

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None, *, symmetric=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_binary((out_features, in_features), in_features, bias, symmetric, device, dtype)

    @classmethod
    def from_linear(cls, linear, *, symmetric=True):
        """A binary copy of a torch.nn.Linear: weight and bias are copied, then prepare_params() is called."""
        weight = linear.weight
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype, symmetric=symmetric
        )
        return module._copy_float(linear)

    def forward(self, x):
        self._start(x)
        weight, codes = self._operands()
        return F.binary_linear(x, weight, self.scale_a, self.scale_w, shift=self.bias_a, bias=self.bias, codes=codes)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}" + self._binary_repr()


class BinaryConv2d(_BinaryWeight):
    """y = scale_a * scale_w * conv2d(sign(x + bias_a), sign(weight)) + bias, x [B, C, H, W], NCHW or channels_last.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as in torch.nn.Conv2d
            with numeric padding; bias is off unless asked for.
        pad_value: what positions outside the image count as: 0 (no contribution), -1 or 1.
        symmetric: as in BinaryLinear.

    bias_a has one element a channel. Gradients: subbyte.functional.binary_conv2d.
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
        bias=False,
        device=None,
        dtype=None,
        *,
        pad_value=0,
        symmetric=True,
    ):
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"BinaryConv2d: groups is {groups}, expected a divisor of in_channels = {in_channels} and out_channels = "
                f"{out_channels}"
            )
        if pad_value not in (-1, 0, 1):
            raise ValueError(f"BinaryConv2d: pad_value is {pad_value!r}, expected -1, 0 or 1")
        self.in_channels, self.out_channels, self.groups, self.pad_value = in_channels, out_channels, groups, pad_value
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._init_binary(shape, in_channels, bias, symmetric, device, dtype)

    @classmethod
    def from_conv2d(cls, conv, *, pad_value=0, symmetric=True):
        """A binary copy of a torch.nn.Conv2d: weight and bias are copied, then prepare_params() is called."""
        if conv.padding_mode != "zeros":
            raise ValueError(f"BinaryConv2d: padding_mode is {conv.padding_mode!r}, expected 'zeros'")
        padding = conv.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
            if any(span % 2 for span in spans):
                raise ValueError("BinaryConv2d: padding 'same' of an even kernel differs on both sides, expected a number")
            padding = tuple(span // 2 for span in spans)
        weight = conv.weight
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            weight.device,
            weight.dtype,
            pad_value=pad_value,
            symmetric=symmetric,
        )
        return module._copy_float(conv)

    def forward(self, x):
        self._start(x)
        weight, codes = self._operands()
        return F.binary_conv2d(
            x,
            weight,
            self.scale_a,
            self.scale_w,
            shift=self.bias_a,
            bias=self.bias,
            codes=codes,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            pad_value=self.pad_value,
        )

    def extra_repr(self):
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text + f", pad_value={self.pad_value}" + self._binary_repr()


class BinaryMatmul(_Flags, torch.nn.Module):
    """y = x_clip * z_clip * (sign(x) @ sign(z).T), x [..., M, K], z [..., N, K], with trained clips.

    The first batch in training sets each clip to 2 mean|operand| (4 mean|.| when not symmetric).
    Gradients: subbyte.functional.binary_matmul.
    """

    def __init__(self, device=None, dtype=None, *, symmetric=True):
        super().__init__()
        self.symmetric = symmetric
        self.x_clip = torch.nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.z_clip = torch.nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self._register_flags("clip_initialized", device=device)

    def initialize_clips(self, x, z):
        """Each clip from its own operand."""
        if x.numel() > 0 and z.numel() > 0:
            with torch.no_grad():
                self.x_clip.copy_(_first_scale(x, self.symmetric))
                self.z_clip.copy_(_first_scale(z, self.symmetric))
            self._set_flag("clip_initialized")

    def forward(self, x, z):
        if self.training and not self._flags["clip_initialized"]:
            self.initialize_clips(x, z)
        return F.binary_matmul(x, z, self.x_clip, self.z_clip)


class BinaryAttention(torch.nn.Module):
    """Multi-head self-attention with binary projections.

    output = out(dropout(softmax(Q K^T / sqrt(head_dim))) V), Q, K, V = binary linear layers of x; returns (output, probabilities
    after dropout). Scores are taken in float32. Positions whose mask is 0 get the score -1e9.

    Args:
        input_dim, hidden_dim, num_heads: hidden_dim must be a multiple of num_heads. x [batch, seq, input_dim], output
            [batch, seq, hidden_dim], probabilities [batch, heads, seq, seq].
        dropout: probability.
        binary_scores: Q K^T is a product of signs too (BinaryMatmul with trained clips).
        device, dtype: of the parameters.

    forward(x, mask=None): mask [batch, 1, 1, seq] (keys that exist) or [batch, 1, seq, seq] (who sees whom); 0 or False hides.
    """

    def __init__(
        self, input_dim, hidden_dim, num_heads, dropout=0.1, *, binary_scores=False, symmetric=True, device=None, dtype=None
    ):
        super().__init__()
        if num_heads < 1 or hidden_dim % num_heads:
            raise ValueError(f"BinaryAttention: hidden_dim is {hidden_dim}, expected a multiple of num_heads = {num_heads}")
        self.input_dim, self.hidden_dim, self.num_heads = input_dim, hidden_dim, num_heads
        self.head_dim = hidden_dim // num_heads
        options = {"device": device, "dtype": dtype, "symmetric": symmetric}
        self.q_linear = BinaryLinear(input_dim, hidden_dim, **options)
        self.k_linear = BinaryLinear(input_dim, hidden_dim, **options)
        self.v_linear = BinaryLinear(input_dim, hidden_dim, **options)
        self.out_linear = BinaryLinear(hidden_dim, hidden_dim, **options)
        self.scores = BinaryMatmul(**options) if binary_scores else None
        self.dropout = torch.nn.Dropout(dropout)

    def prepare_params(self):
        for layer in (self.q_linear, self.k_linear, self.v_linear, self.out_linear):
            layer.prepare_params()

    def generate_quantized_weight(self, qweight_only=False):
        for layer in (self.q_linear, self.k_linear, self.v_linear, self.out_linear):
            layer.generate_quantized_weight(qweight_only)

    def _check_mask(self, mask, batch, seq):
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] not in (1, seq):
            ok = False
        else:
            ok = mask.shape[3] == seq
        if not ok:
            raise ValueError(
                f"BinaryAttention: mask is {list(mask.shape)}, expected [{batch}, 1, 1, {seq}] or [{batch}, 1, {seq}, {seq}]"
            )

    def forward(self, x, mask=None):
        if x.dim() != 3 or x.shape[-1] != self.input_dim:
            raise ValueError(f"BinaryAttention: x is {list(x.shape)}, expected [batch, seq, {self.input_dim}]")
        batch, seq, _ = x.shape
        if mask is not None:
            self._check_mask(mask, batch, seq)
        q, k, v = (
            layer(x).reshape(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.q_linear, self.k_linear, self.v_linear)
        )
        scores = (q @ k.transpose(-2, -1) if self.scores is None else self.scores(q, k)).float() / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        probabilities = self.dropout(torch.softmax(scores, -1).to(v.dtype))
        context = (probabilities @ v).transpose(1, 2).reshape(batch, seq, self.hidden_dim)
        return self.out_linear(context), probabilities

    def extra_repr(self):
        return f"input_dim={self.input_dim}, hidden_dim={self.hidden_dim}, num_heads={self.num_heads}"
