"""bitorch_engine's layers of one-bit weights and activations: linear, matmul, convolution, attention."""

import enum
import math

import torch

from .. import _library, nn
from ..functional import pack
from .cuda_functions import unpack_uint8_tensor
from .integer_parameter import IntegerParameter, MasterParameter, gradient_handle, wants_gradient
from .life_cycle import PackedLayer, init_weight
from .operator_function import OperatorFunction
from .optimizer import flip_signs, sign_state, signs_of
from .packing_layer import ContentVersion, LearnedScales, PackingState

_ops = _library.load()

_LEAST_SCALE = 1e-5


class BinaryLinearParameter(IntegerParameter):
    """An int8 weight of which layers read the sign; grad is a float tensor. update flips signs: Diode's rule."""

    @staticmethod
    def update(
        qweight,
        exp_avg_s=None,
        exp_avg_l=None,
        step=None,
        lr=1e-4,
        weight_decay=0.0,
        beta1=0.99,
        beta2=0.9999,
        eps=1e-6,
        dtype=torch.half,
        correct_bias=None,
        projector=None,
        grad=None,
    ):
        """l += (1 - beta1) (g - l); s += (1 - beta2) (lr sign(l) - s); where sign(w) is not -sign(s), w := -w; s = 0 means +1.

        l = exp_avg_l (in the projector's space, projected back for the sign), s = exp_avg_s, which starts at -sign(w) times a
        small random number. eps, weight_decay and correct_bias have no part in the rule.
        """
        assert isinstance(qweight, BinaryLinearParameter), f"update: qweight is {type(qweight).__name__}"
        grad = qweight.grad if grad is None else grad
        flip_signs(qweight, grad, exp_avg_s, exp_avg_l, step, lr, beta1, beta2, projector)

    @staticmethod
    def initial_state(qweight, grad, dtype):
        """Of DiodeMix: exp_avg_s, exp_avg_l."""
        return {"exp_avg_s": sign_state(signs_of(qweight, dtype)), "exp_avg_l": torch.zeros_like(grad, dtype=dtype)}


class BinaryConvParameter(BinaryLinearParameter):
    """BinaryLinearParameter of a convolution."""


class BMM(enum.Enum):
    """The two kinds of kernels of BinaryLinearCuda, which here only name the layout of qweight."""

    BSTC32 = 1
    BTC32 = 2
    ADAPTIVE = 3


def _at_least(scale):
    """max(scale, 1e-5), with the gradient of scale."""
    kept = scale.detach()
    return kept.clamp_min(_LEAST_SCALE) + (scale - kept)


class _BinaryLayer(PackedLayer, LearnedScales, PackingState, torch.nn.Module):
    """The weight of binary layers: float, or int8 after prepare_params, and its packed signs in the layout of the class."""

    _parameter = BinaryLinearParameter
    _scaled = False  # whether there are scale_a, scale_w and bias_a
    _scales = ()
    _layout = "pack8"

    def _init_weight_state(self, shape, channels):
        self.bits_binary_word = 8
        self.weight = self._master(torch.empty(shape, device=self.device, dtype=self.dtype))
        self._init_packing()
        self._shape = torch.Size(shape)
        self._sign_codes = (None, None)
        self._stored_codes = (None, None)
        if self._scaled:
            self.bias_a = torch.nn.Parameter(torch.zeros(channels, device=self.device, dtype=self.dtype))
            self.scale_a = torch.nn.Parameter(torch.zeros((), device=self.device, dtype=self.dtype))
            self._make_scale_w(torch.ones((), device=self.device, dtype=self.dtype))
        self._init_scales()
        self.reset_parameters()

    def _master(self, weight, requires_grad=True):
        return MasterParameter(weight, requires_grad, self._parameter)

    def _make_scale_w(self, value):
        self.register_buffer("scale_w", value)

    def reset_parameters(self):
        if self.weight.numel():
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def set_bits_binary_word(self, num_bit):
        self.bits_binary_word = num_bit

    def prepare_params(self):
        """weight becomes the int8 parameter of init_weight, and scale_w its mean|W|, where the class has scales. Idempotent."""
        if self._scaled and self.weight is not None and self.weight.is_floating_point():
            self._take(self.weight.detach())

    def _take(self, weight):
        trains = True if self.weight is None else self.weight.requires_grad
        parameter, scale = init_weight(weight, cls=self._parameter)
        parameter.requires_grad = trains
        self.weight = parameter
        with torch.no_grad():
            self.scale_w.copy_(scale)

    def set_weight_data(self, x):
        """Takes x as the weight; layers with scales bring it into the form of prepare_params at once."""
        if x.shape != self._shape or not x.is_floating_point():
            raise ValueError(f"set_weight_data: x is {x.dtype} {list(x.shape)}, expected floating point {list(self._shape)}")
        if self._scaled:
            self._take(x.detach())
        else:
            trains = True if self.weight is None else self.weight.requires_grad
            self.weight = self._master(x.detach(), trains)

    def set_quantized_weight_data(self, x):
        """Takes x as the packed weight."""
        self._set_qweight(x.detach(), qweight_only=False)

    def _matrix(self):
        return self._shape[0], self._shape[1:].numel()

    def _packed_signs(self):
        """Canonical rows of the signs of weight."""
        key = ContentVersion(self.weight)
        if self._sign_codes[0] != key:
            n, k = self._matrix()
            signs = (self.weight.detach() >= 0).to(torch.uint8).reshape(n, k)
            self._sign_codes = (key, pack(signs, "sign"))
        return self._sign_codes[1]

    def _layout_of(self, qweight):
        return self._layout

    def _shaped(self, qweight):
        return qweight

    def generate_quantized_weight(self, qweight_only=False):
        """qweight = the packed signs in the layout of the class; qweight_only drops weight."""
        if self.weight is None:
            return
        n, k = self._matrix()
        packed = _ops.relayout(self._packed_signs(), "sign", self._layout_of(None), n, k, None)
        self._set_qweight(self._shaped(packed), qweight_only)

    def _codes_of_qweight(self):
        qweight = self._ensure_packed()
        key = ContentVersion(qweight)
        if self._stored_codes[0] != key:
            n, k = self._matrix()
            self._stored_codes = (key, _ops.relayout(qweight.detach(), self._layout_of(qweight), "sign", n, k, None))
        return self._stored_codes[1]

    def _operands(self):
        """(what receives the gradient, codes) for the operator; codes None: the weight is float and gives its own signs."""
        training = self.training and self.weight is not None
        if training:
            self._note_training()
        if isinstance(self.weight, IntegerParameter):
            codes = self._packed_signs() if training else self._codes_of_qweight()
            if not wants_gradient(self.weight):
                return None, codes
            parameter = self.weight
            return gradient_handle(self._shape, torch.float32, parameter.device, parameter.accumulate_grad), codes
        return self.weight, None if training else self._codes_of_qweight()

    def _activation_scale(self, x):
        return self._scale("scale_a", lambda: (2 if self.symmetric else 4) * x.detach().float().abs().mean())

    def set_activation(self, x):
        """Initialises scale_a on the first use, in training, to 2 mean|x| (4 mean|x| if not symmetric); returns x + bias_a."""
        self._activation_scale(x)
        return x + self.bias_a.to(x.dtype).reshape((-1,) + (1,) * (len(self._shape) - 2))

    def _scales_for(self, x):
        """(shift, scale_a, scale_w) for the operator."""
        if not self._scaled:
            one = torch.ones((), device=x.device)
            return None, one, one
        return self.bias_a, _at_least(self._activation_scale(x)), _at_least(self.scale_w)

    def __getstate__(self):
        return {**super().__getstate__(), "_sign_codes": (None, None), "_stored_codes": (None, None)}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = state_dict.get(prefix + "weight")
        if given is not None and self.weight is not None and given.dtype != self.weight.dtype:
            integer = not given.is_floating_point()
            empty = torch.empty(self._shape, dtype=given.dtype, device=self.weight.device)
            self.weight = self._parameter(empty) if integer else self._master(empty)
        super()._load_from_state_dict(state_dict, prefix, *args)


# ---- linear


class BinaryLinearBase(_BinaryLayer):
    """weight [n, k], kaiming-uniform; qweight None until packed."""

    def __init__(self, input_features, out_features, device=None, dtype=torch.float, symmetric=True):
        super().__init__()
        self.input_features, self.output_features = input_features, out_features
        self.device, self.dtype, self.symmetric = device, dtype, symmetric
        self._init_weight_state((out_features, input_features), input_features)

    def _check_forward(self, x):
        if x.dim() == 0 or x.shape[-1] != self.input_features:
            raise ValueError(f"{type(self).__name__}: x is {list(x.shape)}, expected [..., {self.input_features}]")

    def forward(self, x):
        """x [..., k] -> [..., n] of x's dtype: scale_a scale_w (sign(x + bias_a) . sign(W)^T); without scales they are 1."""
        self._check_forward(x)
        weight, codes = self._operands()
        shift, scale_a, scale_w = self._scales_for(x)
        return _ops.binary_linear(x, weight, codes, shift, scale_a, scale_w)

    def extra_repr(self):
        return f"input_features={self.input_features}, output_features={self.output_features}"


class BinaryLinearCPP(BinaryLinearBase):
    """y = sign(x) . sign(W)^T on any device. qweight: uint8, flat; byte y n + x holds columns 8y .. 8y + 7 of row x.

    x may be packed: uint8 [..., k / 8] of get_binary_row or tensor_to_packed_uint8 gives float32.
    """

    _layout = "cpp_col"

    def __init__(self, input_features, out_features, device=None, dtype=torch.float, symmetric=True):
        super().__init__(input_features, out_features, device, dtype, symmetric)

    def forward(self, x):
        if x.dtype == torch.uint8:
            if self.input_features % 8 or x.dim() == 0 or 8 * x.shape[-1] != self.input_features:
                raise ValueError(
                    f"BinaryLinearCPP: x is uint8 {list(x.shape)}, expected [..., {self.input_features} / 8] bytes of 8 signs"
                )
            x = unpack_uint8_tensor(x, torch.ones((), device=x.device))
        return super().forward(x)


def _adaptive(n, k):
    return "btc" if k % 128 == 0 and n % 8 == 0 else "bstc"


def _layout_for(bmm_type, n, k):
    return {BMM.BSTC32: "bstc", BMM.BTC32: "btc", BMM.ADAPTIVE: _adaptive(n, k)}[bmm_type]


class BinaryLinearCuda(BinaryLinearBase):
    """Binary linear with learned scales, on any device. bmm_type says in which of two layouts qweight is stored.

    A qweight from outside (set, assigned or loaded) is read in the layout of bmm_type; forward(x, bmm_type) changes that, and
    brings what the layer has packed itself into the new layout.
    """

    _scaled = True
    _scales = ("scale_a",)

    def __init__(self, *args, bmm_type=BMM.ADAPTIVE, **kwargs):
        self.bmm_type = bmm_type
        self._own_packing = False
        super().__init__(*args, **kwargs)
        self._check_layout(bmm_type)

    def _check_layout(self, bmm_type):
        n, k = self._matrix()
        if _layout_for(bmm_type, n, k) == "btc" and (n % 8 or k % 128):
            raise ValueError(f"BinaryLinearCuda: bmm_type is {bmm_type} with n = {n}, k = {k}: expected n % 8 = k % 128 = 0")

    def __setattr__(self, name, value):
        if name == "qweight":
            self._own_packing = False
        super().__setattr__(name, value)

    def generate_quantized_weight(self, qweight_only=False):
        packs = self.weight is not None
        super().generate_quantized_weight(qweight_only)
        self._own_packing = self._own_packing or packs

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "qweight" in state_dict:
            self._own_packing = False

    @property
    def device_id(self):
        """Index of the weight's device, 0 on the CPU."""
        return self.bias_a.device.index or 0

    def _layout_of(self, qweight):
        n, k = self._matrix()
        layout = _layout_for(self.bmm_type, n, k)
        if qweight is None or layout == "btc" or qweight.numel() != n * k // 8:
            return layout
        return "bstc_truncated"

    @staticmethod
    def w_pack(weights, bmm_type):
        """The signs of weights [n, k] in the layout of bmm_type: uint8, flat."""
        n, k = weights.shape
        signs = pack((weights.detach() >= 0).to(torch.uint8), "sign")
        return _ops.relayout(signs, "sign", _layout_for(bmm_type, n, k), n, k, None)

    def _change_layout(self, bmm_type):
        self._check_layout(bmm_type)
        n, k = self._matrix()
        old, new = _layout_for(self.bmm_type, n, k), _layout_for(bmm_type, n, k)
        if self._own_packing and self.qweight is not None and old != new:
            self._buffers["qweight"] = _ops.relayout(self.qweight, old, new, n, k, None)
        self.bmm_type, self._stored_codes = bmm_type, (None, None)

    def forward(self, x, bmm_type=None):
        """bmm_type: None keeps the layer's; another becomes it. It names the layout of qweight, and nothing else."""
        if bmm_type is not None and bmm_type is not self.bmm_type:
            self._change_layout(bmm_type)
        return super().forward(x)


class BinaryLinearCutlass(BinaryLinearBase):
    """Binary linear with learned scales, on any device. qweight: uint8 [n, ceil(k / 8)]; scale_w gets no gradient."""

    _scaled = True
    _scales = ("scale_a",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gemm_kernel_id = 3

    def _make_scale_w(self, value):
        self.scale_w = torch.nn.Parameter(value, requires_grad=False)

    def select_gemm_kernel(self, x):
        """Nothing to choose: the operator picks its kernel."""


def default_binary_linear():
    """What the name BinaryLinear means: BinaryLinearCuda where there is a CUDA device, else BinaryLinearCPP."""
    return BinaryLinearCuda if torch.cuda.is_available() else BinaryLinearCPP


BinaryLinear = default_binary_linear()


class BinaryMatMulFunction(OperatorFunction):
    """apply(x, y, x_clip, y_clip): x_clip y_clip (sign(x) . sign(y)^T), x [..., m, k], y [..., n, k] -> [..., m, n]."""

    @staticmethod
    def run(x, y, x_clip, y_clip):
        return _ops.binary_matmul(x, y, _at_least(x_clip), _at_least(y_clip))


class BinaryMatMul(LearnedScales, torch.nn.Module):
    """BinaryMatMulFunction with learned clips, which start at 2 mean|x| and 2 mean|y|."""

    _scales = ("x_clip", "y_clip")

    def __init__(self, dtype=torch.float, *args, device=None, **kwargs):
        super().__init__()
        self.dtype = dtype
        self.x_clip = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device))
        self.y_clip = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device))
        self._init_scales()

    def set_activation_scale(self, x, y):
        """Initialises x_clip from x and y_clip from y, in training; returns both as they are to be used."""
        return tuple(
            self._scale(name, lambda t=t: 2 * t.detach().float().abs().mean()) for name, t in (("x_clip", x), ("y_clip", y))
        )

    def forward(self, x, y):
        return BinaryMatMulFunction.apply(x, y, *self.set_activation_scale(x, y))


# ---- convolution


class BinaryConv2dBase(_BinaryLayer):
    """weight [O, C, ks, ks], kaiming-uniform. pad_value: what a border element counts as, -1, 0 or 1."""

    _parameter = BinaryConvParameter
    _pad_value = 0

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        device=None,
        dtype=torch.float,
        symmetric=True,
        pad_value=None,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.device, self.dtype, self.symmetric = device, dtype, symmetric
        self.pad_value = self._pad_value if pad_value is None else pad_value
        self._init_weight_state((out_channels, in_channels, kernel_size, kernel_size), in_channels)

    def _check_forward(self, x):
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__}: x is {list(x.shape)}, expected [N, {self.in_channels}, H, W]")

    def forward(self, x):
        """x [N, C, H, W] -> [N, O, OH, OW] of x's dtype: scale_a scale_w conv2d(sign(x + bias_a), sign(W))."""
        self._check_forward(x)
        weight, codes = self._operands()
        shift, scale_a, scale_w = self._scales_for(x)
        square = (self.kernel_size, self.stride, self.padding, self.dilation)
        kernel, stride, padding, dilation = ([value, value] for value in square)
        return _ops.binary_conv2d(
            x, weight, codes, shift, scale_a, scale_w, None, kernel, stride, padding, dilation, 1, self.pad_value
        )

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, pad_value={self.pad_value}"
        )


class BinaryConv2dCPP(BinaryConv2dBase):
    """conv2d(sign(x), sign(W)) with borders of -1, on any device. qweight: uint8, flat: one stream over [O, C, ks, ks]."""

    _layout = "conv_cpp"
    _pad_value = -1


class BinaryConv2dCutlass(BinaryConv2dBase):
    """Binary convolution with learned scales, NCHW in and out, on any device.

    qweight: uint8 [O, ks, ks, C / 8], which labels the bits of the weight's memory in the order [O, C, ks, ks].
    """

    _scaled = True
    _scales = ("scale_a",)
    _layout = "conv_cutlass"

    def _make_scale_w(self, value):
        self.scale_w = torch.nn.Parameter(value, requires_grad=False)

    def _shaped(self, qweight):
        o, c, ks, _ = self._shape
        return qweight.reshape(o, ks, ks, c // 8) if c % 8 == 0 else qweight


# ---- attention


class LearnableBias(torch.nn.Module):
    """x + bias, one number a channel (the last axis)."""

    def __init__(self, out_chn):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(out_chn))

    def forward(self, x):
        return x + self.bias.expand_as(x)


class BMHA(nn.BinaryAttention):
    """Multi-head self-attention whose projections are BinaryLinearCutlass; returns (output, probabilities after dropout).

    mask: [batch, seq] (keys that exist), [batch, seq, seq] (who sees whom), or either with the axis of heads; 0 hides.
    """

    def __init__(self, input_dim, hidden_dim, num_heads, dtype=torch.float, device=None):
        super().__init__(input_dim, hidden_dim, num_heads, device=device, dtype=dtype)
        self.dtype = dtype
        for name, features in (
            ("q_linear", input_dim),
            ("k_linear", input_dim),
            ("v_linear", input_dim),
            ("out_linear", hidden_dim),
        ):
            setattr(self, name, BinaryLinearCutlass(features, hidden_dim, device=device, dtype=dtype))

    def forward(self, x, mask=None):
        if mask is not None and mask.dim() in (2, 3):
            mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        return super().forward(x, mask)


# ---- inference wrapper


class QLinearInf(torch.nn.Module):
    """A quantized linear layer for inference: BinaryLinear for one bit, Q4LinearCutlass for 4, Q8LinearCutlass for 8."""

    def __init__(self, input_features, out_features, device=None, a_bit=1, w_bit=1, bias=False):
        super().__init__()
        assert not bias, "QLinearInf: bias is True, expected False: these layers have no output bias"
        from .nbit import Q4LinearCutlass, Q8LinearCutlass

        kinds = {1: BinaryLinear, 4: Q4LinearCutlass, 8: Q8LinearCutlass}
        if a_bit != w_bit or w_bit not in kinds:
            raise ValueError(f"QLinearInf: a_bit is {a_bit} and w_bit {w_bit}, expected both 1, 4 or 8")
        self.input_features, self.output_features = input_features, out_features
        self.layer = kinds[w_bit](input_features, out_features, device=device)

    def prepare_params(self):
        self.layer.prepare_params()

    def set_weight_data(self, x):
        self.layer.set_weight_data(x)

    def set_quantized_weight_data(self, x):
        self.layer.set_quantized_weight_data(x)

    def generate_quantized_weight(self, qweight_only=False):
        self.layer.generate_quantized_weight(qweight_only)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def opt_weight(self):
        return self.layer.opt_weight

    def forward(self, x):
        return self.layer(x)
